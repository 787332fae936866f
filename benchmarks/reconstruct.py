"""Ab initio to final map on simulated sets, several seeds, beside the known-pose reconstruction of the same images (the ceiling).

    python benchmarks/reconstruct.py N R0 R5 R R15 --json benchmarks/results/reconstruct.json
    python benchmarks/reconstruct.py A B C D E F G --json benchmarks/results/paper001.json     # Table 1 of Nashed et al. 2021

All are adenylate kinase 4AKE. N: 5,000 images of 64 px at 1.6 A, 0 dB, no CTF, no shifts. R0, R5, R, R15: the same at 0, -5, -10 and
-15 dB with CTF (300 kV, 2.7 mm, 0.1, defocus 0.8-2.0 um) and Gaussian shifts of sigma 2 px. A to F: 9,000 images of 128 px at 0.8 A,
without noise and at 10, 5, 0, -5, -10 dB; G: 0 dB with defocus 0.4-1.2 um; H: G at -15 dB with shifts of sigma 2 px.
R128: R with 10,000 images of 128 px at 0.8 A. Every seed draws new images, poses, noise and a new random start. A seed fails when the
pipeline raises or ends above 30 degrees median error; failures stay in the means. "Covered": share of the true poses inside the 90 %
credible region of ``poses.npz``. ``--json`` keeps what the file already has of other sets and of other seeds; every row names its commit.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cryorbit.io.mrc import read_volume
from cryorbit.io.particles import ParticleSet, open_particles
from cryorbit.methods.half_maps import halves_from_poses
from cryorbit.metrics.align import align_poses
from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.map_search import align_volumes
from cryorbit.metrics.masks import mask_from_map
from cryorbit.pipeline.config import RunConfig, override, preset
from cryorbit.pipeline.outputs import read_posterior
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.poses.posterior import REGIONS, covered, levels_of_truth
from cryorbit.simulate.atoms import model_path, read_model
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.checkpoint import load_checkpoint
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses, Volume

NEAR, PAPER = CTFSettings(defocus=(8000.0, 20000.0)), CTFSettings(defocus=(4000.0, 12000.0))


@dataclass(frozen=True)
class Case:
    """A simulated set."""

    snr_db: float | None
    ctf: CTFSettings | None = None
    shift_sigma_px: float = 0.0
    box: int = 128
    count: int = 9000


SETS = {"N": Case(0.0, box=64, count=5000)}
SETS |= {
    name: Case(snr, NEAR, 2.0, 64, 5000) for name, snr in (("R0", 0.0), ("R5", -5.0), ("R", -10.0), ("R15", -15.0))
}
SETS |= {name: Case(snr) for name, snr in (("A", None), ("B", 10.0), ("C", 5.0), ("D", 0.0), ("E", -5.0), ("F", -10.0))}
SETS |= {"G": Case(0.0, PAPER), "H": Case(-15.0, PAPER, 2.0), "R128": Case(-10.0, NEAR, 2.0, 128, 10_000)}
SIDE = 102.4  # angstrom
DIAMETER = 90.0


def against_truth(volume: Volume, truth: Volume, mask: torch.Tensor) -> dict[str, float]:
    """FSC of an aligned map with the truth, at 0.5 and 0.143, masked by the truth's own mask and not."""
    out = {}
    for name, m in (("masked", mask), ("unmasked", torch.ones_like(mask))):
        curve = fsc(volume.data * m, truth.data * m)
        for threshold in (0.5, 0.143):
            out[f"fsc_{threshold}_{name}_A"] = resolution(curve, threshold, truth.box, truth.pixel_size)
    return out


def ceiling(
    particles: ParticleSet, poses: Poses, diameter: float = DIAMETER, group: torch.Tensor | None = None
) -> Volume:
    """The same images inserted at their true poses by the same code; ``group`` (S, 3, 3), in the molecule's frame: imposed."""
    symmetry = torch.eye(3)[None] if group is None else group.float()
    stack = FourierStack(particles, 0.5 * particles.box, mask_diameter=diameter)
    half_set = torch.arange(len(particles)) % 2 + 1
    shifts = poses.shifts.float() / particles.pixel_size
    made = halves_from_poses(
        stack, poses.rotations.float(), shifts, half_set, mask_diameter=diameter, symmetry=symmetry
    )
    return Volume(made.joint, particles.pixel_size)


