"""``cryorbit posterior``: how sure a finished run is of its map."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cryorbit.cli.options import LARGEST_SEED


def posterior(
    run: Annotated[Path, typer.Argument(help="Run folder of cryorbit reconstruct or refine.")],
    draws: Annotated[int, typer.Option("--draws", help="How many times all poses are drawn from poses.npz.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of these draws.", min=0, max=LARGEST_SEED)] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N (default: the run's).")] = "",
    memory: Annotated[
        float, typer.Option("--memory", help="GiB of Fourier pixels kept in memory (negative: as in the run).")
    ] = -1.0,
    prior_mask: Annotated[
        str,
        typer.Option(
            "--prior-mask",
            help="The map is zero outside: sphere (of the mask diameter), solvent (the run's own mask), or a mask file.",
        ),
    ] = "",
    non_negative: Annotated[
        bool, typer.Option("--non-negative", help="Nor is it negative inside, where the mask's outside is zero.")
    ] = False,
) -> None:
    """Uncertainty of a run's map, resolution without half-sets, and missing views; adds files to the run folder."""
    from cryorbit.cli.console import plain
    from cryorbit.pipeline.posterior import posterior as compute
    from cryorbit.report.posterior import write_figure

    values = compute(
        run,
        draws=draws,
        seed=seed,
        device=device,
        memory_gib=None if memory < 0 else memory,
        prior_mask=prior_mask,
        non_negative=non_negative,
    )
    page = write_figure(run)
    console = plain()
    console.print(_words(values))
    console.print(f"\nmean       {run / 'map_mean.mrc'}\nstd        {run / 'map_std.mrc'}")
    console.print(f"views      {run / 'missing_views.mrc'}\ncurves     {run / 'ss_snr.csv'}\nfigure     {page}")


def _words(values: dict[str, Any]) -> str:
    """The numbers a person looks for first."""
    masks = ""
    if (gain := values["prior_mask_gain_nats"]) is not None:
        masks = (
            f"\nprior mask  makes such an image {gain:+.2f} nats (error {values['prior_mask_gain_error']:.2f}) likelier"
        )
    return (
        f"resolution  {values['resolution_masked_A']:.2f} A inside the mask, {values['resolution_A']:.2f} A without "
        f"(from all particles, no half-sets)\n"
        f"directions  {values['resolution_best_direction_A']:.2f} A along the best, "
        f"{values['resolution_worst_direction_A']:.2f} A along the worst\n"
        f"views       {100 * values['unseen_share']:.1f} % of the map's Fourier coefficients are hardly seen\n"
        f"voxels      signal inside the mask is {values['signal_to_std']:.1f} times its uncertainty, of whose variance "
        f"{100 * values['pose_share_of_variance']:.0f} % comes from poses\n"
        f"held out    under the map of the other half an image is {values['held_out_gain_nats']:.1f} nats (error "
        f"{values['held_out_gain_error']:.1f}) likelier than as noise; what it leaves is "
        f"{values['held_out_residual']:.3f} of the variance predicted (1 is right)"
    ) + masks
