"""A made-up run folder, written without torch."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cryorbit.conventions import euler_to_matrix
from cryorbit.io.mrc import StackWriter, write_volume
from cryorbit.io.particles import new_particles, write_particles

BOX, PIXEL_SIZE, COUNT = 32, 2.0, 400
RESOLUTION = 7.43


def blob(box: int) -> np.ndarray:
    """An asymmetric density of a few Gaussian balls."""
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    balls = [(0.0, 0.0, 0.0, 3.0), (6.0, 2.0, 1.0, 2.0), (-4.0, 5.0, 3.0, 2.0), (1.0, -6.0, -4.0, 2.5)]
    return sum(np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / (2 * s**2)) for a, b, c, s in balls).astype(
        np.float32
    )


def fabricate_run(folder: Path) -> Path:
    """Every file of a finished run, with made-up numbers."""
    rng = np.random.default_rng(4)
    folder.mkdir(parents=True, exist_ok=True)
    volume = blob(BOX)
    write_volume(folder / "map.mrc", volume + 0.02 * rng.standard_normal(volume.shape).astype(np.float32), PIXEL_SIZE)
    with StackWriter(folder / "stack.mrcs", COUNT, BOX, PIXEL_SIZE) as writer:
        writer.write(rng.standard_normal((COUNT, BOX, BOX)).astype(np.float32))
    angles = np.stack(
        [
            rng.uniform(-180, 180, COUNT),
            np.degrees(np.arccos(rng.uniform(-1, 1, COUNT) ** 3)),
            rng.uniform(-180, 180, COUNT),
        ],
        -1,
    )
    names = [f"{i + 1:06d}@{folder / 'stack.mrcs'}" for i in range(COUNT)]
    particles = new_particles(names, PIXEL_SIZE, BOX)
    write_particles(
        folder / "particles.star", particles, rotations=euler_to_matrix(angles), shifts=np.zeros((COUNT, 2))
    )
    shells = np.arange(BOX // 2 + 1)
    curve = 1 / (1 + np.exp((shells - 8) / 1.2))
    with (folder / "fsc.csv").open("w", newline="") as stream:
        writer_csv = csv.writer(stream)
        writer_csv.writerow(["shell", "spatial_frequency_1_per_A", "resolution_A", "fsc", "fsc_masked"])
        for s in shells:
            frequency = s / (BOX * PIXEL_SIZE)
            masked = 1 / (1 + np.exp((s - 9.5) / 1.1))
            writer_csv.writerow(
                [s, f"{frequency:.6f}", f"{1 / frequency:.4f}" if s else "", f"{curve[s]:.5f}", f"{masked:.5f}"]
            )
    metrics = {
        "status": "The half maps of 400 particles agree to 7.4 A; repeat with another seed before you build on it.",
        "resolution_A": 8.21,
        "resolution_masked_A": RESOLUTION,
        "pixel_size_A": PIXEL_SIZE,
        "box": BOX,
        "particles": COUNT,
        "symmetry": "C1",
        "preset": "fast",
        "seed": 3,
        "seconds": 131.0,
        "stage_seconds": {"abinitio": 100.0, "refine": 31.0},
        "pose_effective_median": 1.37,
        "noise_variance": [float(v) for v in 2.0 + 3.0 / (1 + shells)],
        "background_power": [float(v) for v in 1.9 + 3.0 / (1 + shells)],
        "image_power": [float(v) for v in 2.0 + 30.0 / (1 + shells)],
        "warnings": ["the particles carry no CTF: <unmodulated> images are assumed"],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "provenance.json").write_text(
        json.dumps({"cryorbit": "0.1.0", "command": "cryorbit reconstruct p.star", "torch": "2.13"})
    )
    (folder / "config.toml").write_text('particles = "p.star"\nseed = 3\n')
    records = [
        {"stage": "abinitio", "step": i, "radius": 5 + i / 5, "log_likelihood": -1e5 / (1 + i)} for i in range(40)
    ]
    records += [{"stage": "refine", "step": i, "radius": 13 + i, "pose_change_deg": 3.0 / (1 + i)} for i in range(8)]
    (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    predictions = np.stack([np.roll(volume.sum(axis=i % 3), i, axis=0) for i in range(10)])
    images = predictions + 4 * rng.standard_normal(predictions.shape).astype(np.float32)
    np.savez_compressed(folder / "report_data.npz", images=images, predictions=predictions, indices=np.arange(10) * 37)
    return folder


@pytest.fixture
def fabricate() -> Callable[[Path], Path]:
    """Writes a finished run into a folder."""
    return fabricate_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run for tests that only read it."""
    return fabricate_run(tmp_path_factory.mktemp("report") / "run_7")
