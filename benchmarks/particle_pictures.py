"""Pictures learnt from particles alone (``methods/particle_pictures.py``) on the sets of ``align2d.py``: in-plane angles, views, averages.

    python benchmarks/particle_pictures.py ../shared/data --json benchmarks/results/particle_pictures.json \
        --picture docs/images/particle_pictures.png

The same 5,000 particles at -10 dB with CTF, shifts and planted junk as ``align2d.py`` simulates for seed 0, so its numbers stand beside these.
In-plane angles are compared between all pairs of particles whose true views lie within 10 degrees, of ``PAIRED`` particles, in one frame
for all; and, as there, between those of one class, the classes being clusters of k-means on the learnt features. Averages of these clusters
(CTF-weighted, poses refined in halves) are made from the learnt angles and shifts as ``align2d`` makes them of its classes.
A particle's learnt picture, turned and shifted as it was found, is compared with its true projection by their correlation up to the Fourier
radius of the pictures; so is the average that ``align2d`` makes of its class, which is the picture one has of it otherwise. The settings were
chosen on seed 0; ``--seeds`` adds others.
"""

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from align2d import BOX, MOLECULES, NEAR_DEG, NEIGHBOURS, planted_file
from cryorbit.groups.point import point_group
from cryorbit.methods.align2d import Align2DConfig
from cryorbit.methods.class_averages import ClassAverages, ClassAveragesConfig
from cryorbit.methods.particle_pictures import ParticlePictures, ParticlePicturesConfig
from cryorbit.metrics.fsc import resolution
from cryorbit.metrics.poses import in_plane_pair_errors, view_angles
from cryorbit.physics.fourier import FourierDisk, disk_subset, disk_to_images, fourier_disk
from cryorbit.physics.planar import rotate_images
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.turning import planes_of, turned
from cryorbit.pipeline.align2d import align2d
from cryorbit.pipeline.config import CLASSES, RunConfig
from cryorbit.pipeline.inputs import prepare
from cryorbit.pipeline.start import fourier_stack
from cryorbit.report.style import DENSITY, bare, figure, png, write_bytes
from cryorbit.simulate.particles import make_projector
from cryorbit.training.loop import run

PAIRED = 1500
SHOWN = 12


def correlations(one: Tensor, two: Tensor, disk: FourierDisk) -> dict[str, float]:
    """Of transforms (N, P), pair by pair, without the mean: the median and what one in twenty stays below."""
    a, b = (x * disk.weight.sqrt() * (disk.k_norm > 0) for x in (one, two))
    found = (a.conj() * b).real.sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    return {"median": float(found.median()), "lowest_twentieth": float(found.quantile(0.05))}


def shown_as(pictures: Tensor, which: Tensor, angles: Tensor, shifts_px: Tensor, disk: FourierDisk) -> Tensor:
    """Transforms (N, P) of ``pictures`` [``which``] turned and shifted."""
    planes = planes_of(pictures, disk.radius)
    return turned(planes, angles, disk, which) * phase_ramp(shifts_px, disk)


def measure(
    name: str, data: Path, count: int, classes: int, seed: int, config: ParticlePicturesConfig
) -> tuple[dict[str, object], Tensor]:
    """Simulate, learn, compare; and the first particles, what is made of them, and what is true, in the frame found."""
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
        good, apix = kind == 0, molecule.pixel_size
        shown = full.raw(torch.nonzero(good)[:SHOWN, 0])
        with_classes = replace(settings, align2d=Align2DConfig(classes=classes))
        started = time.process_time()
        found = align2d(with_classes, Path(folder) / "run")
        seconds_of_classes = time.process_time() - started
    small, disk = fourier_disk(stack.box, float(method.radius)), fourier_disk(BOX, float(method.radius))
    assert bool((small.k == disk.k).all())
    projector = make_projector(truth.volume, BOX, apix)
    upright = projector(truth.poses.rotations[good])[:, disk_subset(projector.disk, disk)]
    true = upright * phase_ramp(truth.poses.shifts[good] / apix, disk)
    every = torch.arange(int(good.sum()))
    learnt = shown_as(seen.pictures[good], every, seen.angles[good], seen.shifts[good], small)
    average = shown_as(found.pictures, found.which[good], found.angles[good], found.shifts[good] / apix, disk)
    framed = rotate_images(disk_to_images(upright[:SHOWN], disk), -seen.angles[good][:SHOWN])
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
    reached = [resolution(curve, 0.143, BOX, apix) for curve in averages.correlation]
    row: dict[str, object] = {
        "particles": count,
        "seed": seed,
        "config": asdict(config),
        "in_one_frame": pairs(torch.zeros(int(good.sum())), seen.angles, slice(PAIRED)),
        "in_clusters": pairs(clusters[good], seen.angles, slice(None)),
        "in_clusters_refined": pairs(clusters[good], averages.angles, slice(None)),
        "correlation_with_projections": {
            "radius_A": BOX * apix / method.radius,
            "learnt": correlations(true, learnt, disk),
            "class_averages_of_align2d": correlations(true, average, disk),
        },
        "views_median_deg": {
            "k_means": float(apart[mates].median()),
            f"nearest_{NEIGHBOURS}": float(apart.gather(1, away.topk(NEIGHBOURS, largest=False).indices).median()),
        },
        "resolution_median_A": sorted(reached)[classes // 2],
        "resolution_best_A": min(reached),
        "noise_over_truth": float(method.noise[1 : method.radius + 1].mean() / (stack.scale * BOX) ** 2),
        "cpu_seconds": seconds,
        "cpu_seconds_of_align2d": seconds_of_classes,
    }
    pictures = seen.pictures[good][:SHOWN]
    return row, torch.stack([torch.nn.functional.interpolate(x[None], BOX)[0] for x in (shown, pictures, framed)])


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Particles, below each its picture, and below that its projection without noise in the same frame."""
    made = figure(0.8 * SHOWN + 0.8, 2.5 * len(found) + 0.2)
    grid = made.subplots(3 * len(found), SHOWN, squeeze=False)
    labels = ("particle", "learnt", "truth")
    lines = [(f"{name}\n{k}", b) for name, blocks in found.items() for k, b in zip(labels, blocks, strict=True)]
    for (name, block), line in zip(lines, grid, strict=True):
        for axes, picture in zip(line, block, strict=True):
            bare(axes)
            axes.imshow(picture, cmap=DENSITY)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
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
