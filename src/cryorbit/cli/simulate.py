"""``cryorbit simulate``: particle images whose truth is known."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from cryorbit.cli.options import LARGEST_SEED

Option = typer.Option


def simulate(
    output: Annotated[Path, Option("--output", "-o", help="Folder to write; refused when not empty.")],
    model: Annotated[str, Option("--model", "-m", help="4ake, phantom, a PDB/mmCIF file, or an MRC map.")] = "4ake",
    count: Annotated[int, Option("--count", "-n", help="Number of particles.")] = 5000,
    box: Annotated[int | None, Option("--box", help="Image side in pixels [64, or the map's].")] = None,
    pixel_size: Annotated[float | None, Option("--pixel-size", help="Angstrom per pixel [1.6, or the map's].")] = None,
    snr_db: Annotated[float, Option("--snr-db", help="Signal over noise variance of whole images, in dB.")] = 0.0,
    noise: Annotated[
        Literal["white", "coloured", "poisson", "none"], Option("--noise", help="Kind of noise; poisson: counts.")
    ] = "white",
    dose: Annotated[float | None, Option("--dose", help="poisson: electrons per pixel without a particle.")] = None,
    ctf: Annotated[bool, Option("--ctf", help="Apply a CTF to each particle (300 kV, Cs 2.7 mm, Q0 0.1).")] = False,
    defocus: Annotated[tuple[float, float], Option("--defocus", help="Lowest and highest, in angstrom.")] = (
        8e3,
        2e4,
    ),
    astigmatism: Annotated[float, Option("--astigmatism", help="Largest DefocusU - DefocusV in angstrom.")] = 0.0,
    phase_shift: Annotated[float, Option("--phase-shift", help="Phase plate, in degrees.")] = 0.0,
    voltage: Annotated[float, Option("--voltage", help="Acceleration voltage in kV.")] = 300.0,
    shift_sigma: Annotated[float, Option("--shift-sigma", help="Standard deviation in x and in y, in pixels.")] = 0.0,
    orientations: Annotated[
        Literal["uniform", "vmf", "cone", "preferred"], Option("--orientations", help="Density of the views.")
    ] = "uniform",
    concentration: Annotated[float, Option("--concentration", help="vmf: kappa of each component.")] = 10.0,
    components: Annotated[int, Option("--components", help="vmf, preferred: number of directions.")] = 3,
    half_angle: Annotated[float, Option("--half-angle", help="cone, preferred: degrees from axis to edge.")] = 15.0,
    fraction: Annotated[float, Option("--fraction", help="preferred: part of the particles in the cones.")] = 0.8,
    bfactor: Annotated[float, Option("--bfactor", help="B-factor of all atoms, A^2; negative: the file's own.")] = 30.0,
    chains: Annotated[str | None, Option("--chains", help="Chains to keep, comma-separated [all].")] = None,
    fast: Annotated[bool, Option("--fast", help="Project by slicing the map, not atom by atom.")] = False,
    seed: Annotated[int, Option("--seed", help="Fixes every random draw.", min=0, max=LARGEST_SEED)] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier simulation in the folder.")] = False,
) -> None:
    """Simulate particle images of a molecule: a stack, a STAR file without poses, and the truth beside them."""
    from rich.console import Console
    from rich.progress import Progress

    from cryorbit.cli.console import plain
    from cryorbit.simulate.orientations import Orientations
    from cryorbit.simulate.particles import make_projector
    from cryorbit.simulate.settings import CTFSettings, SimulationSettings
    from cryorbit.simulate.source import open_source
    from cryorbit.simulate.write import write_simulation
    from cryorbit.types import Volume

    settings = SimulationSettings(
        count=count,
        snr_db=None if noise == "none" else snr_db,
        ctf=CTFSettings(defocus, astigmatism, math.radians(phase_shift), voltage) if ctf else None,
        shift_sigma_px=shift_sigma,
        orientations=Orientations(orientations, concentration, components, math.radians(half_angle), fraction),
        noise="white" if noise == "none" else noise,
        seed=seed,
        dose=dose,
    )
    source = open_source(model, bfactor=None if -math.inf < bfactor < 0 else bfactor, chains=chains)
    native = (source.box, source.pixel_size) if isinstance(source, Volume) else (64, 1.6)
    projector = make_projector(
        source, native[0] if box is None else box, native[1] if pixel_size is None else pixel_size, fast
    )
    described = model if isinstance(source, Volume) else f"{model}, {len(source)} Gaussian atoms"
    if not isinstance(source, Volume) and source.name != "phantom":
        described += f", chains {chains or 'all'}, B-factors {'of the file' if bfactor < 0 else f'{bfactor:g}'}"
    err = Console(stderr=True, highlight=False)
    with Progress(console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("simulate", total=count)
        summary = write_simulation(
            output,
            projector,
            settings,
            source=described,
            overwrite=overwrite,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    snr = f"SNR {round(10 * math.log10(summary.snr), 2) + 0.0:g} dB" if summary.noise_variance else "no noise"
    if dose is not None:
        snr += f", {dose:g} electrons per pixel, contrast {math.sqrt(summary.snr / dose):.3g}"
    console = plain()
    console.print(f"particles  {summary.particles}")
    console.print(f"           {count:,} images of {summary.box} px at {summary.pixel_size:g} A, {snr}")
    console.print(f"truth      {output / 'truth.mrc'}, {output / 'truth.star'}")
