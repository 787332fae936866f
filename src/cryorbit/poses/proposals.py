"""Poses to integrate an image's likelihood over: drawn from its posterior, weighed by the prior over the density they were drawn from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.poses.posterior import PosePosterior

_WIDEN = 1.2  # of the posterior's standard deviations: tails must be covered


@dataclass(frozen=True)
class PoseProposals:
    """K poses of each image.

    Attributes
    ----------
    rotations, shifts
        (N, K, 3, 3) and (N, K, 2) pixels.
    log_weight
        (N, K) log of the prior's density over the proposal's: the mean over K of likelihood times weight is the likelihood of the image.
    """

    rotations: Float[Tensor, "n k 3 3"]
    shifts: Float[Tensor, "n k 2"]
    log_weight: Float[Tensor, "n k"]

    @staticmethod
    def known(rotations: Float[Tensor, "n 3 3"], shifts: Float[Tensor, "n 2"]) -> "PoseProposals":
        """The one pose of each image that is known."""
        return PoseProposals(rotations[:, None], shifts[:, None], torch.zeros(len(shifts), 1, dtype=torch.float64))

    def rows(self, index: Int[Tensor, " m"]) -> "PoseProposals":
        """Of the images ``index`` alone."""
        return PoseProposals(self.rotations[index], self.shifts[index], self.log_weight[index])

    def each(
        self, rows: Int[Tensor, " b"], device: torch.device
    ) -> Iterator[tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]]:
        """The first proposal of the images ``rows``, then the second ..."""
        for k in range(self.log_weight.shape[1]):
            yield self.rotations[rows, k].float().to(device), self.shifts[rows, k].float().to(device)


def proposed(
    posterior: PosePosterior,
    count: int,
    generator: torch.Generator,
    *,
    group: int = 1,
    shift_sigma: float | None = None,
) -> PoseProposals:
    """``count`` poses of every image from its widened posterior, under a uniform prior of rotations and a normal one of shifts.

    Parameters
    ----------
    posterior
        Of every image, shifts in pixels.
    count
        Draws per image.
    generator
        Of the draws.
    group
        How many equivalent poses the map's symmetry makes of one, of which the posterior has but one.
    shift_sigma
        Standard deviation of the prior of shifts in pixels; None: that of all images' shifts. Not used where shifts were held.
    """
    wide = replace(posterior, covariance=posterior.covariance * _WIDEN**2)
    rotations, shifts = wide.drawn(count, generator)
    weight = torch.log(torch.tensor(float(group))) - wide.log_density(rotations, shifts)
    if wide.free == 5:
        sigma = shift_prior(posterior) if shift_sigma is None else shift_sigma
        scaled = torch.distributions.Normal(0.0, sigma).log_prob(shifts)
        weight = weight + scaled.sum(dim=2)
    return PoseProposals(rotations, shifts, weight)


def shift_prior(posterior: PosePosterior) -> float:
    """Standard deviation of shifts along an axis that all posteriors together imply."""
    second = posterior.shifts.square().sum(dim=2) + posterior.covariance.diagonal(dim1=2, dim2=3)[..., 3:].sum(dim=2)
    return float((0.5 * (posterior.mass * second).sum(dim=1)).mean().sqrt())
