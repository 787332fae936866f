"""A prior in real space: what it does to the error of a map, and whether its intervals still hold the truth; poses known.

    python benchmarks/reproduce/paper002/real_space.py ../shared/data --json benchmarks/results/paper002_real_space.json

Each row is a prior: `fourier` (no mask), `mask` (zero outside a mask around the true map, with 8 pixels to spare) and `non-negative` (besides).
Errors are shares of the map's power: of the whole box, and inside the mask. Covered: share of true coefficients, and of true voxels inside
the mask, in their 90 % intervals; least and most of a shell are of shells 2 to the last but one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import Data, exact, simulate, write
from torch import Tensor

from cryorbit.methods.masked_posterior import masked_posterior
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.masks import mask_from_map

BOX, APIX = 48, 2.2
_NINETY = 1.6449  # standard deviations either side


def row(mean: Tensor, variance: Tensor, voxels: Tensor, truth: Tensor, inside: Tensor) -> dict[str, object]:
    """Errors and coverage of one posterior."""
    off, coverage = mean - truth, interval_coverage(mean, variance, truth)
    shells = coverage.by_shell[2 : BOX // 2]
    held = off.abs() < _NINETY * voxels.sqrt()
    return {
        "error": float(off.square().sum() / truth.square().sum()),
        "error_inside": float(off[inside].square().sum() / truth[inside].square().sum()),
        "covered_90": coverage.overall,
        "covered_90_least_shell": float(shells.min()),
        "covered_90_most_shell": float(shells.max()),
        "covered_90_shells_1_to_4": [float(x) for x in coverage.by_shell[1:5]],
        "covered_90_voxels_inside": float(held[inside].double().mean()),
    }


def rows(data: Data, cell: dict[str, object]) -> list[dict[str, object]]:
    """The three priors on the same images."""
    stack = data.stack(4.0)
    truth, poses = data.true_map(stack), data.known
    inside = mask_from_map(truth, stack.pixel_size) > 0
    cell = cell | {"share_of_box": float(inside.double().mean())}
    found, _ = exact(stack, poses)
    out = [cell | {"prior": "fourier"} | row(found.mean, found.variance, found.volume.voxel_variance(), truth, inside)]
    for name, non_negative in (("mask", False), ("non-negative", True)):
        masked = masked_posterior(
            stack,
            torch.ones(len(stack)),
            poses,
            torch.eye(3)[None],
            inside,
            found.noise,
            found.prior,
            non_negative=non_negative,
        )
        out.append(cell | {"prior": name} | row(masked.mean, masked.variance, masked.voxel_variance, truth, inside))
    return out


def main() -> None:
    """Every cell, a line for each prior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: list[dict[str, object]] = []
    for kind in ("uniform", "preferred", "cone"):
        for snr in (0.5, 0.05):
            for seed in range(arguments.seeds):
                options: dict[str, Any] = {"name": "4ake", "box": BOX, "pixel_size": APIX, "kind": kind, "seed": seed}
                data = simulate(arguments.data, arguments.count, snr, **options)
                cell: dict[str, object] = {"snr": snr, "views": kind, "seed": seed, "images": arguments.count}
                for line in rows(data, cell):
                    found.append(line)
                    print(json.dumps(line), flush=True)
    if arguments.json:
        write(arguments.json, found)


if __name__ == "__main__":
    main()
