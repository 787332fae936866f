"""Stochastic variational inference of a map at known poses (papers/002 section 5.1): the general path to what ``map_posterior`` has exactly.

* **volume**: Dirac or Gaussian over Fourier coefficients (``volumes/gaussian.py``).
* **poses**: known, one per particle.
* **objective**: the minibatch ELBO of papers/002 eq. 15, written for all N images: ``N / |B|`` times the batch's expected log likelihood
  less the divergence from the prior. The likelihood's gradient is taken by automatic differentiation through a draw of the map (the
  reparameterisation). Likelihoods: Gaussian, of Fourier pixels in noise of a spectrum that is learned (``physics/noise.py``), or Poisson, of
  the electron counts of pixels (papers/002 appendix D; ``physics/counts.py``).

Changed from the paper: steps are natural gradients. With W the inserted ``CTF^2`` of a batch taken for all images, N the noise of a Fourier
pixel, t the prior and g the likelihood's gradient at the draw v, a batch says ``W v + N g`` of each coefficient, which for the Gaussian
likelihood is its back-projection. That and W are averaged over batches with weights that fall (Hoffman et al. 2013, J. Mach. Learn. Res. 14,
1303); the mean is the one over ``W + N / t``, the variance ``1 / (W / N + 1 / t)``. So one pass over the images is nearly the answer.
g is divided by the weights where it was inserted, on the grid, as in ``map_posterior``: coefficient by coefficient, W is too small for what
slices say together near the origin, and steps grow without end where no noise holds them back.

The N of the Gaussian likelihood is learned from residuals. That of counts is one over their Fisher information at the draw, averaged over
pixels: the diagonal of what it is in Fourier space. Their dose is the mean of the pixels around the particles, one for all images: of few
electrons one image has too few to tell.

The prior's power spectrum is the one that makes the averaged back-projections most probable, as in ``map_posterior``. They are linear in the
images and do not depend on the fit: a spectrum learned from the fit itself (EM) takes hundreds of passes to leave its start where noise is
strong. Counts are linear in the map as well, and their noise there is their mean.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.methods.half_maps import PosedImages
from cryorbit.physics.counts import check_counts, check_dose, count_information, count_log_likelihood
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball, information, learned_prior, least_squares, posterior_mean
from cryorbit.physics.noise import log_likelihood
from cryorbit.physics.slicing import Accumulator, half_width, slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.local import PoseSamples
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack
from cryorbit.training.optimiser import epoch_batch
from cryorbit.volumes.gaussian import GaussianVolume

LIKELIHOODS = ("gaussian", "poisson")
POSTERIORS = ("gaussian", "dirac")
PRIORS = ("learned", "standard")
_OVERSAMPLING = 2
_CHUNK = 512


@dataclass(frozen=True)
class VariationalConfig:
    """Settings of the stochastic variational inference.

    Attributes
    ----------
    likelihood
        ``gaussian``, or ``poisson`` for images that are electron counts.
    posterior
        ``gaussian`` or ``dirac``.
    prior
        ``learned`` power spectrum, or ``standard`` normal (variance 1 of real and imaginary parts), in the stack's units.
    epochs
        Passes over the images.
    batch
        Images at a time.
    decay
        A step's weight is ``(1 + step)^-decay``.
    """

    likelihood: str = "gaussian"
    posterior: str = "gaussian"
    prior: str = "learned"
    epochs: int = 4
    batch: int = 200
    decay: float = 0.9


class Variational:
    """``q(v)`` of papers/002 eq. 14 by minibatches, one per step of ``training.loop.run``.

    Parameters
    ----------
    stack
        Images up to the radius the map shall have.
    config
        Settings.
    poses
        One pose of every particle, shifts in pixels of the stack.
    symmetry
        (S, 3, 3) point group of the map.
    seed
        Of batches and draws.

    Attributes
    ----------
    dose
        Electrons of a pixel without a particle; None under the Gaussian likelihood.

    Raises
    ------
    ConfigError
        A setting no inference can use, or poses that are not one for each particle.
    DataError
        Under the Poisson likelihood, images that are not counts, or none around the particles.
    """

    name = "variational"

    def __init__(
        self,
        stack: FourierStack,
        config: VariationalConfig,
        *,
        poses: PoseSamples,
        symmetry: Float[Tensor, "s 3 3"],
        seed: int = 0,
    ) -> None:
        _check(config)
        if not torch.equal(poses.particle, torch.arange(len(stack))):
            raise ConfigError(
                "CONF107", f"{len(poses.particle)} poses for {len(stack)} particles, expected one of each in order"
            )
        self.stack, self.config, self.poses, self.seed = stack, config, poses, seed
        self.symmetry = symmetry.to(stack.device)
        self.disk = stack.disk.to(stack.device)
        self.batches = -(-len(stack) // config.batch)
        self.shells = stack.box // 2 + 1
        self.index = shell_index(stack.box, stack.device)
        self.kept = ball(stack.box, stack.disk.radius, stack.device)
        self.dose: float | None = None
        self._mean_count = 0.0
        if config.likelihood == "poisson":
            self.dose, self._mean_count = _electrons(stack)
        d, c = stack.box, half_width(stack.disk.radius, _OVERSAMPLING)
        grid = (2 * c + 1, 2 * c + 1, c + 2)
        self.tensors: State = {
            "mean": torch.zeros(d, d, d, device=stack.device),
            "numerator": torch.zeros(d, d, d // 2 + 1, dtype=torch.complex64, device=stack.device),
            "inserted": torch.zeros(grid, dtype=torch.complex64, device=stack.device),
            "weight": torch.zeros(grid, device=stack.device),
            "information": torch.zeros(d, d, d // 2 + 1, device=stack.device),
            "noise": torch.ones(self.shells, device=stack.device),
            "prior": torch.full((self.shells,), 2.0, device=stack.device),
        }

    @property
    def volume(self) -> GaussianVolume:
        """The distribution so far."""
        if self.config.posterior == "dirac":
            return GaussianVolume.from_map(self.tensors["mean"])
        t = self.tensors
        return GaussianVolume.from_map(t["mean"], variance=self.kept * self._of(t["noise"]) / self._precision)

    def state(self) -> State:
        """Everything a resumed run needs."""
        return dict(self.tensors)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        own = fitted(state, {name: x.shape for name, x in self.tensors.items()})
        self.tensors = {name: value.to(self.stack.device) for name, value in own.items()}

    def total_steps(self) -> int:
        """Batches of all passes."""
        return self.config.epochs * self.batches

    def finished(self) -> bool:
        """Never early."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One batch: its back-projection and what it makes of the prior, then its natural gradient at a draw of the map."""
        t, rate = self.tensors, (1 + index) ** -self.config.decay
        chosen = self._batch(index)
        scale = len(self.stack) / len(chosen)
        images, ctf = self.stack.images(chosen), self.stack.ctf(chosen)
        rotations, shifts = (x[chosen].to(ctf.device) for x in (self.poses.rotations, self.poses.shifts))
        posed = PosedImages(images, ctf, rotations, shifts, torch.ones(len(chosen), device=ctf.device))
        batch = posed.inserted(images, self.symmetry, self.disk, None).scaled(scale)
        t["inserted"] = (1 - rate) * t["inserted"] + rate * batch.numerator
        t["weight"] = (1 - rate) * t["weight"] + rate * batch.weight
        seen = information(batch)
        t["information"] = (1 - rate) * t["information"] + rate * seen
        if index == 0:
            t["noise"] = self._fit(chosen, images, torch.zeros_like(images))[1]
        if self.config.prior == "learned":
            t["prior"] = self._learned(index)
        volume = self.volume
        draw = volume.draw(torch.Generator().manual_seed(self.seed * 1_000_003 + index)).detach()
        likelihood, left, noise = self._left(chosen, posed, draw)
        # Mates of a coefficient are one number, which the divergence counts as often as there are mates.
        bound = scale * likelihood - float(volume.divergence(t["prior"]).detach()) / len(self.symmetry)
        towards = posterior_mean(replace(left.scaled(scale), weight=t["weight"]), t["noise"], t["prior"])
        said = seen * volume_to_fourier(draw) + self._precision * volume_to_fourier(towards)
        t["numerator"] = (1 - rate) * t["numerator"] + rate * said
        t["noise"] = (1 - rate) * t["noise"] + rate * noise
        t["mean"] = fourier_to_volume(self.kept * t["numerator"] / self._precision, self.stack.box)
        return {"elbo_per_image": bound / len(self.stack), "rate": rate}

    def _left(
        self, chosen: Int[Tensor, " b"], posed: PosedImages, draw: Float[Tensor, "d d d"]
    ) -> tuple[float, Accumulator, Float[Tensor, " shells"]]:
        """The batch's log-likelihood under a map, its gradient inserted, and the noise the batch shows.

        The gradient is that by predicted pixels times their noise: of the Gaussian likelihood, the image less its prediction.
        """
        grid, strength = slicing_grid(draw, self.disk.radius), self.tensors["noise"][self.disk.shell] / self.disk.weight
        out: Accumulator | None = None
        total, noise = 0.0, torch.zeros_like(self.tensors["noise"])
        for mate in posed.mates(self.symmetry):
            predicted = mate.predicted(grid, self.disk).requires_grad_()
            per_image, shown = self._fit(chosen, mate.images, predicted)
            (gradient,) = torch.autograd.grad(per_image.sum(), [predicted])
            out = mate.inserted(strength * gradient, None, self.disk, out)
            total, noise = total + float(per_image.detach().sum()), noise + shown
        assert out is not None
        return total / len(self.symmetry), out, noise / len(self.symmetry)

    @property
    def _precision(self) -> Float[Tensor, "d d h"]:
        """Of each coefficient, in units of one over the noise."""
        return self.tensors["information"] + self._of(self.tensors["noise"] / self.tensors["prior"])

    def _of(self, spectrum: Float[Tensor, " shells"]) -> Float[Tensor, "d d h"]:
        """A spectrum at each coefficient of the map."""
        return spectrum[self.index.clamp(max=self.shells - 1)]

    def _white(self, variance: float) -> Float[Tensor, " shells"]:
        """``E|n|^2`` of a Fourier pixel, in the stack's units, of noise of that variance in a pixel as it is on disk."""
        power = variance * (self.stack.particles.box * self.stack.scale) ** 2
        return torch.full((self.shells,), power, device=self.stack.device)

    def _learned(self, index: int) -> Float[Tensor, " shells"]:
        """The prior that the sums so far make most probable; in the first pass they have the noise of fewer images."""
        t = self.tensors
        noise = t["noise"] if self.dose is None else self._white(self._mean_count)
        sums = Accumulator(t["inserted"], t["weight"], self.stack.box, _OVERSAMPLING, self.disk.radius)
        return learned_prior(least_squares(sums), noise * max(1.0, self.batches / (index + 1)))

    def _fit(
        self, chosen: Int[Tensor, " b"], images: Complex[Tensor, "b p"], predicted: Complex[Tensor, "b p"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " shells"]]:
        """Log-likelihood of each image, and the noise that the batch shows: ``E|n|^2`` of a Fourier pixel per shell."""
        if self.dose is None:
            power = shell_mean((images - predicted).detach().abs().square().mean(dim=0), self.disk, self.shells)
            noise = self.tensors["noise"][self.disk.shell] / self.stack.box**2
            filled = torch.where(power > 0, power, power[power > 0][-1])  # shells the disk does not reach
            return log_likelihood(images, predicted, noise, self.disk), filled
        counts, excess = self.stack.raw(chosen), self.stack.to_raw(predicted)
        noise = self._white(1 / float(count_information(excess.detach(), self.dose).mean()))
        return count_log_likelihood(counts, excess, self.dose).sum(dim=(1, 2)), noise

    def _batch(self, index: int) -> Int[Tensor, " b"]:
        """Every image once in each pass, in an order of the pass's own."""
        return epoch_batch(len(self.stack), self.config.batch, index, self.seed)[1].sort().values


