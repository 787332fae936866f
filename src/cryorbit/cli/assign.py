"""``cryorbit assign``: poses of new particles of a structure that a finished run knows."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cryorbit.cli import options


def assign(
    particles: options.Particles,
    run: Annotated[Path, typer.Option("--run", help="Run folder of cryorbit reconstruct or refine.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write.")],
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold", help="Confidence below which a particle is searched for; 1: all (negative: as learnt)."
        ),
    ] = -1.0,
    steps: Annotated[int, typer.Option("--steps", help="Gauss-Newton steps after the encoder's one pass.")] = 2,
    batch: Annotated[int, typer.Option("--batch", help="Images at a time.")] = 500,
    datadir: options.Datadir = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N (default: the run's).")] = "",
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", help="Setting of the encoder's teaching, for example steps=6000 or side=32.", metavar="KEY=VALUE"
        ),
    ] = [],  # noqa: B006 - typer's default
) -> None:
    """Pose new particles of a known structure in one pass of an encoder, taught by the run the first time."""
    from cryorbit.cli.console import plain
    from cryorbit.cli.progress import reported
    from cryorbit.methods.distillation import DistillationConfig
    from cryorbit.pipeline.assign import assign as compute
    from cryorbit.pipeline.config import override_section

    console = plain()
    teaching = override_section(DistillationConfig(), set_) if set_ else None
    with reported(console) as progress:
        values: dict[str, Any] = compute(
            particles,
            run,
            output,
            teaching=teaching,
            searched_below=None if threshold < 0 else threshold,
            steps=steps,
            batch=batch,
            datadir=datadir,
            device=device,
            progress=progress,
        )
    console.print(_words(values))
    for warning in values["warnings"]:
        console.print(f"note: {warning}")
    console.print(f"\nparticles  {output / 'particles.star'}\nsummary    {output / 'assign.json'}")


def _words(values: dict[str, Any]) -> str:
    """The numbers a person looks for first."""
    held = values["held_out"]
    return (
        f"posed       {values['particles']} particles, {values['images_per_second']:.0f} per second\n"
        f"confidence  median {values['confidence_median']:.3f}; {values['searched']} below {values['searched_below']:.3f} were searched for\n"
        f"strength    median {values['strength_median']:.2f} of the map's: near 1 for the same structure on the same grey scale\n"
        f"held out    {100 * held['encoder_right']:.1f} % of {held['particles']:.0f} particles of the run right without search, "
        f"{100 * held['search_right']:.1f} % with it (within 10 degrees)"
    )
