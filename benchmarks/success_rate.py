"""How often ab initio to final map succeeds, over molecules, noise, shifts, CTF, views and counts; and how well the verdict knows.

    python benchmarks/success_rate.py ../shared/data --json benchmarks/results/success_rate.json      # run (continues where it stopped)
    python benchmarks/success_rate.py ../shared/data --json ... --ceilings                            # poses under the true map
    python benchmarks/success_rate.py ../shared/data --json ... --fit docs/images/reliability.png     # table, verdict's weights, diagram

Every run simulates new images, poses and noise from its seed, writes them as files, and runs the default pipeline on them. Success: median
pose error below 5 degrees *and* FSC 0.5 to the truth within 1.3 of the known-pose reconstruction of the same images, both inside the
molecule's mask (rows also say how it stands without the mask, where noise in the solvent decides). The hopeless cells (pure noise; two
unrelated molecules) have no right answer: a run there is a failure whatever it returns. A ceiling is how near to the truth the
heaviest modes of 500 such images lie under the true map and the true noise, looked for around the truth and eight places of a whole grid:
an optimistic bound. Superseded rows are what older engines knew of runs that were repeated since: they are in no table, but a verdict is fitted
to them too, for newer engines go wrong more rarely than it takes to tell how that looks.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryorbit.groups.point import point_group
from cryorbit.io.mrc import read_volume
from cryorbit.io.particles import ParticleSet, open_particles
from cryorbit.io.star import read_star, write_star
from cryorbit.methods.marginal import Marginal
from cryorbit.methods.refinement import Refinement
from cryorbit.methods.refinement_config import RefinementConfig
from cryorbit.metrics.align import align_poses, align_volumes
from cryorbit.metrics.masks import mask_from_map
from cryorbit.metrics.symmetry import detect_symmetry
from cryorbit.physics.cryoem import forward
from cryorbit.physics.slicing import slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.simulate.atoms import AtomicModel
from cryorbit.simulate.orientations import Orientations
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.source import open_source
from cryorbit.simulate.write import write_simulation
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses, Volume
from reconstruct import against_truth, ceiling
from success_report import TWO, fit, table

_ASKED = 500  # images of a cell whose poses are looked for under the true map
NEAR, FAR = (8000.0, 20000.0), (15000.0, 35000.0)
PREFERRED = Orientations(kind="preferred", half_angle=0.5236, components=3, fraction=0.8)


@dataclass(frozen=True)
class Molecule:
    """What is imaged: a file under the data folder or a shipped model, and the box it is imaged in."""

    source: str
    pixel_size: float
    diameter: float
    group: str = "C1"  # its own symmetry, by which poses are judged
    imposed: str = "C1"


MOLECULES = {
    "4AKE": Molecule("4ake", 1.6, 90.0),
    "GroEL": Molecule("models/1aon.pdb.gz", 4.0, 220.0, group="C7"),
    "GroEL 6 A": Molecule("models/1aon.pdb.gz", 6.0, 220.0, group="C7"),
    "antibody": Molecule("models/1igy.cif", 3.2, 170.0),
    "ribosome": Molecule("maps/clean70SRibosome_vol_65p.mrc", 5.0, 270.0),
    "apoferritin": Molecule("models/apoferritin_ca_apo_sym.pdb", 3.0, 140.0, group="O", imposed="O"),
    "haemoglobin": Molecule("models/4hhb.pdb", 1.6, 90.0),
}


@dataclass(frozen=True)
class Cell:
    """One row of the table. ``second``: a molecule that half of the images show instead; ``seeds``: how many runs;
    ``symmetry``: asked for in place of the molecule's ``imposed``."""

    name: str
    molecule: str = "4AKE"
    count: int = 2000
    snr_db: float = -10.0
    shift_sigma_px: float = 2.0
    defocus: tuple[float, float] | None = NEAR
    preferred: bool = False
    second: str = ""
    hopeless: bool = False
    seeds: int = 10
    symmetry: str = ""


