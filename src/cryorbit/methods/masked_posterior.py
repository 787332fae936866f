"""The posterior of a map that is zero outside a mask, and not negative if so asked: papers/002 section 5.1 with a prior in real space.

* **volume**: voxels of the mask; a Gaussian whose precision is a convolution (``physics/support.py``), with draws for its variances.
* **poses**: known, or weighted samples of each particle's posterior.
* **objective**: none for the Gaussian: its normal equations are solved, twice more with what the answer leaves of the images, which takes away
  their interpolation error. Without negative voxels the mode takes the mean's place; variances stay those of the Gaussian.

Added to the paper, whose prior knows Fourier space alone. Noise and the prior's power spectrum are those of ``map_posterior``. The constant
background of images is unknown, so their Fourier pixel 0 is left out: that density is zero outside the mask is what sets its level inside.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Complex, Float
from scipy import ndimage
from torch import Tensor

from cryorbit.methods.half_maps import PosedImages, posed_images
from cryorbit.physics.fourier import FourierDisk, fourier_to_volume, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball
from cryorbit.physics.slicing import Accumulator, back_projected, insert_symmetric, slicing_grid
from cryorbit.physics.support import SupportedGaussian
from cryorbit.poses.local import PoseSamples
from cryorbit.training.dataset import FourierStack
from cryorbit.volumes.gaussian import GaussianVolume

_FINE = 4  # points per Fourier pixel of the grid of the weights
_ROUNDS = 2  # of solving again with what the last answer leaves of the images
_SMOOTH_PX = 1.5  # standard deviation of the windows, in voxels and in Fourier pixels, over which squares of few draws are averaged


@dataclass(frozen=True)
class MaskedPosterior:
    """A map within a mask and how sure it is of itself, in the stack's units.

    Attributes
    ----------
    mean
        (D, D, D), zero outside the mask: the mean, or the mode where no voxel is negative.
    variance
        (D, D, D // 2 + 1) of each coefficient of its unnormalised transform, rfft layout; 0 where images do not reach.
    voxel_variance
        (D, D, D) of each voxel.
    """

    mean: Float[Tensor, "d d d"]
    variance: Float[Tensor, "d d h"]
    voxel_variance: Float[Tensor, "d d d"]

    @property
    def volume(self) -> GaussianVolume:
        """As a distribution of independent coefficients, to slice."""
        return GaussianVolume.from_map(self.mean, variance=self.variance)


def masked_posterior(
    stack: FourierStack,
    intensity: Float[Tensor, " n"],
    samples: PoseSamples,
    symmetry: Float[Tensor, "s 3 3"],
    support: Bool[Tensor, "d d d"],
    noise: Float[Tensor, " shells"],
    prior: Float[Tensor, " shells"],
    *,
    draws: int = 8,
    seed: int = 0,
    non_negative: bool = False,
) -> MaskedPosterior:
    """Posterior of the map given images at weighted poses and where it is zero.

    Parameters
    ----------
    stack, intensity, samples, symmetry
        As for ``map_posterior``.
    support
        Where the map may be other than zero.
    noise, prior
        (shells,) ``E|n|^2`` of a Fourier pixel of the images, ``E|V|^2`` of a coefficient of the map, as ``map_posterior`` found them.
    draws, seed
        How many draws the variances are taken from, at least two.
    non_negative
        Whether no voxel may be negative.

    Raises
    ------
    DataError
        The support is empty.
    """
    symmetry, prior = symmetry.to(stack.device), prior.clone()
    prior[0] = prior[1]  # what images say of shell 0 is their background
    posed = _Whitened(stack, intensity, samples, symmetry, noise.to(stack.device))
    found = SupportedGaussian.from_sums(posed.weights(), prior / support.float().mean().to(prior), support)
    force = posed.back_projected(lambda images: images.images) * found.support
    mean = found.solved(force)
    for _ in range(_ROUNDS):
        force = posed.left(mean) * found.support + found.images_times(mean)
        mean = found.solved(force, mean)
    if non_negative:
        mean = found.non_negative(force, mean)
    generator = torch.Generator().manual_seed(seed)
    drawn = (found.draw(posed.white(generator), generator) for _ in range(draws))
    variance, voxels = _variances(drawn, draws, found.support, stack.disk.radius)
    even = GaussianVolume.from_map(mean, variance=variance)  # of its coefficients, were they independent
    return MaskedPosterior(mean, variance, voxels * even.voxel_variance(symmetry) / even.voxel_variance())


def _variances(
    draws: Iterable[Float[Tensor, "d d d"]], number: int, support: Bool[Tensor, "d d d"], radius: float
) -> tuple[Float[Tensor, "d d h"], Float[Tensor, "d d d"]]:
    """Variance of the coefficients within ``radius`` and of the voxels of the support, squares of draws averaged with their neighbours'.

    Neighbours of a coefficient vary with it: the map fills only part of its box, and so does what is uncertain of it. Draws know nothing of
    a symmetry: coefficients have the variance that they have together with their mates, voxels that of a map without any.
    """
    box = support.shape[-1]
    kept, inside = ball(box, radius, support.device), support.float()
    power, square = torch.zeros_like(kept), torch.zeros_like(inside)
    for draw in draws:
        coefficients = volume_to_fourier(draw) * kept
        power += coefficients.abs().square() / number
        square += fourier_to_volume(coefficients, box).square() / number
    axis = torch.arange(box, device=support.device) - box // 2
    near = torch.exp(-0.5 * (2 * torch.pi * _SMOOTH_PX * axis / box).square())
    window = near[:, None, None] * near[:, None] * near

    def over_coefficients(values: Float[Tensor, "d d h"]) -> Float[Tensor, "d d h"]:
        return volume_to_fourier(fourier_to_volume(values.to(torch.complex64), box) * window).real.clamp_min(1e-30)

    def over_voxels(values: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        return torch.from_numpy(ndimage.gaussian_filter(values.cpu().numpy(), _SMOOTH_PX)).to(values).clamp_min(1e-30)

    return (
        kept * over_coefficients(power) / over_coefficients(kept),
        inside * over_voxels(square) / over_voxels(inside),
    )


@dataclass(frozen=True)
class _Whitened:
    """Posed images and CTFs over the square root of the noise, without Fourier pixel 0, and what is back-projected of them."""

    stack: FourierStack
    intensity: Float[Tensor, " n"]
    samples: PoseSamples
    symmetry: Float[Tensor, "s 3 3"]
    noise: Float[Tensor, " shells"]

    @property
    def disk(self) -> FourierDisk:
        return self.stack.disk.to(self.stack.device)

    def __iter__(self) -> Iterator[PosedImages]:
        white = torch.where(self.disk.shell > 0, self.noise[self.disk.shell].rsqrt(), 0.0)
        for images in posed_images(self.stack, self.intensity, self.samples):
            yield replace(images, images=images.images * white, ctf=images.ctf * white)

    def weights(self) -> Accumulator:
        """``CTF^2`` over the noise, on a finer grid than images need."""
        out: Accumulator | None = None
        for images in self:
            weight = images.ctf.square() * images.weight[:, None]
            values = weight.to(torch.complex64)
            out = insert_symmetric(values, weight, images.rotations, self.symmetry, self.disk, out, _FINE)
        assert out is not None
        return out

    def back_projected(self, of: Callable[[PosedImages], Complex[Tensor, "m p"]]) -> Float[Tensor, "d d d"]:
        """What ``of`` makes of the images, back-projected."""
        out: Accumulator | None = None
        for images in self:
            out = images.inserted(of(images), self.symmetry, self.disk, out)
        assert out is not None
        return back_projected(out)

    def left(self, mean: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """What ``mean`` leaves of the images at each mate of their poses, back-projected."""
        grid = slicing_grid(mean, self.disk.radius)
        out: Accumulator | None = None
        for images in self:
            for mate in images.mates(self.symmetry):
                out = mate.inserted(mate.images - mate.predicted(grid, self.disk), None, self.disk, out)
        assert out is not None
        return back_projected(out)

    def white(self, generator: torch.Generator) -> Float[Tensor, "d d d"]:
        """White noise in place of the images, back-projected with the covariance that they have at their weights."""

        def noise(images: PosedImages) -> Complex[Tensor, "m p"]:
            drawn = torch.randn(images.images.shape, dtype=torch.complex64, generator=generator)
            return drawn.to(images.images) / images.weight[:, None].sqrt()

        return self.back_projected(noise)
