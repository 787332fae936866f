"""``cryorbit reconstruct``: the main job."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cryorbit.cli import options
from cryorbit.cli.posterior import posterior as add_posterior


def reconstruct(
    particles: options.Particles,
    output: options.Output,
    mask_diameter: options.MaskDiameter = 0.0,
    symmetry: Annotated[
        str, typer.Option("--symmetry", help="Point group imposed on the map: C1, Cn, Dn, T, O, I; auto looks for one.")
    ] = "C1",
    method: Annotated[
        str,
        typer.Option("--method", help="marginal: every pose weighed; amortized: a network learns poses with the map."),
    ] = "marginal",
    init: Annotated[
        str,
        typer.Option("--init", help="First start of each half: random poses, or moments, a coarse map without poses."),
    ] = "random",
    preset: options.Preset = "default",
    datadir: options.Datadir = None,
    pixel_size: options.PixelSize = 0.0,
    contrast: options.Contrast = "auto",
    flip_hand: options.FlipHand = False,
    no_ctf: options.NoCTF = False,
    defocus_range: options.DefocusRange = 0.0,
    volume: options.VolumeModel = "voxel",
    device: options.Device = "auto",
    memory: options.Memory = 4.0,
    seed: Annotated[int, typer.Option("--seed", help="Random start; another seed is another independent attempt.")] = 0,
    set_: options.Set = [],  # noqa: B006 - typer's default
    overwrite: options.Overwrite = False,
    posterior: options.Posterior = False,
) -> None:
    """Reconstruct a map and every particle's pose from particle images, with no starting model."""
    config = configured(
        particles,
        datadir,
        set_,
        mask_diameter=mask_diameter,
        symmetry=symmetry,
        method=method,
        init=init,
        preset=preset,
        seed=seed,
        device=device,
        memory_gib=memory,
        pixel_size=pixel_size,
        contrast=contrast,
        flip_hand=flip_hand,
        no_ctf=no_ctf,
        volume=volume,
        refine={"defocus_range": defocus_range},
    )
    run_and_report(config, output, overwrite, posterior)


def configured(particles: Path, datadir: Path | None, assignments: list[str], **settings: object) -> "RunConfig":  # noqa: F821
    """The settings of a run: the options', then the preset's, then those of ``--set``."""
    from cryorbit.pipeline.config import AUTO, RunConfig, from_dict, override, preset

    paths = {"particles": str(particles.resolve()), "datadir": str(datadir.resolve()) if datadir else ""}
    made = override(preset(from_dict(RunConfig, paths | settings)), assignments)
    name = "".join(made.symmetry.split())  # one spelling: another one is not another run
    return replace(made, symmetry=AUTO if name.lower() == AUTO else name.upper())


def run_and_report(config: "RunConfig", output: Path, overwrite: bool, posterior: bool = False) -> None:  # noqa: F821 - imported where used, to keep --help fast
    """Reconstruct with progress on stderr, write the report, print the verdict; then the map's posterior, if asked for."""
    from cryorbit.cli.console import plain
    from cryorbit.cli.progress import reported
    from cryorbit.pipeline.reconstruct import reconstruct as run
    from cryorbit.report.render import write_report

    console = plain()
    with reported(console) as progress:
        result = run(config, output, overwrite=overwrite, progress=progress)
    page = write_report(output)
    console.print(f"\n{result.status}")
    for warning in result.warnings:
        console.print(f"note: {warning}")
    if (spread := result.metrics["defocus_sigma_A"]) is not None:
        console.print(
            f"defocus refined: it differs from the file's by {spread:.0f} A (standard deviation over particles)"
        )
    console.print(f"\nmap        {output / 'map.mrc'}\nparticles  {output / 'particles.star'}\nreport     {page}")
    if posterior:
        console.print()
        add_posterior(output)