CELLS = [
    Cell("10k, 0 dB", count=10_000, snr_db=0.0, seeds=5),
    Cell("10k, -10 dB", count=10_000, seeds=5),
    Cell("10k, -15 dB", count=10_000, snr_db=-15.0, seeds=5),
    Cell("10k, -20 dB", count=10_000, snr_db=-20.0, seeds=5),
    Cell("no shifts, no CTF, 0 dB", snr_db=0.0, shift_sigma_px=0.0, defocus=None, seeds=20),
    Cell("-10 dB", seeds=20),
    Cell("-15 dB", snr_db=-15.0, seeds=20),
    Cell("-17 dB", snr_db=-17.0),
    Cell("-20 dB", snr_db=-20.0),
    Cell("500 images", count=500, seeds=20),
    Cell("1k, -15 dB", count=1000, snr_db=-15.0),
    Cell("shifts 4 px", shift_sigma_px=4.0),
    Cell("far defocus", defocus=FAR, seeds=20),
    Cell("preferred views", preferred=True, seeds=20),
    Cell("10k, preferred views", count=10_000, preferred=True, seeds=5),
    Cell("GroEL, -10 dB", "GroEL", seeds=20),
    Cell("GroEL, -20 dB", "GroEL", snr_db=-20.0, seeds=5),
    Cell("antibody, -10 dB", "antibody", seeds=20),
    Cell("antibody, -15 dB", "antibody", snr_db=-15.0, seeds=5),
    Cell("ribosome, -10 dB", "ribosome", seeds=20),
    Cell("ribosome, -15 dB", "ribosome", snr_db=-15.0, seeds=5),
    Cell("apoferritin O, -10 dB", "apoferritin", seeds=5),
    Cell("GroEL, -10 dB, symmetry auto", "GroEL", symmetry="auto", seeds=20),
    Cell("-10 dB, symmetry auto", symmetry="auto", seeds=20),
    Cell("pure noise", snr_db=-60.0, hopeless=True),
    Cell(TWO, second="haemoglobin", hopeless=True),
    Cell("20k at 6 A, SNR .032", "GroEL 6 A", count=20_000, snr_db=-14.95, seeds=5),
    Cell("20k at 6 A, SNR .016, no shifts", "GroEL 6 A", count=20_000, snr_db=-17.96, shift_sigma_px=0.0, seeds=5),
]


def simulate(cell: Cell, molecule: str, count: int, seed: int, data: Path, folder: Path) -> None:
    """Write particles and truth of one molecule."""
    made = MOLECULES[molecule]
    if made.source.endswith(".mrc"):  # its header does not say the pixel size
        opened: Volume | AtomicModel = Volume(torch.from_numpy(read_volume(data / made.source)[0]), made.pixel_size)
    else:
        opened = open_source(made.source if made.source == "4ake" else str(data / made.source))
    box = opened.box if isinstance(opened, Volume) else 64
    settings = SimulationSettings(
        count=count,
        snr_db=cell.snr_db,
        ctf=None if cell.defocus is None else CTFSettings(defocus=cell.defocus),
        shift_sigma_px=cell.shift_sigma_px,
        orientations=PREFERRED if cell.preferred else Orientations(),
        seed=seed,
    )
    write_simulation(folder, make_projector(opened, box, made.pixel_size), settings)


