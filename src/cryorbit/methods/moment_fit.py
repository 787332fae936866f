"""The objective of the inversion of moments (``methods/moments.py``), its settings, and what comes out."""

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups.so3 import healpix_grid, in_plane_count
from cryorbit.methods.moment_maps import BallMaps, MapFamily, MixtureMaps
from cryorbit.physics.image_moments import Blur, ImageMoments, moments_of_slices, relative_errors
from cryorbit.physics.third_moments import Seen, ThirdMoments
from cryorbit.volumes.ball import real_harmonics

_TOLERANCE = 1e-12  # of L-BFGS: moments are met to 1e-5 where they can be

Found = tuple[Float[Tensor, " n"], Float[Tensor, " l"], float]
"""Numbers of a map, of a density, the objective."""


@dataclass(frozen=True)
class MomentsConfig:
    """Settings of the inversion.

    Attributes
    ----------
    rings
        Fourier pixels to match at last; 0: as many as the moments have.
    degree
        Largest degree of the spherical harmonics.
    order
        HEALPix order of the grid of view directions.
    starts, kept
        Random starts, and how many of them are followed beyond the first rings.
    iterations
        Of L-BFGS for each set of rings.
    positivity
        Weight of the penalty on negative density.
    floor
        Smallest power of a ring in the weights, over the largest.
    margin
        Fourier pixels beyond the rings that functions of the map reach. With 0 even a true map has moments that are off in the last ring, with
        2 by a tenth or less of that.
    third
        Weight of the mean squared mismatch of third moments over the spread of one image's, where they are given. Not the statistical one,
        which counts images: with twenty times this weight starts were led astray (4AKE, 100,000 images).
    gaussians
        The map is a sum of so many Gaussians; 0: any map in a ball, to which ``degree``, ``positivity`` and ``margin`` apply.
    view_degree
        Largest degree of the spherical harmonics of the density's logarithm; 0: one number per direction.
    tolerance
        Entries weigh one over their variance plus the square of what a map's prediction may be off by, this share of the root of the power of
        each of their rings. 0: one over the powers alone, as in eq. 30.
    """

    rings: int = 0
    degree: int = 10
    order: int = 2
    starts: int = 5
    kept: int = 2
    iterations: int = 80
    positivity: float = 3.0
    floor: float = 1e-3
    margin: int = 0
    third: float = 5.0
    gaussians: int = 0
    view_degree: int = 0
    tolerance: float = 0.0


@dataclass(frozen=True)
class MomentMap:
    """A map (D, D, D) float64 with its density over ``rotations`` (V, 3, 3), the final objective and relative errors of both moments."""

    volume: Float[Tensor, "d d d"]
    density: Float[Tensor, " v"]
    rotations: Float[Tensor, "v 3 3"]
    objective: float
    errors: tuple[float, float]


def view_directions(order: int) -> Float[Tensor, "v 3 3"]:
    """One rotation for each HEALPix direction: third rows all over the sphere, some in-plane angle."""
    count = in_plane_count(order)
    return healpix_grid(order).view(-1, count, 3, 3)[:, 0].double()


