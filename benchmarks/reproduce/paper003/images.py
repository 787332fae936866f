"""Tables 2 and 3 of Khoo, Paul and Sharon 2023: a map from the first two moments of particle images.

    python benchmarks/reproduce/paper003/images.py --json benchmarks/results/paper003_images.json

gaussians: a mixture of four Gaussians not in one plane in 25^3 voxels of 1 A, as in the paper, which gives no widths (ours: standard deviations
1.2 to 1.5 voxels, centres 3 to 5.5 voxels from the origin, weights 0.7 to 1.3). 4ake: adenylate kinase in 32^3 voxels of 3.2 A, or
63^3 of 1.6 A; the paper's molecules (16.86 and 21.52 A in 63^3) are not at hand. Views: a mixture of eight von Mises-Fisher distributions
(kappa 3 to 12, 500 directions drawn from each once), in-plane rotations uniform, white noise at SNR 1 over the whole image, no CTF, no
shifts. Images are made and summed in blocks, never held. Every seed draws map (gaussians), views, noise and starts anew.

Maps are looked for among all in a ball, and among sums of Gaussians (``methods/moment_maps.py``); "third": among Gaussians (4ake: in a
ball, without the penalty), then in a ball with third moments through 64 random filters, of the same images, scaled by the power that the
first block of them shows.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import vonmises_fisher
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.methods.moment_fit import MomentsConfig
from cryorbit.methods.moments import invert_moments
from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.map_search import align_volumes
from cryorbit.physics.cryoem import form_images
from cryorbit.physics.ctf import ctf, ctf_on_disk
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.image_moments import ImageMoments, ImageMomentSums, moments_of_slices, relative_errors
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.slicing import project
from cryorbit.physics.third_moments import ThirdFilters, ThirdMoments, ThirdSums
from cryorbit.simulate.atoms import model_path, read_model
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.settings import CTFSettings
from cryorbit.types import Volume

CASES = {  # side, pixel size, rings, circle
    "gaussians": (25, 1.0, 8, 11.0),
    "4ake": (32, 3.2, 9, 14.0),
    "4ake, 63 px": (63, 1.6, 9, 28.0),
}
_SPARSE = MomentsConfig(view_degree=5, starts=24, kept=4, iterations=300)
_MOLECULE = MomentsConfig(view_degree=5, starts=10, kept=4, iterations=300, margin=2, positivity=0.0)
FAMILIES = {  # case, family: settings; the Gaussians looked for are twice as many as there are
    ("gaussians", "ball"): MomentsConfig(starts=10, kept=3),
    ("gaussians", "gaussians"): replace(_SPARSE, gaussians=8),
    ("4ake", "ball"): MomentsConfig(starts=10, kept=3),
    ("4ake", "gaussians"): replace(_SPARSE, gaussians=24),
    ("gaussians", "third"): replace(_SPARSE, gaussians=8, starts=16),
    ("4ake", "third"): _MOLECULE,
    ("4ake, 63 px", "third"): _MOLECULE,
}
BLOCK = 5000
SNR = 1.0


def molecule(name: str, generator: torch.Generator) -> Tensor:
    """The map of a case."""
    box, pixel_size, _, _ = CASES[name]
    if name.startswith("4ake"):
        return make_projector(read_model(model_path("4ake")), box, pixel_size).volume()
    axis = torch.arange(box).double() - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    centres = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    centres *= torch.tensor([[3.0], [4.0], [5.0], [5.5]]).double() / centres.norm(dim=1, keepdim=True)
    widths, weights = (a + b * torch.rand(4, generator=generator) for a, b in ((1.2, 0.3), (0.7, 0.6)))
    out = torch.zeros(box, box, box, dtype=torch.float64)
    for c, s, w in zip(centres, widths, weights, strict=True):
        out += w * torch.exp(-((x - c[0]) ** 2 + (y - c[1]) ** 2 + (z - c[2]) ** 2) / (2 * s**2))
    return out.float()


def views(seed: int) -> Tensor:
    """(4000, 3, 3) rotations whose third rows are the directions."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(8, 3))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    d = torch.from_numpy(
        np.concatenate(
            [
                vonmises_fisher(m, k).rvs(500, random_state=rng)
                for m, k in zip(means, rng.uniform(3, 12, 8), strict=True)
            ]
        )
    )
    steep = d[:, 2:].abs() < 0.9
    other = torch.where(steep, torch.tensor([[0.0, 0, 1]]).double(), torch.tensor([[1.0, 0, 0]]).double())
    first = torch.linalg.cross(other, d)
    first /= first.norm(dim=1, keepdim=True)
    return torch.stack([first, torch.linalg.cross(d, first), d], dim=1)