def particles_of(cell: Cell, run: int, data: Path, folder: Path) -> Path:
    """The STAR file of the images of a cell's run; their truth is in ``a``."""
    seed = zlib.crc32(cell.name.encode()) % 10**6 * 1000 + 10 * run
    if not cell.second:
        simulate(cell, cell.molecule, cell.count, seed, data, folder / "a")
        return folder / "a" / "particles.star"
    simulate(cell, cell.molecule, cell.count // 2, seed, data, folder / "a")
    simulate(cell, cell.second, cell.count // 2, seed + 1, data, folder / "b")
    both, other = (read_star(folder / part / "particles.star") for part in "ab")
    for name, table_ in both.blocks["particles"].columns.items():
        more = other.blocks["particles"].columns[name]
        if name == "rlnImageName":
            table_[:], more = ([x.replace("@", f"@{p}/") for x in column] for p, column in (("a", table_), ("b", more)))
        table_.extend(more)
    write_star(folder / "both.star", both)
    return folder / "both.star"


def truth_of(folder: Path) -> tuple[ParticleSet, Poses, Volume]:
    """What :func:`particles_of` wrote there: images with their true poses, these alone, and the true map."""
    particles = open_particles(folder / "a" / "truth.star")
    voxels, pixel_size = read_volume(folder / "a" / "truth.mrc")
    true = Poses(torch.from_numpy(particles.rotations), torch.from_numpy(particles.shifts))
    return particles, true, Volume(torch.from_numpy(voxels), pixel_size)


def marched(history: Path) -> dict[str, int]:
    """Steps and rounds of starts that ab initio took."""
    rows = [row for row in map(json.loads, history.read_text().splitlines()) if row["stage"] == Marginal.name]
    return {"steps": len(rows), "heats": 1 + int(max(row["heat"] for row in rows))}


def one(cell: Cell, seed: int, data: Path, commit: str, at_once: int) -> dict[str, object]:
    """Simulate, reconstruct from the files, judge."""
    torch.set_num_threads(1)
    molecule = MOLECULES[cell.molecule]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        star = particles_of(cell, seed, data, folder)
        config = RunConfig(
            particles=str(star), mask_diameter=molecule.diameter, seed=seed, symmetry=cell.symmetry or molecule.imposed
        )
        wall, cpu = time.perf_counter(), time.process_time()
        result = reconstruct(config, folder / "run")
        row: dict[str, Any] = {
            "cell": cell.name,
            "seed": seed,
            "commit": commit,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "hopeless": cell.hopeless,
            "at_once": at_once,
            "symmetry": result.metrics["symmetry"],
            **marched(folder / "run" / "history.jsonl"),
        }
        keys = ("probability_right", "verdict", "pose_effective_median", "halves_independent", "halves_periods")
        more = (
            "halves_same_pose",
            "halves_pose_difference_deg",
            "resolution_A",
            "resolution_masked_A",
            "stage_seconds",
            "pose_spread_deg",
            "pose_widening",
            "scale_spread",
            "signal_unexplained",
            "signal_unexplained_error",
        )
        row |= {key: result.metrics[key] for key in keys + more}
        spectra = ("noise_variance", "image_power", "background_power")
        row["spectra"] = {key: [float(f"{x:.4g}") for x in np.asarray(result.metrics[key])] for key in spectra}
        row["evidence"] = result.metrics["evidence"]
        if cell.hopeless:
            return row | {"success": False, "success_unmasked": False}
        particles, true, truth = truth_of(folder)
        pixel_size = truth.pixel_size
        group = own_group(molecule, truth)
        imposed = result.metrics["symmetry"] == molecule.group
        known = ceiling(particles, true, molecule.diameter, group if imposed else None)
        errors = align_poses(result.poses, true, group).summary(pixel_size)
        mask = mask_from_map(truth.data, pixel_size)
        scores = against_truth(align_volumes(result.map, truth).map, truth, mask)
        best = against_truth(known, truth, mask)
    row |= {"fsc_0.5_A": scores["fsc_0.5_unmasked_A"], "fsc_0.5_masked_A": scores["fsc_0.5_masked_A"]}
    row |= {
        "known_poses_A": best["fsc_0.5_unmasked_A"],
        "known_poses_masked_A": best["fsc_0.5_masked_A"],
        **asdict(errors),
    }
    return row | judged(row)


def ceiling_of(cell: Cell, data: Path, commit: str) -> dict[str, object]:
    """How near to the truth poses of the cell's images are under the true map: the heaviest mode of refinement's last posterior."""
    torch.set_num_threads(1)
    molecule = MOLECULES[cell.molecule]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        particles_of(replace(cell, count=min(cell.count, _ASKED)), 0, data, folder)
        particles, true, truth = truth_of(folder)
        pixel_size = truth.pixel_size
        stack = FourierStack(particles, 0.5 * particles.box, mask_diameter=molecule.diameter)
        rotations, shifts = true.rotations.float(), true.shifts.float() / pixel_size
        refinement = Refinement(
            stack,
            RefinementConfig(),
            mask_diameter=molecule.diameter,
            symmetry=torch.eye(3)[None],
            start=(truth.data * stack.scale, truth.data * stack.scale),
            radius=int(stack.disk.shell.max()),
            candidates=(rotations[:, None], shifts[:, None]),
            half_set=torch.arange(len(stack)) % 2 + 1,
        )
        tensors = refinement.tensors
        grid = slicing_grid(tensors["reference_1"], stack.disk.radius)
        every = torch.arange(len(stack))
        residual = stack.images(every) - forward(grid, rotations, shifts, stack.disk, stack.ctf(every))
        tensors["noise"] = shell_mean(residual.abs().square().mean(dim=0), stack.disk, len(tensors["noise"]))
        tensors["fsc"].fill_(1.0)
        tensors["mass"].fill_(1 / tensors["mass"].shape[1])  # modes are looked for everywhere
        # From the truth, and from where that ends: poses that move the second time are taken for errors of the map, which has none.
        for _ in range(2):
            found = refinement.posed().posterior
            tensors |= {"rotations": found.rotations, "shifts": found.shifts, "mass": found.mass}
        here = Poses(found.rotations[:, 0].double(), found.shifts[:, 0].double() * pixel_size)
        errors = align_poses(here, true, own_group(molecule, truth)).summary(pixel_size)
    return {"cell": cell.name, "commit": commit, "median_deg": errors.median_deg, "mean_deg": errors.mean_deg}


def judged(row: dict[str, Any]) -> dict[str, bool]:
    """Whether a run was right, and whether it would be without the mask."""
    posed = row["median_deg"] < 5.0
    return {
        "success": posed and row["fsc_0.5_masked_A"] <= 1.3 * row["known_poses_masked_A"],
        "success_unmasked": posed and row["fsc_0.5_A"] <= 1.3 * row["known_poses_A"],
    }


def own_group(molecule: Molecule, truth: Volume) -> torch.Tensor | None:
    """The molecule's rotations in the frame of its file."""
    if molecule.group == "C1":
        return None
    found = detect_symmetry(truth, mask_diameter=molecule.diameter)
    if found.name != molecule.group:
        raise RuntimeError(f"{molecule.source} shows {found.name}, expected {molecule.group}")
    frame = found.rotation.double()
    return frame.T @ point_group(molecule.group) @ frame


def jobs(cells: list[Cell], done: set[tuple[str, int]]) -> Iterator[tuple[Cell, int]]:
    """What is left to run, the first seed of every cell first."""
    for seed in range(max(cell.seeds for cell in cells)):
        for cell in cells:
            if seed < cell.seeds and (cell.name, seed) not in done:
                yield cell, seed


def main() -> None:
    """Run what is left, or fit the verdict to what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=[cell.name for cell in CELLS])
    parser.add_argument("--seeds", type=int, default=100, help="No more than so many per cell.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ceilings", action="store_true", help="Find poses of each cell's images under the true map.")
    parser.add_argument("--fit", type=Path, help="Do not run: fit the verdict and draw its reliability diagram here.")
    arguments = parser.parse_args()
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    rows, ceilings, superseded = (kept.get(name, []) for name in ("rows", "ceilings", "superseded"))
    if arguments.fit:
        print(table(rows, ceilings, superseded))
        print(fit(rows, superseded, arguments.fit))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"device": f"CPU, one thread per run, {platform.machine()}", "torch": torch.__version__}
    cells = [replace(cell, seeds=min(cell.seeds, arguments.seeds)) for cell in CELLS if cell.name in arguments.cells]
    order = [cell.name for cell in CELLS]

    def write() -> None:
        ceilings.sort(key=lambda row: order.index(row["cell"]))
        rows.sort(key=lambda row: (order.index(row["cell"]), row["seed"]))
        values = {"about": about, "ceilings": ceilings, "superseded": superseded, "rows": rows}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")

    if arguments.ceilings:
        known = {row["cell"] for row in ceilings}
        for cell in cells:
            if not (cell.hopeless or cell.name in known):
                ceilings.append(ceiling_of(cell, arguments.data.resolve(), commit))
                print(ceilings[-1], flush=True)
                write()
        return
    left = list(jobs(cells, {(row["cell"], row["seed"]) for row in rows}))
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(one, cell, seed, arguments.data.resolve(), commit, arguments.workers): (cell, seed)
            for cell, seed in left
        }
        for future in as_completed(running):
            row = future.result()
            rows.append(row)
            shown = {
                k: row[k] for k in ("cell", "seed", "success", "probability_right", "halves_same_pose", "cpu_seconds")
            }
            shown |= {k: row.get(k) for k in ("median_deg", "fsc_0.5_masked_A", "known_poses_masked_A")}
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in shown.items()}, flush=True)
            write()
    print(table(rows, ceilings, superseded))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
