"""What papers/002 section 7 asks for: models compared by the likelihood of images they have not seen; poses known.

    python benchmarks/reproduce/paper002/criticism.py ../shared/data --json benchmarks/results/paper002_criticism.json

GroEL-GroES (1AON, C7 about z), every other image held out. `models`: nats per image over noise of the images' own spectrum, and how far each
model lies below the first, with the standard error of that difference over images. `bound`: the importance-weighted bound with draws
of the map, below the closed form that all other rows use.
"""

import argparse
import json
from pathlib import Path

import torch
from common import Data, half, simulate, write
from torch import Tensor

from cryorbit.groups.point import point_group
from cryorbit.methods.held_out import HeldOut, held_out, without_background
from cryorbit.methods.map_posterior import MapPosterior, map_posterior, standard_normal
from cryorbit.methods.masked_posterior import masked_posterior
from cryorbit.metrics.held_out import effective_samples, importance_weighted
from cryorbit.metrics.masks import mask_from_map, soft_sphere
from cryorbit.physics.cryoem import forward
from cryorbit.physics.noise import log_likelihood
from cryorbit.physics.slicing import slicing_grid
from cryorbit.poses.proposals import PoseProposals
from cryorbit.training.dataset import FourierStack
from cryorbit.volumes.gaussian import GaussianVolume

DRAWS = 256
BOUNDED = 50  # images whose bound is measured


def score(data: Data, stack: FourierStack, volume: GaussianVolume, noise: Tensor) -> HeldOut:
    """The images with odd numbers."""
    unseen = half(data.known, 1)
    proposals = PoseProposals.known(unseen.rotations, unseen.shifts)
    return held_out(stack, unseen.particle, proposals, volume, noise)


def models(data: Data, stack: FourierStack) -> dict[str, HeldOut]:
    """Every model's score, the one that made the images first."""
    trained, one = half(data.known, 0), torch.ones(len(stack))

    def made(group: str, prior: Tensor | None = None) -> MapPosterior:
        return map_posterior(stack, one, trained, point_group(group).float(), prior)

    right = made("C7")
    plain = made("C1")
    out = {"C7": score(data, stack, right.volume, right.noise)}
    out["C7 without its variance"] = score(data, stack, GaussianVolume.from_map(right.mean), right.noise)
    for factor in (0.5, 0.9, 1.1, 2.0):
        out[f"C7, noise x {factor:g}"] = score(data, stack, right.volume, factor * right.noise)
    for group in ("C6", "C14", "D7"):
        wrong = made(group)
        out[group] = score(data, stack, wrong.volume, wrong.noise)
    out["C1"] = score(data, stack, plain.volume, plain.noise)
    standard = made("C1", standard_normal(stack.box))
    out["C1, standard normal prior"] = score(data, stack, standard.volume, standard.noise)
    molecule = mask_from_map(data.truth.volume.data, data.truth.pixel_size)
    tight = soft_sphere(stack.box, 0.2 * stack.box)
    for name, mask in (("mask of the molecule", molecule), ("mask that cuts the molecule", tight)):
        inside = masked_posterior(stack, one, trained, torch.eye(3)[None], mask > 0, plain.noise, plain.prior)
        out[f"C1, {name}"] = score(data, stack, inside.volume, plain.noise)
    return out


@torch.no_grad()
def bound(data: Data, stack: FourierStack) -> list[dict[str, object]]:
    """The importance-weighted bound with 1, 16 and all draws of the map, less the closed form."""
    found = map_posterior(stack, torch.ones(len(stack)), half(data.known, 0), torch.eye(3)[None])
    unseen = half(data.known, 1).rows(torch.arange(len(stack) // 2) < BOUNDED)
    proposals = PoseProposals.known(unseen.rotations, unseen.shifts)
    closed = held_out(stack, unseen.particle, proposals, found.volume, found.noise).log_density
    images, ctf = stack.images(unseen.particle), stack.ctf(unseen.particle)
    noise, generator, terms = found.noise[stack.disk.shell] / stack.box**2, torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        grid = slicing_grid(found.volume.draw(generator), stack.disk.radius)
        predicted = forward(grid, unseen.rotations, unseen.shifts, stack.disk, ctf)
        terms.append(log_likelihood(images, predicted, noise, without_background(stack.disk)).double())
    weights = torch.stack(terms, dim=1)
    rows: list[dict[str, object]] = []
    for count in (1, 16, DRAWS):
        below = importance_weighted(weights.view(BOUNDED, -1, count)).mean(dim=1) - closed
        effective = effective_samples(weights[:, :count]).median()
        rows.append({"draws": count, "below_closed_form": float(below.mean()), "effective": float(effective)})
    return rows


def main() -> None:
    """Both, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--snr", type=float, default=0.04)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = simulate(arguments.data, arguments.count, arguments.snr, box=64, pixel_size=5.6)
    stack = data.stack(4.0)
    cell: dict[str, object] = {"images": arguments.count, "snr": arguments.snr}
    found, rows = models(data, stack), []
    first = found["C7"]
    for name, own in found.items():
        below, error = own.beside(first)
        row = cell | {"model": name, "gain": own.gain, "gain_error": own.gain_error, "below_first": below}
        row |= {"below_error": error, "residual": float(own.residual[2:31].mean())}
        rows.append(row)
        print(json.dumps(row), flush=True)
    for row in bound(data, stack):
        rows.append(cell | row)
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
