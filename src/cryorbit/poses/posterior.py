"""Posterior of every particle's pose as a few weighted normal distributions on so(3) x R^2, and what one asks of it."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.metrics.align import PoseAlignment, unframed
from cryorbit.types import Poses

_DRAWS = 400
_BLOCK = 1000  # particles whose draws are held at a time
REGIONS = (0.5, 0.68, 0.9, 0.95, 0.99)
_HELD = 1e-9  # of the shifts' unit squared: a variance of shifts that were not fitted


@dataclass(frozen=True)
class PosedParticles:
    """The last word on every particle.

    Attributes
    ----------
    posterior
        Poses, shifts in pixels.
    scale, scale_error
        (N,) how strong the image is relative to the map, and the standard deviation of that number from the image's noise.
    widening
        Factor on the variance of poses for the errors of the maps (:func:`~cryorbit.poses.widening.map_widening`).
    """

    posterior: "PosePosterior"
    scale: Float[Tensor, " n"]
    scale_error: Float[Tensor, " n"]
    widening: float

    @property
    def scale_spread(self) -> float:
        """Standard deviation of the particles' strengths beyond what noise explains."""
        return float((self.scale.var() - self.scale_error.square().mean()).clamp_min(0).sqrt())


def levels_of_truth(
    posterior: "PosePosterior", true: Poses, found: PoseAlignment, symmetry: Float[Tensor, "s 3 3"] | None = None
) -> Float[Tensor, " n"]:
    """:meth:`PosePosterior.level_of` of the true poses (shifts in the posterior's unit), with the alignment that lays its frame on theirs."""
    group = torch.eye(3, dtype=torch.float64)[None] if symmetry is None else symmetry.double()
    mates = true.rotations.double()[:, None] @ group
    shifts = true.shifts.double()[:, None].expand(-1, len(group), -1)
    candidates = unframed(mates, shifts, found.rotation, found.shift, mirrored=found.mirrored)
    return posterior.level_of(*candidates, torch.Generator().manual_seed(0))


def covered(level: Float[Tensor, " n"]) -> dict[str, float]:
    """Share of the particles whose true pose, at ``level``, is inside the credible region of each of the masses ``REGIONS``."""
    return {f"{part:g}": float((level < part).double().mean()) for part in REGIONS}


