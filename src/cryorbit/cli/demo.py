"""``cryorbit demo``: simulate particles of a shipped model and reconstruct them, start to finish."""

from pathlib import Path

import typer


def demo(
    output: Path = typer.Option(Path("demo"), "--output", "-o", help="Folder for the simulated particles and the run."),
    count: int = typer.Option(3000, "--count", help="Particles to simulate."),
    seed: int = typer.Option(0, "--seed", help="Random seed of the reconstruction."),
) -> None:
    """Simulate noisy images of adenylate kinase (PDB 4AKE) and recover its map and their poses, with no starting model."""
    from rich.console import Console

    from cryorbit.cli.evaluate import evaluate
    from cryorbit.cli.reconstruct import run_and_report
    from cryorbit.cli.simulate import simulate
    from cryorbit.pipeline.config import RunConfig

    console = Console(highlight=False, soft_wrap=True)
    particles = output / "particles"
    if not (particles / "particles.star").exists():
        simulate(
            model="4ake", output=particles, count=count, box=64, pixel_size=1.6, snr_db=0.0, ctf=True, shift_sigma=1.0, seed=11
        )
    config = RunConfig(particles=str((particles / "particles.star").resolve()), mask_diameter=90.0, seed=seed)
    run_and_report(config, output / "run", overwrite=False)
    console.print("\nagainst the truth (which the reconstruction never saw):")
    evaluate(output / "run", truth=particles / "truth.mrc", truth_poses=particles / "truth.star")
    console.print(f"\nOpen {output / 'run' / 'report.html'} in a browser.")