class MomentFit:
    """The objective at given rings, for L-BFGS.

    Parameters
    ----------
    moments
        To be matched.
    config
        Settings.
    rings
        How many of them to match.
    third
        To be matched as well; of all rings.
    """

    def __init__(
        self, moments: ImageMoments, config: MomentsConfig, rings: int, third: ThirdMoments | None = None
    ) -> None:
        self.third = third
        self.moments, self.config = moments.within(rings), config
        self.rotations = view_directions(config.order)
        polar = self.moments.centred_basis
        self.maps: MapFamily = (
            MixtureMaps(polar, self.rotations, config.gaussians)
            if config.gaussians
            else BallMaps(polar, self.rotations, config.degree, config.margin)
        )
        self.harmonics = (
            torch.from_numpy(real_harmonics(config.view_degree, self.rotations[:, 2].numpy())).float()
            if config.view_degree
            else torch.eye(len(self.rotations))
        )
        sigma = self.moments.shift_sigma_px
        outer = self.moments.basis.orders
        self.blur = Blur(polar, sigma, outer=outer) if sigma or outer != polar.orders else None
        self.weights = self._weights()
        self.seen = None if third is None else Seen(third.filters, third.gains, polar, sigma)
        self.target = (self.moments.first.to(torch.complex64), self.moments.second.to(torch.complex64))

    def _weights(self) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k k"]]:
        """Of the squared mismatch of each entry of both moments; orders m > 0 count twice, for m and -m."""
        power, c = self.moments.power.clamp(min=0), self.config
        level = power + c.floor * power.max()
        first, second = level, (level[:, None] * level).expand_as(self.moments.second.real)
        if c.tolerance:
            if self.moments.variance is None:
                raise DataError(
                    "DATA417",
                    "these moments do not know their errors",
                    "set tolerance to 0, or sum them with errors=True",
                )
            first, second = (
                c.tolerance**2 * a + b for a, b in zip((first, second), self.moments.variance, strict=True)
            )
        second = 2 / second
        second[0] *= 0.5
        return (1 / first).float(), second.float()

    @property
    def uniform(self) -> Float[Tensor, " l"]:
        """Views of a uniform density."""
        return torch.zeros(self.harmonics.shape[1])

    def density(self, views: Float[Tensor, " l"]) -> Float[Tensor, " v"]:
        """Probability of each direction."""
        return torch.softmax(self.harmonics @ views, 0)

    def predicted(self, parameters: Float[Tensor, " n"], views: Float[Tensor, " l"]) -> ImageMoments:
        """Moments of a map and a density, of particles shifted as those of the images."""
        return self._blurred(moments_of_slices(self.maps.slices(parameters), self.density(views), self.maps.polar))

    def _blurred(self, moments: ImageMoments) -> ImageMoments:
        if self.blur is None:
            return moments
        return ImageMoments(*self.blur(moments.first, moments.second), self.moments.basis)

    def scaled(self, parameters: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The same map, of the right power."""
        power = self.predicted(parameters, self.uniform).power.sum() / self.moments.power.sum().clamp_min(1e-30)
        return self.maps.scaled(parameters, float(power.clamp_min(1e-30)) ** -0.5)

    def objective(self, parameters: Float[Tensor, " n"], views: Float[Tensor, " l"]) -> Float[Tensor, ""]:
        """Weighted squared mismatch and penalty; about 1 for an empty map, without third moments."""
        slices, density = self.maps.slices(parameters), self.density(views)
        found = self._blurred(moments_of_slices(slices, density, self.maps.polar))
        (first, second), (weigh_first, weigh_second) = self.target, self.weights
        off_second = (weigh_second * (found.second - second).abs().square()).sum()
        off_first = (weigh_first * (found.first - first).abs().square()).sum()
        whole = (weigh_second * second.abs().square()).sum() + (weigh_first * first.abs().square()).sum()
        mismatch = (off_second + off_first) / whole + self.config.positivity * self.maps.penalty(parameters)
        if self.third is None or self.seen is None:
            return mismatch
        return mismatch + self.config.third * self.third.mismatch(self.seen(slices, density))

    def minimised(self, parameters: Float[Tensor, " n"], views: Float[Tensor, " l"], iterations: int) -> Found:
        """The same after L-BFGS, and the objective there."""
        n = len(parameters)
        scale = float(parameters.norm()) / n**0.5

        def loss(packed: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            x = torch.from_numpy(packed).float().requires_grad_()
            value = self.objective(scale * x[:n], x[n:])
            (gradient,) = torch.autograd.grad(value, x)
            return float(value.detach()), gradient.double().numpy()

        start = torch.cat([parameters / scale, views]).double().numpy()
        options = {
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "maxcor": 20,
            "ftol": _TOLERANCE,
            "gtol": _TOLERANCE,
        }
        found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        if not np.isfinite(found.fun):
            raise ConfigError(
                "CONF125",
                f"an objective of {found.fun} at {self.config}",
                "start from a map of moderate density, with moderate weights",
            )
        x = torch.from_numpy(found.x).float()
        return scale * x[:n], x[n:], float(found.fun)

    def as_map(self, found: Found) -> MomentMap:
        """What was found, on its grid."""
        parameters, views, objective = found
        first, second = relative_errors(self.predicted(parameters, views), self.moments)
        errors = (float(first), float(second))
        return MomentMap(self.maps.volume(parameters), self.density(views), self.rotations, objective, errors)