@dataclass(frozen=True)
class PosePosterior:
    """A mixture for each particle: ``exp(omega) R_m`` and ``s_m + sigma`` with (omega, sigma) normal of mode m's covariance.

    Attributes
    ----------
    rotations, shifts
        (N, M, 3, 3) and (N, M, 2), pixels or angstrom, the heaviest mode first.
    mass
        (N, M) sums to one over the modes; absent ones have none.
    covariance
        (N, M, 5, 5) of (omega_x, omega_y, omega_z, s_x, s_y) in radian and the shifts' unit, omega in the image frame (z is in plane).
    """

    rotations: Float[Tensor, "n m 3 3"]
    shifts: Float[Tensor, "n m 2"]
    mass: Float[Tensor, "n m"]
    covariance: Float[Tensor, "n m 5 5"]

    def in_one_unit(self, symmetry: Float[Tensor, "s 3 3"]) -> "PosePosterior":
        """The same with each mode as that of its equivalents that is nearest to the first mode."""
        mates = self.rotations[:, :, None] @ symmetry
        apart = so3.distance(*torch.broadcast_tensors(mates, self.rotations[:, :1, None]))
        nearest = apart.argmin(dim=2)[:, :, None, None, None]
        return replace(self, rotations=mates.take_along_dim(nearest, dim=2)[:, :, 0])

    def in_pixels(self, pixel_size: float) -> "PosePosterior":
        """The same with shifts in pixels of ``pixel_size``, from angstrom."""
        return self.in_angstrom(1 / pixel_size)

    def in_angstrom(self, pixel_size: float) -> "PosePosterior":
        """The same with shifts in angstrom, from pixels of ``pixel_size``."""
        unit = self.covariance.new_tensor([1.0, 1.0, 1.0, pixel_size, pixel_size])
        return replace(self, shifts=self.shifts * pixel_size, covariance=self.covariance * torch.outer(unit, unit))

    def mirrored(self) -> "PosePosterior":
        """The same for the mirrored map: every pose turned by half a turn in the image plane."""
        sign = self.covariance.new_tensor([-1.0, -1.0, 1.0, 1.0, 1.0])
        return replace(
            self, rotations=so3.half_turn(self.rotations), covariance=self.covariance * torch.outer(sign, sign)
        )

    @property
    def spread(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Root mean square angle (radian) and distance from the heaviest mode that the whole posterior expects."""
        return self.spread_up_to(torch.eye(3)[None])

    def spread_up_to(self, group: Float[Tensor, "s 3 3"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The same where the map looks alike from R and from R S for S in ``group``."""
        mates = self.rotations[:, :, None] @ group.to(self.rotations)
        angle = so3.distance(mates, self.rotations[:, :1, None].expand_as(mates)).amin(dim=2)
        apart = (self.shifts - self.shifts[:, :1]).square().sum(dim=2)
        variance = self.covariance.diagonal(dim1=2, dim2=3)
        turned = angle.square() + variance[..., :3].sum(dim=2)
        moved = apart + variance[..., 3:].sum(dim=2)
        return (self.mass * turned).sum(dim=1).sqrt(), (self.mass * moved).sum(dim=1).sqrt()

    @property
    def entropy(self) -> Float[Tensor, " n"]:
        """Differential entropy, nats over radian^3 and the square of the shifts' unit (were they held, radian^3), were the modes far apart."""
        free = self.free
        volume = torch.linalg.slogdet(self.covariance[..., :free, :free])[1]
        each = 0.5 * volume + 0.5 * free * (1 + math.log(2 * math.pi))
        return (self.mass * each - torch.xlogy(self.mass, self.mass)).sum(dim=1)

    @property
    def free(self) -> int:
        """How many of the five parameters were fitted: 5, or 3 where the shifts were held."""
        return 5 if float(self.covariance[:, 0, 3, 3].max()) > _HELD else 3

    def level_of(
        self, rotations: Float[Tensor, "n k 3 3"], shifts: Float[Tensor, "n k 2"], generator: torch.Generator
    ) -> Float[Tensor, " n"]:
        """Posterior mass of poses that are more probable than the given one: uniform in [0, 1] over true poses, if all is calibrated.

        Poses in the posterior's own frame; of the K equivalent ones of a particle the most probable counts. By Monte Carlo, 400 draws.
        """
        blocks = torch.arange(len(self.mass)).split(_BLOCK)
        return torch.cat([self.rows(b)._levels(rotations[b], shifts[b], generator) for b in blocks])

    def rows(self, index: Int[Tensor, " b"]) -> "PosePosterior":
        """Of the particles ``index`` alone."""
        return PosePosterior(self.rotations[index], self.shifts[index], self.mass[index], self.covariance[index])

    def drawn(self, count: int, generator: torch.Generator) -> tuple[Float[Tensor, "n k 3 3"], Float[Tensor, "n k 2"]]:
        """``count`` poses of every particle: rotations and shifts, float64."""
        n, free = len(self.mass), self.free
        chosen = torch.multinomial(self.mass.double(), count, replacement=True, generator=generator)
        row = torch.arange(n)[:, None]
        normal = torch.randn(n, count, free, dtype=torch.float64, generator=generator)
        step = torch.einsum("nkij,nkj->nki", self._factor[row, chosen], normal)
        rotations = so3.exp(step[..., :3]) @ self.rotations.double()[row, chosen]
        shifts = self.shifts.double()[row, chosen]
        return rotations, shifts + step[..., 3:] if free == 5 else shifts

    @cached_property
    def _factor(self) -> Float[Tensor, "n m f f"]:
        return torch.linalg.cholesky(self.covariance[..., : self.free, : self.free].double())

    def _levels(
        self, rotations: Float[Tensor, "n k 3 3"], shifts: Float[Tensor, "n k 2"], generator: torch.Generator
    ) -> Float[Tensor, " n"]:
        inside = self.log_density(*self.drawn(_DRAWS, generator))
        true = self.log_density(rotations.double(), shifts.double()).amax(dim=1)
        return (inside > true[:, None]).double().mean(dim=1)

    def log_density(self, rotations: Float[Tensor, "n k 3 3"], shifts: Float[Tensor, "n k 2"]) -> Float[Tensor, "n k"]:
        """Log density of poses, to the uniform distribution of rotations and the area of shifts (were they held, to rotations alone)."""
        factor, terms = self._factor, []
        for m in range(self.mass.shape[1]):
            turn = so3.log(rotations @ self.rotations[:, m, None].double().mT)
            offset = torch.cat([turn, shifts - self.shifts[:, m, None].double()], dim=2)[..., : factor.shape[-1]]
            white = torch.linalg.solve_triangular(factor[:, m], offset.mT, upper=False)
            volume = factor[:, m].diagonal(dim1=1, dim2=2).log().sum(dim=1) + 0.5 * self.free * math.log(2 * math.pi)
            terms.append(
                self.mass[:, m].double().log()[:, None]
                - 0.5 * white.square().sum(dim=1)
                - volume[:, None]
                - so3.log_uniform(turn)
            )
        return torch.stack(terms).logsumexp(dim=0)
