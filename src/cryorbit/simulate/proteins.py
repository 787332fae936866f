"""Random molecules that look like proteins at 10 angstrom and coarser: material to train on, drawn fresh, no atom of a real molecule in it.

One to five ellipsoidal domains that touch, each filled with straight rods of residues, one bead a residue: helices of 7 to 19 (1.5 angstrom
a residue) and strands of 4 to 8 (3.3). Of forty places for the next rod, which begins 5 to 11 angstrom from the end of the last, the one
that stays best inside its domain and at least 8 angstrom away from what is there is taken. A domain has 135 cubic angstrom for each residue
(1.23 per dalton, 110 dalton a residue), so that its radius of gyration follows its mass, near the ``2.2 N^0.38`` angstrom of compact chains
(1AKE, 3WIP and 6VXX: 0.96 to 1.04 of it).
"""

import math
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.groups.so3 import random_rotations
from cryorbit.simulate.orientations import random_directions
from cryorbit.volumes.ball import BallBasis

_ROOM = 135.0  # cubic angstrom of a residue
_APART = 8.0  # angstrom between rods
_PLACES = 40  # tried for each rod
_BLUR = 2.8  # angstrom, standard deviation of a residue
_BLOCK = 32  # molecules evaluated at a time


@dataclass(frozen=True)
class Proteins:
    """Family of molecules.

    Attributes
    ----------
    domains
        Fewest and most.
    residues
        Of a domain, fewest and most; drawn with uniform logarithm.
    most
        Of a molecule: larger ones are scaled down, every domain to 20 residues at least.
    fill
        Smallest and largest distance of the farthest residue from the centre of mass, over the radius of the ball it is put in.

    Raises
    ------
    ConfigError
        CONF345 a range that is empty or out of bounds.
    """

    domains: tuple[int, int] = (1, 5)
    residues: tuple[int, int] = (30, 200)
    most: int = 600
    fill: tuple[float, float] = (0.6, 0.92)

    def __post_init__(self) -> None:
        good = 1 <= self.domains[0] <= self.domains[1] and 20 <= self.residues[0] <= self.residues[1]
        if not (good and self.most >= 20 * self.domains[1] and 0 < self.fill[0] <= self.fill[1] <= 1):
            raise ConfigError(
                "CONF345",
                f"{self} is no family of molecules",
                "1 <= fewest <= most domains, 20 <= fewest <= most residues, 20 residues for each domain, fill within (0, 1]",
            )

    def draw(self, generator: torch.Generator) -> Float[Tensor, "n 3"]:
        """Residues of one molecule in angstrom about their centre of mass, float64."""
        count = int(torch.randint(self.domains[0], self.domains[1] + 1, (1,), generator=generator))
        low, high = (math.log(x) for x in self.residues)
        sizes = torch.exp(low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64))
        sizes = (sizes * min(1.0, self.most / float(sizes.sum()))).floor().clamp(min=20).long()
        shapes, centres = _domains(sizes, generator)
        n = int(sizes.sum())
        helix = torch.rand(n, generator=generator) < 0.2 + 0.7 * torch.rand(1, generator=generator)
        longest = torch.where(helix, 19, 8)
        shortest = torch.where(helix, 7, 4)
        lengths = shortest + (torch.rand(n, generator=generator) * (longest - shortest + 1)).long()
        jumps = random_directions(n * _PLACES, generator) * (
            5 + 6 * torch.rand(n * _PLACES, 1, generator=generator, dtype=torch.float64)
        )
        along = random_directions(n * _PLACES, generator)
        out = np.empty((n, 3))
        places = torch.cat([jumps, along], dim=1).view(n, _PLACES, 6)
        rise = torch.where(helix, 1.5, 3.3)
        _pack(*(x.numpy() for x in (shapes, centres, sizes, places, lengths, rise)), out)
        return torch.from_numpy(out - out.mean(axis=0))

    def coefficients(self, basis: BallBasis, count: int, generator: torch.Generator) -> Float[Tensor, "count n"]:
        """Molecules of mass 1 in a basis of the ball, each at a size of its own, float32."""
        blocks = []
        for start in range(0, count, _BLOCK):
            drawn = [self.draw(generator) for _ in range(min(_BLOCK, count - start))]
            low, high = self.fill
            fill = low + (high - low) * torch.rand(len(drawn), generator=generator, dtype=torch.float64)
            pixels = [float(x.norm(dim=1).max() / (f * basis.radius)) for x, f in zip(drawn, fill, strict=True)]
            points = torch.cat([x / pixel for x, pixel in zip(drawn, pixels, strict=True)])
            values = basis.values(points.numpy()).split([len(x) for x in drawn])
            blocks += [
                v.mean(dim=0) * torch.exp(-0.5 * (basis.wavenumbers * _BLUR / pixel).square())
                for v, pixel in zip(values, pixels, strict=True)
            ]
        return torch.stack(blocks).float()


