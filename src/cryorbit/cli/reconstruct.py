"""``cryorbit reconstruct``: the main job."""

from pathlib import Path

import typer


def reconstruct(
    particles: Path = typer.Argument(..., help="Particle STAR (RELION 3.0 to 5), cryoSPARC .cs, or .mrcs stack."),
    output: Path = typer.Option(
        ..., "--output", "-o", help="Run folder to write; an interrupted run there is continued."
    ),
    mask_diameter: float = typer.Option(
        0.0, "--mask-diameter", help="Particle diameter in angstrom (0: 85 % of the box)."
    ),
    symmetry: str = typer.Option(
        "C1", "--symmetry", help="Point group imposed on the map: C1, Cn, Dn, T, O, I; auto looks for one."
    ),
    preset: str = typer.Option("default", "--preset", help="fast, default or thorough."),
    datadir: Path | None = typer.Option(None, "--datadir", help="Folder the image stacks are looked up in."),
    pixel_size: float = typer.Option(
        0.0, "--pixel-size", help="Angstrom per pixel, when the file does not say (0: as in the file)."
    ),
    contrast: str = typer.Option("auto", "--contrast", help="light or dark particles; auto goes by the ab initio map."),
    flip_hand: bool = typer.Option(
        False, "--flip-hand", help="Write the other hand (images alone cannot tell which is right)."
    ),
    no_ctf: bool = typer.Option(False, "--no-ctf", help="Take the images as unmodulated, whatever the file says."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    memory: float = typer.Option(
        4.0, "--memory", help="GiB of Fourier pixels kept in memory; a larger stack is read again at each pass."
    ),
    seed: int = typer.Option(0, "--seed", help="Random start; another seed is another independent attempt."),
    set_: list[str] = typer.Option(
        [], "--set", help="Any other setting, as section.key=value (see config.toml).", metavar="KEY=VALUE"
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Delete a previous run in the output folder first."),
) -> None:
    """Reconstruct a map and every particle's pose from particle images, with no starting model."""
    from cryorbit.pipeline.config import RunConfig, override
    from cryorbit.pipeline.config import preset as apply_preset

    config = RunConfig(
        particles=str(particles.resolve()),
        datadir=str(datadir.resolve()) if datadir else "",
        mask_diameter=mask_diameter,
        symmetry=symmetry,
        preset=preset,
        seed=seed,
        device=device,
        memory_gib=memory,
        pixel_size=pixel_size,
        contrast=contrast,
        flip_hand=flip_hand,
        no_ctf=no_ctf,
    )
    run_and_report(override(apply_preset(config), set_), output, overwrite)


def run_and_report(config: "RunConfig", output: Path, overwrite: bool) -> None:  # noqa: F821 - imported where used, to keep --help fast
    """Reconstruct with progress on stderr, write the report, print the verdict."""
    from rich.console import Console

    from cryorbit.cli.progress import Reporter
    from cryorbit.pipeline.reconstruct import reconstruct as run
    from cryorbit.report.render import write_report
    from cryorbit.training.loop import Stopped

    console = Console(highlight=False, soft_wrap=True)
    try:
        with Reporter() as progress:
            result = run(config, output, overwrite=overwrite, progress=progress)
    except Stopped as stopped:
        console.print(f"{stopped}: run the same command again to continue.")
        raise typer.Exit(130) from None
    page = write_report(output)
    console.print(f"\n{result.status}")
    for warning in result.warnings:
        console.print(f"note: {warning}")
    console.print(f"\nmap        {output / 'map.mrc'}\nparticles  {output / 'particles.star'}\nreport     {page}")
