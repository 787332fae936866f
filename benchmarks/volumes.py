"""Voxels against a neural field as the map model of refinement, on the same images, poses and halves.

    python benchmarks/volumes.py --json benchmarks/results/volumes.json

Adenylate kinase 4AKE, 64 px at 1.6 A, CTF (300 kV, 2.7 mm, 0.1, defocus 0.8-2.0 um), Gaussian shifts of sigma 2 px. True poses are made
wrong by 6 degrees (root mean square) and 0.7 px along each axis, then refined. Every seed draws new images, poses, noise and errors. Maps
are compared with the truth inside the truth's own mask, as a neural map is zero outside the molecule's; FSC 0.5 is capped at Nyquist, so
the mean FSC over the shells below it is given too. CPU seconds are those of the refinement alone, one thread.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from cryorbit.groups.so3 import exp
from cryorbit.methods.half_maps import halves_from_poses
from cryorbit.methods.refinement import Refinement
from cryorbit.methods.refinement_config import VOLUME_NAMES, RefinementConfig
from cryorbit.metrics.align import align_poses
from cryorbit.metrics.fsc import fsc, last_shell, resolution
from cryorbit.metrics.map_search import align_volumes
from cryorbit.metrics.masks import mask_from_map
from cryorbit.simulate.atoms import model_path, read_model
from cryorbit.simulate.particles import simulate_particles
from cryorbit.simulate.settings import CTFSettings
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run
from cryorbit.types import Poses, Volume

BOX, PIXEL_SIZE, DIAMETER = 64, 1.6, 90.0
WRONG_DEG, WRONG_PX = 6.0, 0.7


def one(snr_db: float, count: int, seed: int) -> list[dict[str, Any]]:
    """Refine one simulated set with every map model."""
    drawn = simulate_particles(
        read_model(model_path("4ake")),
        count=count,
        box=BOX,
        pixel_size=PIXEL_SIZE,
        snr_db=snr_db,
        ctf=CTFSettings(defocus=(8000.0, 20000.0)),
        shift_sigma_px=2.0,
        seed=1000 + seed,
    )
    ctf = {name: value.numpy() for name, value in vars(drawn.ctf).items()}
    stack = FourierStack(ArrayParticles(drawn.images.numpy(), PIXEL_SIZE, ctf), BOX / 2, mask_diameter=DIAMETER)
    generator = torch.Generator().manual_seed(seed)
    turn = exp(math.radians(WRONG_DEG) / 3**0.5 * torch.randn(count, 3, generator=generator))
    rotations = turn @ drawn.poses.rotations.float()
    shifts = drawn.poses.shifts.float() / PIXEL_SIZE + WRONG_PX * torch.randn(count, 2, generator=generator)
    half_set, group = torch.arange(count) % 2 + 1, torch.eye(3)[None]
    halves = halves_from_poses(stack, rotations, shifts, half_set, mask_diameter=DIAMETER, symmetry=group)
    truth = Volume(drawn.volume.data.float(), PIXEL_SIZE)
    mask = mask_from_map(truth.data, PIXEL_SIZE)
    rows = []
    for name in VOLUME_NAMES:
        begun = time.process_time()
        refinement = Refinement(
            stack,
            RefinementConfig(),
            mask_diameter=DIAMETER,
            symmetry=group,
            start=halves.references,
            radius=last_shell(halves.correlation, 0.5),
            candidates=(rotations[:, None], shifts[:, None]),
            half_set=half_set,
            volume=name,
        )
        history: list[dict[str, float | str]] = []

        def keep(stage: str, done: int, total: int, values: dict[str, float | str], kept: list = history) -> None:
            kept.append(values)

        run(refinement, progress=keep)
        seconds = time.process_time() - begun
        found = Poses(refinement.poses[0].double(), refinement.poses[1].double() * PIXEL_SIZE)
        error = torch.rad2deg(align_poses(found, drawn.poses).error)
        aligned = align_volumes(Volume(refinement.tensors["map"], PIXEL_SIZE), truth).map.data
        curve = fsc(aligned * mask, truth.data * mask)
        row = {
            "volume": name,
            "snr_db": snr_db,
            "count": count,
            "seed": seed,
            "cpu_seconds": seconds,
            "sweeps": len(history),
            "median_deg": float(error.median()),
            "mean_deg": float(error.mean()),
            "fsc_0.5_A": resolution(curve, 0.5, BOX, PIXEL_SIZE),
            "mean_fsc": float(curve[1 : BOX // 2].mean()),
            **({"misfit": history[-1]["misfit"]} if "misfit" in history[-1] else {}),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, object]:
    """Mean and standard deviation over the seeds of each cell."""
    out: dict[str, object] = {}
    for snr_db in sorted({row["snr_db"] for row in rows}, reverse=True):
        for name in VOLUME_NAMES:
            cell = [row for row in rows if row["snr_db"] == snr_db and row["volume"] == name]
            if cell:
                keys = ("median_deg", "mean_deg", "fsc_0.5_A", "mean_fsc", "cpu_seconds")
                values = {key: [float(row[key]) for row in cell] for key in keys}
                stats = {k: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for k, v in values.items()}
                out[f"{snr_db:g} dB, {name}"] = {"runs": len(cell), "mean_and_sd": stats}
    return out


def main() -> None:
    """Run the seeds at every SNR, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snr", type=float, nargs="+", default=[-10.0, -15.0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"commit": commit, "device": f"CPU, 1 thread, {platform.machine()}", "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for snr_db in arguments.snr:
            rows += one(snr_db, arguments.count, seed)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                stored = {"about": about, "summary": summary(rows), "rows": rows}
                arguments.json.write_text(json.dumps(stored, indent=2) + "\n")
    print(json.dumps(summary(rows), indent=2))


if __name__ == "__main__":
    main()
