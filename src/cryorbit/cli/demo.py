"""``cryorbit demo``: simulate particles of a shipped model and reconstruct them, start to finish."""

from pathlib import Path

import typer


def demo(
    output: Path = typer.Option(Path("demo"), "--output", "-o", help="Folder for the simulated particles and the run."),
    count: int = typer.Option(3000, "--count", help="Particles to simulate."),
    seed: int = typer.Option(0, "--seed", help="Random seed of the reconstruction."),
) -> None:
    """Simulate noisy images of adenylate kinase (PDB 4AKE) and recover its map and their poses, with no starting model."""
    from cryorbit.cli.console import plain
    from cryorbit.cli.evaluate import evaluate
    from cryorbit.cli.reconstruct import run_and_report
    from cryorbit.cli.simulate import simulate
    from cryorbit.pipeline.config import RunConfig

    console = plain()
    particles, run = output / "particles", output / "run"
    if not (particles / "particles.star").exists():
        console.print(f"Simulating {count:,} images of adenylate kinase (0 dB, CTF, shifts of 1 px) ...")
        simulate(particles, count=count, ctf=True, shift_sigma=1.0, seed=11)
    console.print("\nReconstructing them with no starting model ...")
    run_and_report(
        RunConfig(particles=str((particles / "particles.star").resolve()), mask_diameter=90.0, seed=seed), run, False
    )
    console.print("\nThe truth, which the reconstruction never saw:")
    evaluate(
        run,
        truth=particles / "truth.mrc",
        truth_poses=particles / "truth.star",
        symmetry="",
        aligned=False,
        as_json=False,
    )
    console.print(f"\nOpen {run / 'report.html'} in a browser.")