def _electrons(stack: FourierStack) -> tuple[float, float]:
    """Mean of the pixels around the particles, and of all, over all images; refuses what is not counts of one dose."""
    if stack.is_equalised:
        raise ConfigError(
            "CONF116",
            "the particles are of several optics groups made equal in noise, expected counts as they were found",
            "make the FourierStack with equalise=False, or of the particles of one group",
        )
    around = whole = 0.0
    for part in torch.arange(len(stack)).split(_CHUNK):
        counts = stack.raw(part)
        check_counts(counts, first=int(part[0]))
        around += float(counts[:, stack.background.to(counts.device)].double().mean(dim=1).sum())
        whole += float(counts.double().mean(dim=(1, 2)).sum())
    check_dose(around / len(stack))
    return around / len(stack), whole / len(stack)


def _check(config: VariationalConfig) -> None:
    fine = {
        "likelihood": config.likelihood in LIKELIHOODS,
        "posterior": config.posterior in POSTERIORS,
        "prior": config.prior in PRIORS,
        "epochs": config.epochs > 0,
        "batch": config.batch > 0,
        "decay": 0.5 < config.decay <= 1,
    }
    for name, good in fine.items():
        if not good:
            raise ConfigError(
                "CONF106",
                f"{name} = {getattr(config, name)!r} is out of range",
                f"likelihood: {', '.join(LIKELIHOODS)}; posterior: {', '.join(POSTERIORS)}; prior: {', '.join(PRIORS)}; "
                "epochs and batch at least 1; decay above 0.5, at most 1",
            )