def _domains(sizes: Tensor, generator: torch.Generator) -> tuple[Float[Tensor, "d 3 3"], Float[Tensor, "d 3"]]:
    """Ellipsoids ``|A (x - c)| < 1``: each touches an earlier one, and the others as little as eight trials allow."""
    count = len(sizes)
    radii = (3 * _ROOM * sizes.double() / (4 * math.pi)) ** (1 / 3)
    ratio = torch.exp(0.3 * torch.randn(count, 3, generator=generator, dtype=torch.float64))
    axes = radii[:, None] * ratio / ratio.prod(dim=1, keepdim=True) ** (1 / 3)
    shapes = random_rotations(count, generator).double() / axes[:, :, None]
    centres = torch.zeros(count, 3, dtype=torch.float64)
    for i in range(1, count):
        parent = int(torch.randint(i, (1,), generator=generator))
        u = random_directions(8, generator)
        reach = sum(1 / (u @ shapes[j].mT).norm(dim=1, keepdim=True) for j in (parent, i))
        places = centres[parent] + 0.95 * reach * u
        gaps = (places[:, None] - centres[:i]).norm(dim=2) - radii[:i] - radii[i]
        gaps[:, parent] = 0.0
        centres[i] = places[gaps.amin(dim=1).argmax()]
    return shapes, centres


@njit(cache=True, nogil=True)
@no_type_check
def _pack(shapes, centres, sizes, places, lengths, rise, out):
    """Fill ``out`` (N, 3) rod by rod; ``places`` (N, P, 6) holds for each rod the jumps to its start and its directions."""
    n, rod = 0, 0
    for d in range(len(sizes)):
        a, c, left = shapes[d], centres[d], sizes[d]
        while left > 0:
            k = min(left, lengths[rod])
            least, best, sx, sy, sz = 1e30, 0, 0.0, 0.0, 0.0
            for t in range(places.shape[1]):
                v = places[rod, t]
                if n == 0:
                    x0, y0, z0 = c[0] - v[3], c[1] - v[4], c[2] - v[5]
                else:
                    x0, y0, z0 = out[n - 1, 0] + v[0], out[n - 1, 1] + v[1], out[n - 1, 2] + v[2]
                cost = 0.0
                for b in range(0, k, 2):
                    x = x0 + b * rise[rod] * v[3]
                    y = y0 + b * rise[rod] * v[4]
                    z = z0 + b * rise[rod] * v[5]
                    p, q, r = x - c[0], y - c[1], z - c[2]
                    reach = 0.0
                    for i in range(3):
                        reach += (a[i, 0] * p + a[i, 1] * q + a[i, 2] * r) ** 2
                    cost += 80.0 * max(0.0, math.sqrt(reach) - 1.0)
                    for i in range(0, n - 2, 2):
                        square = (x - out[i, 0]) ** 2 + (y - out[i, 1]) ** 2 + (z - out[i, 2]) ** 2
                        if square < _APART * _APART:
                            cost += 0.1 * (_APART - math.sqrt(square)) ** 2
                    if cost > least:
                        break
                if cost < least:
                    least, best, sx, sy, sz = cost, t, x0, y0, z0
            v = places[rod, best]
            for b in range(k):
                step = b * rise[rod]
                out[n, 0], out[n, 1], out[n, 2] = sx + step * v[3], sy + step * v[4], sz + step * v[5]
                n += 1
            left -= k
            rod += 1
