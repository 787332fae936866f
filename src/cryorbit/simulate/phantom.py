"""An object that needs no file: a few Gaussian blobs, asymmetric, with exact projections by the same code as atoms."""

import math

import torch

from cryorbit.simulate.atoms import AtomicModel


def phantom(radius: float = 30.0, blobs: int = 12, width: float = 5.0, seed: int = 0) -> AtomicModel:
    """An asymmetric object of Gaussian blobs within ``radius`` angstrom of its centre of mass.

    Blob positions are uniform in a ball stretched 1 : 0.75 : 0.55, weights are between 0.5 and 1.5, so neither a
    symmetry nor a mirror image fits it. Each blob is ``w exp(-|x|^2 / (2 sigma^2))`` in space, normalised to integral
    w.

    Parameters
    ----------
    radius
        Angstrom from the centre to the farthest blob.
    blobs
        How many.
    width
        Sigma of each blob in angstrom.
    seed
        Another seed is another object.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(blobs, 3, generator=generator, dtype=torch.float64)
    distance = torch.rand(blobs, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
    positions = direction / direction.norm(dim=-1, keepdim=True) * distance * torch.tensor([1.0, 0.75, 0.55])
    weight = 0.5 + torch.rand(blobs, 1, generator=generator, dtype=torch.float64)
    positions = positions - (weight * positions).sum(0) / weight.sum()
    positions = positions * (radius / positions.norm(dim=-1).max())
    widths = torch.full((blobs, 1), 8 * math.pi**2 * width**2, dtype=torch.float64)
    return AtomicModel(positions, weight, widths, "phantom")
