"""Pictures learnt from particles alone (``methods/particle_pictures.py``) on the sets of ``align2d.py``: in-plane angles, views, averages.

    python benchmarks/particle_pictures.py ../shared/data --json benchmarks/results/particle_pictures.json \
        --picture docs/images/particle_pictures.png

The same 5,000 particles at -10 dB with CTF, shifts and planted junk as ``align2d.py`` simulates for seed 0, so its numbers stand beside these.
In-plane angles are compared between all pairs of particles whose true views lie within 10 degrees, of ``PAIRED`` particles, in one frame
for all; and, as there, between those of one class, the classes being clusters of k-means on the learnt features. Averages of these clusters
(CTF-weighted, poses refined in halves) are made from the learnt angles and shifts as ``align2d`` makes them of its classes. The settings were
chosen on seed 0; ``--seeds`` adds others.
"""

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from align2d import BOX, MOLECULES, NEAR_DEG, NEIGHBOURS, planted_file
from cryorbit.groups.point import point_group
from cryorbit.methods.class_averages import ClassAverages, ClassAveragesConfig
from cryorbit.methods.particle_pictures import ParticlePictures, ParticlePicturesConfig
from cryorbit.metrics.fsc import resolution
from cryorbit.metrics.poses import in_plane_pair_errors, view_angles
from cryorbit.pipeline.config import CLASSES, RunConfig
from cryorbit.pipeline.inputs import prepare
from cryorbit.pipeline.start import fourier_stack
from cryorbit.report.style import DENSITY, bare, figure, png, write_bytes
from cryorbit.training.loop import run

PAIRED = 1500
SHOWN = 12


def measure(
    name: str, data: Path, count: int, classes: int, seed: int, config: ParticlePicturesConfig
) -> tuple[dict[str, object], Tensor]:
    """Simulate, learn, compare; and the first particles beside what is made of them."""
    molecule = MOLECULES[name]
    group = point_group(molecule.group)
    with tempfile.TemporaryDirectory() as folder:
        file, truth, kind = planted_file(name, data, count, seed, Path(folder))
        settings = RunConfig(str(file), start=CLASSES, mask_diameter=molecule.diameter, seed=seed, contrast="light")
        inputs = prepare(settings)
        periods = BOX * molecule.pixel_size / molecule.diameter
        stack = fourier_stack(settings, inputs, float(round(config.periods * periods)))
        started = time.process_time()
        method = ParticlePictures(stack, config, mask_diameter=molecule.diameter, seed=seed)
        run(method)
        seconds = time.process_time() - started
        seen = method.canonical(torch.arange(count))
        features = seen.features.double()
        clusters = torch.from_numpy(kmeans2(features.numpy(), classes, iter=100, minit="++", seed=seed)[1]).long()
        full = fourier_stack(settings, inputs)
        averages = ClassAverages(
            full,
            ClassAveragesConfig(),
            classes=classes,
            which=clusters,
            angles=seen.angles,
            shifts_px=seen.shifts * (stack.pixel_size / full.pixel_size),
            half_set=inputs.half_set,
            mask_diameter=molecule.diameter,
        )
        run(averages)
        shown = full.raw(torch.nonzero(kind == 0)[:SHOWN, 0])
    good = kind == 0
    rotations, within = truth.poses.rotations[good].double(), np.deg2rad(NEAR_DEG)

    def pairs(which: Tensor, angles: Tensor, rows: slice) -> dict[str, float]:
        errors = torch.rad2deg(in_plane_pair_errors(which[rows], angles[good][rows], rotations[rows], within, group))
        return {
            "pairs": len(errors),
            "median_deg": float(errors.median()),
            "below_5_deg": float((errors < 5).double().mean()),
        }

    apart, own = torch.rad2deg(view_angles(rotations, group)), features[good]
    mates = (clusters[good][:, None] == clusters[good]).fill_diagonal_(False)
    away = torch.cdist(own, own).fill_diagonal_(torch.inf)
    reached = [resolution(curve, 0.143, BOX, molecule.pixel_size) for curve in averages.correlation]
    row: dict[str, object] = {
        "particles": count,
        "seed": seed,
        "config": asdict(config),
        "in_one_frame": pairs(torch.zeros(int(good.sum())), seen.angles, slice(PAIRED)),
        "in_clusters": pairs(clusters[good], seen.angles, slice(None)),
        "in_clusters_refined": pairs(clusters[good], averages.angles, slice(None)),
        "views_median_deg": {
            "k_means": float(apart[mates].median()),
            f"nearest_{NEIGHBOURS}": float(apart.gather(1, away.topk(NEIGHBOURS, largest=False).indices).median()),
        },
        "resolution_median_A": sorted(reached)[classes // 2],
        "resolution_best_A": min(reached),
        "noise_over_truth": float(method.noise[1 : method.radius + 1].mean() / (stack.scale * BOX) ** 2),
        "cpu_seconds": seconds,
    }
    pictures = seen.pictures[good][:SHOWN]
    return row, torch.stack([torch.nn.functional.interpolate(x[None], BOX)[0] for x in (shown, pictures)])


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Particles, and below each its picture."""
    made = figure(0.8 * SHOWN, 1.7 * len(found) + 0.2)
    grid = made.subplots(2 * len(found), SHOWN, squeeze=False)
    lines = [(name, block) for name, blocks in found.items() for block in blocks]
    for (name, block), line in zip(lines, grid, strict=True):
        for axes, picture in zip(line, block, strict=True):
            bare(axes)
            axes.imshow(picture, cmap=DENSITY)
        line[0].set_ylabel(name, fontsize=8)
    write_bytes(path, png(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--molecules", nargs="*", default=list(MOLECULES), choices=list(MOLECULES))
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    a = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record: dict[str, object] = {"commit": commit, "device": "cpu", "threads": torch.get_num_threads(), "rows": {}}
    shown: dict[str, Tensor] = {}
    for name in a.molecules:
        for seed in a.seeds:
            row, pictures = measure(name, a.data, a.count, a.classes, seed, ParticlePicturesConfig())
            shown.setdefault(name, pictures)
            record["rows"].setdefault(name, {})[str(seed)] = row  # type: ignore[attr-defined]
            a.json.write_text(json.dumps(record, indent=2) + "\n")
            print(name, json.dumps(row), flush=True)
            if a.picture:
                draw(shown, a.picture)


if __name__ == "__main__":
    main()