@dataclass(frozen=True)
class Optics:
    """What a microscope adds to images of ``pixel_size`` angstrom, seen on the rings of ``basis``: CTFs without astigmatism, shifts.

    ``shift_sigma_px`` is the standard deviation of each coordinate of a shift, which stays in the images.
    """

    basis: PolarBasis
    pixel_size: float
    shift_sigma_px: float = 0.0

    def applied(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images with CTF and shift, and the CTF on the rings."""
        params, disk = CTFSettings().sample(len(images), generator), fourier_disk(self.basis.box)
        moves = self.shift_sigma_px * torch.randn(len(images), 2, generator=generator)
        seen = form_images(images_to_disk(images, disk), moves, disk, ctf_on_disk(params, disk, self.pixel_size))
        ring = torch.arange(self.basis.rings + 1) / (self.basis.box * self.pixel_size)
        return disk_to_images(seen, disk), ctf(params, torch.stack([ring, 0 * ring], dim=1))


def noisy_images(
    volume: Tensor, library: Tensor, count: int, generator: torch.Generator, optics: Optics | None = None
) -> Iterator[tuple[Tensor, float, Tensor | None]]:
    """Blocks of images from views of ``library``, turned at random in the plane, the noise's standard deviation (of the first block), and the
    CTF on rings.
    """
    spin, sd, rings = torch.zeros(BLOCK, 3, dtype=torch.float64), 0.0, None
    for _ in range(count // BLOCK):
        spin[:, 2] = 2 * np.pi * torch.rand(BLOCK, generator=generator, dtype=torch.float64)
        rotations = so3.exp(spin) @ library[torch.randint(len(library), (BLOCK,), generator=generator)]
        images = project(volume, rotations.float())
        if optics is not None:
            images, rings = optics.applied(images, generator)
        sd = sd or float(images.var() / SNR) ** 0.5
        yield images + sd * torch.randn(images.shape, generator=generator), sd, rings


def summed(
    basis: PolarBasis,
    blocks: Iterator[tuple[Tensor, float, Tensor | None]],
    filters: int,
    generator: torch.Generator,
    *,
    errors: bool = False,
) -> tuple[ImageMoments, ThirdMoments | None, float]:
    """Moments of images, with their ``errors``, third ones through so many random filters, if any, and the CPU seconds of summing them."""
    sums, thirds, taken = None, None, 0.0
    for images, sd, rings in blocks:
        begun = time.process_time()
        part = ImageMomentSums.of(basis, images, sd**2, rings, errors=errors)
        sums = part if sums is None else sums + part
        if filters:
            seen = thirds.filters if thirds else ThirdFilters.random(basis, filters, 12, generator, images, rings)
            more = ThirdSums.of(seen, images, sd**2, rings)
            thirds = more if thirds is None else thirds + more
        taken += time.process_time() - begun
    assert sums is not None
    third = None if thirds is None else thirds.debiased(torch.ones(1))
    return sums.debiased(torch.ones(1)), third, taken


def one(name: str, family: str, seed: int, count: int) -> dict[str, Any]:
    """Simulate, sum, invert, compare."""
    box, pixel_size, rings, radius = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    truth, library = molecule(name, generator), views(seed)
    basis = PolarBasis(box, rings, radius)
    blocks = noisy_images(truth, library, count, generator)
    moments, third, summing = summed(basis, blocks, 64 if family == "third" else 0, generator)
    slices = basis.coefficients(project(truth, library.float(), 3))
    exact = moments_of_slices(slices, torch.full((len(library),), 1 / len(library)), basis)
    exact = ImageMoments(exact.first.to(moments.first), exact.second.to(moments.second), basis)
    begun = time.process_time()
    found = invert_moments(moments, FAMILIES[name, family], generator, third)
    inverting = time.process_time() - begun
    aligned = align_volumes(Volume(found.volume.float(), pixel_size), Volume(truth, pixel_size))
    curve = fsc(aligned.map.data, truth)
    return {
        "case": name,
        "family": family,
        "seed": seed,
        "images": count,
        "moments_off": [float(e) for e in relative_errors(moments, exact)],
        "matched_to": found.errors,
        "objective": found.objective,
        "fsc_0.5_A": resolution(curve, 0.5, box, pixel_size),
        "fsc_0.143_A": resolution(curve, 0.143, box, pixel_size),
        "correlation": aligned.correlation,
        "relative_error": float((aligned.map.data - truth).norm() / truth.norm()),
        "summing_cpu_s": summing,
        "inverting_cpu_s": inverting,
    }


def main() -> None:
    """Every case and seed; JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--families", nargs="+", default=["ball", "gaussians", "third"])
    parser.add_argument("--cases", nargs="+", default=["gaussians", "4ake"], choices=list(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    device = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    rows = []
    for name, family in (key for key in FAMILIES if key[0] in arguments.cases and key[1] in arguments.families):
        for seed in range(arguments.seeds):
            rows.append({"commit": commit, "device": device, **one(name, family, seed, arguments.count)})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
