"""Which number is the posterior variance of a coefficient: mean squared error over prediction, for random maps drawn from the prior.

    python benchmarks/reproduce/paper002/variances.py

`used`: `posterior_variance`. `mean field`: the inverse of the precision's diagonal, which papers/002's diagonal Gaussian converges to.
"""

import json

import torch

from cryorbit.metrics.fsc import shell_sum
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.fourier import fourier_disk, shell_index, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball, corrected_mean, information, posterior_mean, posterior_variance
from cryorbit.physics.slicing import insert_slices, slice_grid, slicing_grid
from cryorbit.simulate.orientations import Orientations

BOX, VIEWS, MAPS = 32, 1000, 12


def main() -> None:
    """A line for each distribution of views and each prior, least and most over shells 3 to 14."""
    generator, disk = torch.Generator().manual_seed(0), fourier_disk(BOX)
    mask, shells = soft_sphere(BOX, 0.36 * BOX), shell_index(BOX)
    ones, noise = torch.ones(VIEWS, len(disk)), torch.ones(BOX // 2 + 1)
    for kind in ("uniform", "cone"):
        rotations = Orientations(kind).sample(VIEWS, generator)
        for precision in (30.0, 1.0):
            prior, found = torch.full((BOX // 2 + 1,), 1 / precision), torch.zeros(BOX, BOX, BOX // 2 + 1)
            for _ in range(MAPS):
                truth = torch.randn(BOX, BOX, BOX, generator=generator) * mask
                truth = truth / (precision * mask.square().sum()).sqrt()
                white = torch.randn(VIEWS, len(disk), dtype=torch.complex64, generator=generator)
                images = slice_grid(slicing_grid(truth, disk.radius, 3), rotations, disk) + white
                acc = insert_slices(images, ones, rotations, disk)
                mean, variance = posterior_mean(acc, noise, prior), posterior_variance(acc, noise, prior)
                left = images - slice_grid(slicing_grid(mean, disk.radius), rotations, disk)
                mean = corrected_mean(mean, variance, insert_slices(left, ones, rotations, disk), noise, prior)
                found += volume_to_fourier(mean - truth).abs().square() / MAPS
            kept = ball(BOX, BOX / 2)
            row: dict[str, object] = {"views": kind, "prior_precision": precision}
            for name, predicted in (("used", variance), ("mean_field", kept / (information(acc) + precision))):
                ratio = shell_sum(found * kept, shells, BOX) / shell_sum(predicted, shells, BOX)
                row[name] = [float(ratio[3:15].min()), float(ratio[3:15].max())]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
