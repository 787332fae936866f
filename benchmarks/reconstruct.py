"""Ab initio to final map on simulated sets, several seeds, beside the known-pose reconstruction of the same images (the ceiling).

    python benchmarks/reconstruct.py N --seeds 3
    python benchmarks/reconstruct.py R --seeds 3

N: adenylate kinase 4AKE, 5,000 images of 64 px at 1.6 A, 0 dB, no CTF, no shifts. R: the same at -10 dB with CTF (300 kV, 2.7 mm, 0.1,
defocus 0.8-2.0 um) and Gaussian shifts of sigma 2 px. Every seed draws new images, poses, noise and a new random start. A seed fails when the
pipeline raises or ends above 30 degrees median error; failures stay in the means.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from cryorbit.io.mrc import read_volume
from cryorbit.io.particles import ParticleSet, open_particles
from cryorbit.methods.half_maps import known_pose_map
from cryorbit.metrics.align import align_poses
from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.map_search import align_volumes
from cryorbit.metrics.masks import mask_from_map
from cryorbit.pipeline.config import RunConfig, override, preset
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.simulate.atoms import model_path, read_model
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses, Volume

SETS = {
    "N": {"snr_db": 0.0, "ctf": None, "shift_sigma_px": 0.0},
    "R": {"snr_db": -10.0, "ctf": CTFSettings(defocus=(8000.0, 20000.0)), "shift_sigma_px": 2.0},
}
DIAMETER = 90.0


def against_truth(volume: Volume, truth: Volume, mask: torch.Tensor) -> dict[str, float]:
    """FSC of an aligned map with the truth, at 0.5 and 0.143, masked by the truth's own mask and not."""
    out = {}
    for name, m in (("masked", mask), ("unmasked", torch.ones_like(mask))):
        curve = fsc(volume.data * m, truth.data * m)
        for threshold in (0.5, 0.143):
            out[f"fsc_{threshold}_{name}_A"] = resolution(curve, threshold, truth.box, truth.pixel_size)
    return out


def ceiling(particles: ParticleSet, poses: Poses, diameter: float = DIAMETER) -> Volume:
    """The same images inserted at their true poses by the same code."""
    stack = FourierStack(particles, 0.5 * particles.box, mask_diameter=diameter)
    half_set = torch.arange(len(particles)) % 2 + 1
    shifts = poses.shifts.float() / particles.pixel_size
    return Volume(known_pose_map(stack, poses.rotations.float(), shifts, half_set, diameter), particles.pixel_size)


def one(name: str, seed: int, count: int, settings: list[str]) -> dict[str, object]:
    """Simulate, reconstruct from the files, evaluate."""
    projector = make_projector(read_model(model_path("4ake")), 64, 1.6)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        write_simulation(source, projector, SimulationSettings(count=count, seed=1000 + seed, **SETS[name]))
        config = RunConfig(particles=str(source / "particles.star"), mask_diameter=DIAMETER, seed=seed)
        wall, cpu = time.perf_counter(), time.process_time()
        result = reconstruct(override(preset(config), settings), Path(folder) / "run")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        data, pixel_size = read_volume(source / "truth.mrc")
        truth = Volume(torch.from_numpy(data), pixel_size)
        particles = open_particles(source / "truth.star")
        true = Poses(torch.from_numpy(particles.rotations), torch.from_numpy(particles.shifts))
        known = ceiling(particles, true)
    mask = mask_from_map(truth.data, pixel_size)
    aligned = align_volumes(result.map, truth)
    return {
        "set": name,
        "seed": seed,
        "seconds": wall,
        "cpu_seconds": cpu,
        **asdict(align_poses(result.poses, true).summary(pixel_size)),
        **against_truth(aligned.map, truth, mask),
        "known_poses": against_truth(known, truth, mask),
        "half_maps_A": result.metrics["resolution_A"],
        "half_maps_masked_A": result.metrics["resolution_masked_A"],
    }


def main() -> None:
    """Run the seeds, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--set-value", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        row = one(arguments.set, seed, arguments.count, arguments.set_value)
        rows.append(row)
        known = row["known_poses"]
        print(
            f"{row['set']} seed {seed}: {row['seconds']:.0f} s ({row['cpu_seconds']:.0f} CPU-s)  poses {row['median_deg']:.2f} deg median, "
            f"{row['mean_deg']:.2f} mean, {100 * row['fraction_below_5_deg']:.1f} % < 5 deg  FSC 0.5 {row['fsc_0.5_masked_A']:.2f} A masked, "
            f"{row['fsc_0.5_unmasked_A']:.2f} unmasked (known poses {known['fsc_0.5_masked_A']:.2f}, {known['fsc_0.5_unmasked_A']:.2f})",
            flush=True,
        )
    summary: dict[str, object] = {"failures": sum(r["median_deg"] > 30 for r in rows), "runs": len(rows)}
    for key in ("median_deg", "mean_deg", "fsc_0.5_masked_A", "fsc_0.5_unmasked_A", "seconds", "cpu_seconds"):
        values = [float(r[key]) for r in rows]
        summary[key] = {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
    print(json.dumps(summary, indent=2))
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        about = {
            "commit": commit,
            "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
            "torch": torch.__version__,
            "peak_rss_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"about": about, "summary": summary, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
