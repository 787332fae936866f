"""2-D classes of simulated particles with planted junk: in-plane angles, resolution, and how well junk is told from particles.

    python benchmarks/align2d.py ../shared/data --json benchmarks/results/align2d.json

Images at -10 dB with CTF and shifts of sigma 2 px; a tenth are replaced by junk in equal parts: noise; ice-like blobs (one to five Gaussians
of any place and width, once to twice the root mean square of a particle, through the CTF); halves of the molecule, cut across its longest
axis, in the pose of the particle they replace. The junk score was fixed on 4AKE and not changed for 1AON.
Invariant features are judged by the true views of particles: how far apart those of two classmates lie, of two in a cluster of k-means on
features, as many as there are classes, and of a particle and the nearest by features, as many as it has classmates, and ten; the same by
the true views, which is as near as any can be.
"""

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from cryorbit.groups.point import point_group
from cryorbit.io.mrc_write import StackWriter
from cryorbit.io.particles import new_particles, write_particles
from cryorbit.methods.align2d import Align2DConfig
from cryorbit.metrics.junk import separation
from cryorbit.metrics.poses import in_plane_pair_errors, view_angles
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import disk_to_images, images_to_disk
from cryorbit.physics.shift import phase_ramp
from cryorbit.pipeline.align2d import align2d
from cryorbit.pipeline.config import CLASSES, RunConfig
from cryorbit.simulate.atoms import AtomicModel
from cryorbit.simulate.particles import SimulatedParticles, make_projector, simulate_particles
from cryorbit.simulate.settings import CTFSettings
from cryorbit.simulate.source import open_source

BOX, SNR_DB, SHIFT_PX = 64, -10.0, 2.0
KINDS = ("noise", "blobs", "halves")
NEAR_DEG = 10.0
NEIGHBOURS = 10


@dataclass(frozen=True)
class Molecule:
    """A model, its pixel size and diameter in angstrom, and its symmetry."""

    source: str
    pixel_size: float
    diameter: float
    group: str = "C1"


MOLECULES = {"4AKE": Molecule("4ake", 1.6, 75.0), "1AON": Molecule("models/1aon.pdb.gz", 4.0, 200.0, "C7")}


def half_of(model: AtomicModel) -> AtomicModel:
    """The atoms on one side of the plane across the longest axis."""
    centred = model.positions - model.positions.mean(dim=0)
    axis = torch.linalg.svd(centred.double(), full_matrices=False).Vh[0].to(centred)
    keep = centred @ axis > 0
    return replace(model, positions=model.positions[keep], amplitudes=model.amplitudes[keep], widths=model.widths[keep])


def blob(rms: float, generator: torch.Generator) -> Tensor:
    """One image of smooth blobs."""
    axis = torch.arange(BOX) - BOX // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    total = torch.zeros(BOX, BOX)
    for _ in range(int(torch.randint(1, 6, (1,), generator=generator))):
        width = (0.05 + 0.13 * torch.rand(1, generator=generator)) * BOX
        x0, y0 = 0.2 * BOX * torch.randn(2, generator=generator)
        strength = 0.3 + torch.rand(1, generator=generator)
        total = total + strength * torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * width**2))
    return total * rms * (1 + torch.rand(1, generator=generator)) / total.square().mean().sqrt()