def one(name: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """Simulate, reconstruct from the files, evaluate."""
    case = SETS[name]
    projector = make_projector(read_model(model_path("4ake")), case.box, SIDE / case.box)
    drawn = SimulationSettings(
        count=case.count, seed=1000 + seed, snr_db=case.snr_db, ctf=case.ctf, shift_sigma_px=case.shift_sigma_px
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        write_simulation(source, projector, drawn)
        config = RunConfig(particles=str(source / "particles.star"), mask_diameter=DIAMETER, seed=seed)
        wall, cpu = time.perf_counter(), time.process_time()
        result = reconstruct(override(preset(config), settings), Path(folder) / "run")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        data, pixel_size = read_volume(source / "truth.mrc")
        truth = Volume(torch.from_numpy(data), pixel_size)
        particles = open_particles(source / "truth.star")
        true = Poses(torch.from_numpy(particles.rotations), torch.from_numpy(particles.shifts))
        known = ceiling(particles, true)
        posterior = read_posterior(Path(folder) / "run" / "poses.npz")
        handed, _ = load_checkpoint(Path(folder) / "run" / "checkpoint" / "assigned.safetensors")
    mask = mask_from_map(truth.data, pixel_size)
    aligned = align_volumes(result.map, truth)
    found = align_poses(result.poses, true)
    first = align_poses(Poses(handed["rotations"][:, 0].double(), handed["shifts"][:, 0].double()), true)
    return {
        "set": name,
        "seed": seed,
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_rss_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # of the process so far
        **asdict(found.summary(pixel_size)),
        "abinitio_median_deg": float(torch.rad2deg(first.error).median()),
        "covered": covered(levels_of_truth(posterior, true, found)),
        "pose_spread_deg": result.metrics["pose_spread_deg"],
        "stage_seconds": result.metrics["stage_seconds"],
        **against_truth(aligned.map, truth, mask),
        "known_poses": against_truth(known, truth, mask),
        "half_maps_A": result.metrics["resolution_A"],
        "half_maps_masked_A": result.metrics["resolution_masked_A"],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, object]:
    """Means and standard deviations over the seeds of one set."""
    out: dict[str, object] = {"failures": sum(r["median_deg"] > 30 for r in rows), "runs": len(rows)}
    keys = ("median_deg", "mean_deg", "fsc_0.5_masked_A", "fsc_0.5_unmasked_A", "seconds", "cpu_seconds")
    values = {key: [float(r[key]) for r in rows] for key in keys}
    values["known_poses_masked_A"] = [r["known_poses"]["fsc_0.5_masked_A"] for r in rows]
    values |= {f"covered_{part:g}": [r["covered"][f"{part:g}"] for r in rows] for part in REGIONS}
    for key, each in values.items():
        out[key] = {"mean": statistics.mean(each), "sd": statistics.stdev(each) if len(each) > 1 else 0.0}
    return out


def draw(sets: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """How often the truth lies inside the credible regions, against how often it should."""
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.4, 1], [0.4, 1], color="#9aa1a9", lw=1)
    for name, rows in sets.items():
        shares = [statistics.mean(row["covered"][f"{part:g}"] for row in rows) for part in REGIONS]
        snr = SETS[name].snr_db
        axes.plot(
            REGIONS,
            shares,
            marker="o",
            ms=4,
            lw=1,
            label=("no noise" if snr is None else f"{snr:g} dB") + ("" if SETS[name].ctf else ", no CTF"),
        )
    axes.set_xlabel("mass of the credible region")
    axes.set_ylabel("share of true poses inside")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(picture, dpi=130)


def main() -> None:
    """Run the seeds of every set, print them, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", choices=SETS, nargs="+")
    parser.add_argument("--seeds", type=int, default=3, help="How many.")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set-value", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, help="Do not run: draw the coverage of the sets in --json here.")
    arguments = parser.parse_args()
    if arguments.draw:
        stored = json.loads(arguments.json.read_text())["sets"]
        draw({name: stored[name]["rows"] for name in arguments.sets}, arguments.draw)
        return
    about = {
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
    }
    stored = json.loads(arguments.json.read_text())["sets"] if arguments.json and arguments.json.exists() else {}
    rows: dict[str, list[dict[str, Any]]] = {name: stored[name]["rows"] for name in stored}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.sets:
            row = {**about, **one(name, seed, arguments.set_value)}
            rows[name] = [r for r in rows.get(name, []) if r["seed"] != seed] + [row]
            known = row["known_poses"]
            print(
                f"{name} seed {seed}: {row['seconds']:.0f} s ({row['cpu_seconds']:.0f} CPU-s)  poses {row['median_deg']:.2f} deg median, "
                f"{row['mean_deg']:.2f} mean, {100 * row['fraction_below_5_deg']:.1f} % < 5 deg, covered {row['covered']['0.9']:.3f}  FSC 0.5 "
                f"{row['fsc_0.5_masked_A']:.2f} A masked, {row['fsc_0.5_unmasked_A']:.2f} unmasked (known poses "
                f"{known['fsc_0.5_masked_A']:.2f}, {known['fsc_0.5_unmasked_A']:.2f})",
                flush=True,
            )
            if arguments.json:
                sets = {n: {"summary": summary(rows[n]), "rows": rows[n]} for n in SETS if n in rows}
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps({"sets": sets}, indent=2) + "\n")
    print(json.dumps({name: summary(r) for name, r in rows.items()}, indent=2))


if __name__ == "__main__":
    main()
