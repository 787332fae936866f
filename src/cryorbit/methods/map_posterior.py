"""The posterior of the map given posed images, exactly: what papers/002 section 5.1 approaches by gradients, in two passes over the images.

* **volume**: a Gaussian over Fourier coefficients (``volumes/gaussian.py``).
* **poses**: known, or weighted samples of each particle's posterior.
* **objective**: none. Images are linear in the map and noise is Gaussian: a weighted back-projection is the posterior mean, its weights the
  precision (``physics/linear_gaussian.py``). The second pass inserts what the first answer leaves of the images, which takes away the
  back-projection's interpolation error and measures the noise, in the images and, by every other image against the rest, in the map.

The prior is the standard normal of papers/002 or, better, a power spectrum learned from the same images (empirical Bayes); no half-sets.
Memory does not grow with the number of images.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.methods.half_maps import insert_posed, posed_images
from cryorbit.metrics.fsc import shell_sum
from cryorbit.physics.fourier import shell_index, volume_to_fourier
from cryorbit.physics.linear_gaussian import (
    ball,
    calibrated,
    corrected_mean,
    information,
    learned_prior,
    least_squares,
    posterior_mean,
    posterior_variance,
)
from cryorbit.physics.slicing import Accumulator, slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.local import PoseSamples
from cryorbit.training.dataset import FourierStack
from cryorbit.volumes.gaussian import GaussianVolume

_JUDGED = 1000  # particles by which noise is measured before the second pass
_ROUNDS = 2  # of noise, prior and mean on them: each makes the other


@dataclass(frozen=True)
class MapPosterior:
    """A map and how sure it is of itself, in the stack's units.

    Attributes
    ----------
    mean
        (D, D, D) map.
    variance
        (D, D, D // 2 + 1) of each coefficient of its unnormalised transform, rfft layout; 0 where there are no coefficients.
    information
        (D, D, D // 2 + 1) summed ``CTF^2`` of the images per coefficient.
    noise, prior
        (shells,) ``E|n|^2`` of a Fourier pixel of the images, ``E|V|^2`` of a coefficient.
    """

    mean: Float[Tensor, "d d d"]
    variance: Float[Tensor, "d d h"]
    information: Float[Tensor, "d d h"]
    noise: Float[Tensor, " shells"]
    prior: Float[Tensor, " shells"]

    @property
    def volume(self) -> GaussianVolume:
        """As a distribution to slice, draw from and take voxel variances of."""
        return GaussianVolume.from_map(self.mean, variance=self.variance)


def standard_normal(box: int) -> Float[Tensor, " shells"]:
    """The prior of papers/002: variance 1 of the real and of the imaginary part of every coefficient, in the stack's units."""
    return torch.full((box // 2 + 1,), 2.0)


def map_posterior(
    stack: FourierStack,
    intensity: Float[Tensor, " n"],
    samples: PoseSamples,
    symmetry: Float[Tensor, "s 3 3"],
    prior: Float[Tensor, " shells"] | None = None,
) -> MapPosterior:
    """Posterior of the map given images at weighted poses.

    Parameters
    ----------
    stack
        The images, up to the radius the map shall have.
    intensity
        (N,) how much stronger than the map each image is.
    samples
        Weighted poses, shifts in pixels of the stack; ``particle`` ascending.
    symmetry
        (S, 3, 3) point group of the map.
    prior
        (shells,) variance of the map's coefficients; None learns it.

    Raises
    ------
    DataError
        There are poses of one image only.
    """
    symmetry = symmetry.to(stack.device)
    acc = insert_posed(stack, intensity, samples, symmetry)
    particles, order = samples.particle.unique_consecutive(return_inverse=True)
    images = int(order[-1]) + 1
    if images < 2:
        raise DataError("DATA232", "one image, expected at least two", "noise is told from signal by two halves")
    seen = information(acc)
    alone = least_squares(acc) if prior is None else None
    chosen = particles[torch.linspace(0, images - 1, min(_JUDGED, images)).round().to(torch.int64)]
    some = samples.rows(torch.isin(samples.particle, chosen))
    noise = _read_power(stack, some)

    def spectrum() -> Float[Tensor, " shells"]:
        if prior is not None:
            return prior.to(noise)
        assert alone is not None
        return learned_prior(alone, noise)

    def left(power: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
        return _noise(power, seen, noise / spectrum(), images * len(symmetry), stack)

    for _ in range(_ROUNDS):
        noise = left(_residual(stack, intensity, some, posterior_mean(acc, noise, spectrum()), None)[0])
    mean = posterior_mean(acc, noise, spectrum())
    (first, one), (second, two) = (
        _residual(stack, intensity, samples.rows(order % 2 == half), mean, symmetry) for half in (0, 1)
    )
    assert one is not None
    assert two is not None
    power = 0.5 * (first + second)
    if alone is not None:
        alone = calibrated(alone, one, two, power)
    noise = left(power)
    final = spectrum()
    variance = posterior_variance(acc, noise, final)
    mean = corrected_mean(mean, variance, one + two, noise, final)
    return MapPosterior(mean, variance, seen, noise, final)


def pose_variance(
    stack: FourierStack,
    intensity: Float[Tensor, " n"],
    draws: Iterable[PoseSamples],
    symmetry: Float[Tensor, "s 3 3"],
    posterior: MapPosterior,
) -> tuple[Float[Tensor, " shells"], Float[Tensor, "d d d"]]:
    """How much the map's mean moves with the poses: by the law of total variance, what not knowing them adds.

    Parameters
    ----------
    stack, intensity, symmetry
        As for :func:`map_posterior`.
    draws
        At least two joint draws of all particles' poses.
    posterior
        Its noise and prior are used.

    Returns
    -------
    Variance of the coefficients, mean over each shell (shells,), and of the voxels (D, D, D), over the draws.
    """
    shells = len(posterior.prior)
    count, total = 0, torch.zeros_like(posterior.mean)
    square = torch.zeros_like(posterior.mean)
    power = torch.zeros_like(posterior.variance)
    for samples in draws:
        acc = insert_posed(stack, intensity, samples, symmetry.to(stack.device))
        off = posterior_mean(acc, posterior.noise, posterior.prior) - posterior.mean
        count, total, square = count + 1, total + off, square + off.square()
        power = power + volume_to_fourier(off).abs().square()
    spread = (power - volume_to_fourier(total).abs().square() / count).clamp_min(0) / (count - 1)
    voxels = (square - total.square() / count).clamp_min(0) / (count - 1)
    kept = ball(stack.box, stack.disk.radius, spread.device)
    index = shell_index(stack.box, spread.device)
    number = shell_sum(kept, index, stack.box).clamp_min(1)
    return (shell_sum(spread * kept, index, stack.box) / number)[:shells], voxels


def _shells(stack: FourierStack) -> int:
    return stack.box // 2 + 1


def _read_power(stack: FourierStack, samples: PoseSamples) -> Float[Tensor, " shells"]:
    """Mean power of images per shell: an upper bound of their noise."""
    images = stack.images(samples.particle.unique())
    return _filled(shell_mean(images.abs().square().mean(dim=0), stack.disk.to(stack.device), _shells(stack)))


def _filled(values: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
    """Shells the disk does not reach take the last one's value."""
    last = int(torch.nonzero(values > 0).max())
    return torch.cat([values[: last + 1], values[last].expand(len(values) - last - 1)])


def _residual(
    stack: FourierStack,
    intensity: Float[Tensor, " n"],
    samples: PoseSamples,
    mean: Float[Tensor, "d d d"],
    symmetry: Float[Tensor, "s 3 3"] | None,
) -> tuple[Float[Tensor, " shells"], Accumulator | None]:
    """What ``mean`` leaves of the images at each mate of their poses: mean power per shell, and inserted (``symmetry`` None: not)."""
    disk = stack.disk.to(stack.device)
    grid, power, mass = slicing_grid(mean, disk.radius), torch.zeros(len(disk), device=stack.device), 0.0
    out: Accumulator | None = None
    for posed in posed_images(stack, intensity, samples):
        for mate in [posed] if symmetry is None else posed.mates(symmetry):
            left = mate.images - mate.predicted(grid, disk)
            power += (mate.weight[:, None] * left.abs().square()).sum(dim=0)
            mass += float(mate.weight.sum())
            if symmetry is not None:
                out = mate.inserted(left, None, disk, out)
    return shell_mean(power / mass, disk, _shells(stack)), out


def _noise(
    power: Float[Tensor, " shells"],
    seen: Float[Tensor, "d d h"],
    ratio: Float[Tensor, " shells"],
    images: int,
    stack: FourierStack,
) -> Float[Tensor, " shells"]:
    """Noise from what is left of the images: more by as many numbers as the map took from them (MacKay 1992, Neural Comp. 4, 415)."""
    index = shell_index(stack.box, seen.device)
    learnt = seen / (seen + ratio[index.clamp(max=len(ratio) - 1)])
    parameters = shell_sum(learnt, index, stack.box)
    pixels = stack.disk.shell_sums(torch.ones(len(stack.disk)).to(power), len(power))
    share = (parameters / (images * pixels).clamp_min(1)).clamp(max=0.9)
    return _filled(power / (1 - share)).clamp_min(1e-12 * float(power.max()))