def planted(truth: SimulatedParticles, model: AtomicModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with junk, and the kind of each: 0 a particle, else 1 + its place in KINDS."""
    assert truth.ctf is not None
    count, disk_of = len(truth.images), make_projector(half_of(model), BOX, truth.pixel_size, fast=True)
    whole = make_projector(model, BOX, truth.pixel_size, fast=True)
    gain = float(truth.volume.data.norm() / whole.volume().norm())
    disk = whole.disk
    ctf = ctf_on_disk(truth.ctf, disk, truth.pixel_size)
    rms = float((disk_to_images(whole(truth.poses.rotations[:64]), disk) * gain).square().mean().sqrt())
    order = torch.randperm(count, generator=generator)
    kind = torch.zeros(count, dtype=torch.int64)
    images = truth.images.clone()
    for number, name in enumerate(KINDS, 1):
        for i in order[(number - 1) * count // 30 : number * count // 30].tolist():
            kind[i] = number
            image = torch.randn(BOX, BOX, generator=generator)
            if name == "blobs":
                image = image + disk_to_images(images_to_disk(blob(rms, generator), disk) * ctf[i], disk)
            elif name == "halves":
                shown = disk_of(truth.poses.rotations[i : i + 1]) * gain * ctf[i]
                shift = truth.poses.shifts[i : i + 1] / truth.pixel_size
                image = image + disk_to_images(shown * phase_ramp(shift, disk), disk)[0]
            images[i] = image
    return images, kind


def planted_file(name: str, data: Path, count: int, seed: int, folder: Path) -> tuple[Path, SimulatedParticles, Tensor]:
    """A particle file in ``folder`` with junk in it, the particles as they were before, and the kind of each."""
    molecule = MOLECULES[name]
    source = molecule.source if molecule.source == "4ake" else str(data / molecule.source)
    model = open_source(source)
    assert isinstance(model, AtomicModel)
    truth = simulate_particles(
        model,
        count=count,
        box=BOX,
        pixel_size=molecule.pixel_size,
        snr_db=SNR_DB,
        ctf=CTFSettings(),
        shift_sigma_px=SHIFT_PX,
        fast=True,
        seed=seed,
    )
    images, kind = planted(truth, model, torch.Generator().manual_seed(seed + 7))
    stack = folder / "particles.mrcs"
    with StackWriter(stack, count, BOX, molecule.pixel_size) as writer:
        writer.write(images.numpy())
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(count)]
    ctf = {key: value.numpy() for key, value in vars(truth.ctf).items()}
    write_particles(stack.with_suffix(".star"), new_particles(names, molecule.pixel_size, BOX, ctf))
    return stack.with_suffix(".star"), truth, kind


def measure(name: str, data: Path, count: int, classes: int, seed: int) -> dict[str, object]:
    """Simulate, classify, compare."""
    molecule = MOLECULES[name]
    with tempfile.TemporaryDirectory() as folder:
        file, truth, kind = planted_file(name, data, count, seed, Path(folder))
        config = RunConfig(
            str(file),
            start=CLASSES,
            mask_diameter=molecule.diameter,
            seed=seed,
            align2d=Align2DConfig(classes=classes),
        )
        started = time.process_time()
        found = align2d(config, Path(folder) / "run")
        seconds = time.process_time() - started
    good = kind == 0
    error = torch.rad2deg(
        in_plane_pair_errors(
            found.which[good],
            found.angles[good],
            truth.poses.rotations[good].double(),
            np.deg2rad(NEAR_DEG),
            point_group(molecule.group),
        )
    )
    apart = torch.rad2deg(view_angles(truth.poses.rotations[good].double(), point_group(molecule.group)))
    mates = (found.which[good][:, None] == found.which[good]).fill_diagonal_(False)
    features = found.features[good].double()
    assert truth.ctf is not None
    defocus = truth.ctf.defocus_u[good].double()
    clusters = torch.from_numpy(kmeans2(features.numpy(), classes, iter=100, minit="++", seed=seed)[1])
    clustered = (clusters[:, None] == clusters).fill_diagonal_(False)
    away = torch.cdist(features, features).fill_diagonal_(np.inf)
    as_many = round(float(mates.sum(dim=1).double().mean()))
    views = {"classes": apart[mates], "k_means": apart[clustered]}
    ten = away.topk(NEIGHBOURS, largest=False).indices
    unlike = (defocus[:, None] - defocus).abs()
    for name, number in (("nearest_as_many", as_many), (f"nearest_{NEIGHBOURS}", NEIGHBOURS)):
        views[name] = apart.gather(1, away.topk(number, largest=False).indices)
        views[f"{name}_by_truth"] = apart.topk(number + 1, largest=False).values[:, 1:]
    keys = ("resolution_best_A", "resolution_median_A", "class_sizes", "class_resolution_A")
    return {
        "particles": count,
        "classes": classes,
        "seed": seed,
        "pairs": len(error),
        "in_plane_median_deg": float(error.median()),
        "in_plane_below_5_deg": float((error < 5).double().mean()),
        "defocus_apart_median_A": {
            f"nearest_{NEIGHBOURS}": float(unlike.gather(1, ten).median()),
            "any": float(unlike.median()),
        },
        "views_median_deg": {name: float(values.median()) for name, values in views.items()},
        "views_below_20_deg": {name: float((values < 20).double().mean()) for name, values in views.items()},
        "auc": separation(found.junk[~good], found.junk[good]),
        "auc_of": {k: separation(found.junk[kind == i], found.junk[good]) for i, k in enumerate(KINDS, 1)},
        "flagged_good": float((found.junk[good] > 0).double().mean()),
        "flagged_junk": float((found.junk[~good] > 0).double().mean()),
        "cpu_seconds": seconds,
        **{key: found.metrics[key] for key in keys},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--molecules", nargs="*", default=list(MOLECULES), choices=list(MOLECULES))
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    a = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record: dict[str, object] = {"commit": commit, "device": "cpu", "threads": torch.get_num_threads(), "rows": {}}
    for name in a.molecules:
        row = measure(name, a.data, a.count, a.classes, a.seed)
        record["rows"][name] = row  # type: ignore[index]
        a.json.write_text(json.dumps(record, indent=2) + "\n")
        print(name, json.dumps({k: v for k, v in row.items() if not k.startswith("class_")}), flush=True)


if __name__ == "__main__":
    main()
