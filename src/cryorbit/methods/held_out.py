"""How probable images are that a map has not seen: the model criticism that papers/002 section 7 asks for.

* **volume**: a Gaussian over Fourier coefficients, made of other images (``volumes/gaussian.py``).
* **poses**: known, or integrated by importance weighting from proposals.
* **objective**: ``log p(image | the other images)`` of each image.

The map is integrated in closed form, not by samples of it: given its pose an image is Gaussian with the mean ``c S m`` and the variance ``N +
c^2 v`` in each Fourier pixel, v the map's variance there. That is exact for one image at a known pose but for one thing: the pixels of a slice
are taken as independent, and those a pixel apart are correlated by a tenth or so. Over poses the result is a lower bound on average
(``metrics/held_out.py``). Images are scored one by one: the sum over images is no joint density of them, it is how well each is predicted.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.metrics.held_out import effective_samples, importance_weighted
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.linear_gaussian import slice_variance
from cryorbit.physics.noise import log_likelihood
from cryorbit.physics.slicing import slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.proposals import PoseProposals
from cryorbit.training.dataset import FourierStack
from cryorbit.volumes.gaussian import GaussianVolume

_PIXELS = 2**22  # of all images of a batch at all their proposals


@dataclass(frozen=True)
class HeldOut:
    """What a map says of images it has not seen.

    Attributes
    ----------
    log_density
        (M,) nats of each image given the map, a lower bound on average where poses were proposed.
    empty
        (M,) nats without a map: Gaussian noise with the images' own mean power spectrum.
    effective
        (M,) effective number of the proposed poses.
    residual
        (shells,) mean square of image less prediction over its predicted variance, poses weighed as in the bound: 1 where noise, map and
        poses are what they say; more where something is missing from the model.
    """

    log_density: Float[Tensor, " m"]
    empty: Float[Tensor, " m"]
    effective: Float[Tensor, " m"]
    residual: Float[Tensor, " shells"]

    @property
    def gain(self) -> float:
        """Nats per image that the map is worth."""
        return _mean_and_error(self.log_density - self.empty)[0]

    @property
    def gain_error(self) -> float:
        """Standard error of :attr:`gain` over images."""
        return _mean_and_error(self.log_density - self.empty)[1]

    def beside(self, other: "HeldOut") -> tuple[float, float]:
        """Nats by which the same images are likelier than under another model, mean and standard error over images."""
        return _mean_and_error(self.log_density - other.log_density)

    @staticmethod
    def joined(parts: "list[HeldOut]") -> "HeldOut":
        """Of all images."""
        share = [len(p.empty) / sum(len(q.empty) for q in parts) for p in parts]
        return HeldOut(
            torch.cat([p.log_density for p in parts]),
            torch.cat([p.empty for p in parts]),
            torch.cat([p.effective for p in parts]),
            torch.stack([s * p.residual for s, p in zip(share, parts, strict=True)]).sum(dim=0),
        )


def _mean_and_error(nats: Float[Tensor, " m"]) -> tuple[float, float]:
    nats = nats.double()
    return float(nats.mean()), float(nats.std()) / len(nats) ** 0.5


def without_background(disk: FourierDisk) -> FourierDisk:
    """The pixels of ``disk``, 0 weighing nothing: what images have there, models of the map do not tell from the density's level."""
    return replace(disk, weight=torch.where(disk.shell > 0, disk.weight, 0.0))


@torch.no_grad()
def held_out(
    stack: FourierStack,
    particle: Int[Tensor, " m"],
    proposals: PoseProposals,
    volume: GaussianVolume,
    noise: Float[Tensor, " shells"],
) -> HeldOut:
    """Score images under a map that was made without them; all but Fourier pixel 0, their background.

    Parameters
    ----------
    stack
        The images, in the map's units.
    particle
        (M,) which of them.
    proposals
        Poses of these (M, K), shifts in pixels of the stack.
    volume
        Mean and variance of the map.
    noise
        ``E|n|^2`` of a Fourier pixel per shell, as in ``MapPosterior``.
    """
    map_variance = volume.variance
    scored = without_background(stack.disk.to(stack.device))
    disk, device, shells = stack.disk.to(stack.device), stack.device, stack.box // 2 + 1
    grid, floor = slicing_grid(volume.data, disk.radius), noise[disk.shell] / stack.box**2
    spectrum = stack.power.to(device)[disk.shell] / stack.box**2
    bound, empty, effective = [], [], []
    square = torch.zeros(len(disk), device=device)
    size = max(1, _PIXELS // (len(disk) * proposals.log_weight.shape[1]))
    for rows in torch.arange(len(particle)).split(size):
        images, ctf = stack.images(particle[rows]), stack.ctf(particle[rows])
        terms, ratios = [], []
        for rotations, shifts in proposals.each(rows, device):
            predicted = forward(grid, rotations, shifts, disk, ctf)
            variance = floor + ctf.square() * slice_variance(map_variance, rotations, disk) / stack.box**2
            terms.append(log_likelihood(images, predicted, variance, scored))
            ratios.append((images - predicted).abs().square() / (variance * stack.box**2))
        weights = torch.stack(terms, dim=1).double() + proposals.log_weight[rows].to(device)
        for share, ratio in zip(torch.softmax(weights, dim=1).T, ratios, strict=True):
            square += (share[:, None] * ratio).sum(dim=0).to(square)
        bound.append(importance_weighted(weights).cpu())
        effective.append(effective_samples(weights).cpu())
        empty.append(log_likelihood(images, torch.zeros_like(images), spectrum, scored).double().cpu())
    residual = shell_mean(square / len(particle), scored, shells)
    residual[0] = torch.nan  # not scored
    return HeldOut(torch.cat(bound), torch.cat(empty), torch.cat(effective), residual.cpu())
