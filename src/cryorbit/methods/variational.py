"""Stochastic variational inference of a map at known poses (papers/002 section 5.1): the general path to what ``map_posterior`` has exactly.

* **volume**: Dirac or Gaussian over Fourier coefficients (``volumes/gaussian.py``).
* **poses**: known, one per particle.
* **objective**: the minibatch ELBO of papers/002 eq. 15, written for all N images: ``N / |B|`` times the batch's expected log likelihood
  less the divergence from the prior. The likelihood's gradient is taken by automatic differentiation through a draw of the map (the
  reparameterisation), the prior's in closed form. Likelihoods: Gaussian, of Fourier pixels in noise of a spectrum that is learned
  (``physics/noise.py``), or Poisson, of the electron counts of pixels (papers/002 appendix D; ``physics/counts.py``).

Changed from the paper: steps are natural gradients. The gradient in the mean is divided by the precision of each coefficient; the
precision is averaged over batches with weights that fall (Hoffman et al. 2013, J. Mach. Learn. Res. 14, 1303). So one pass over the images
is nearly the answer. The Gaussian likelihood has its precision in closed form; that of counts is their Fisher information at the draw,
which in Fourier space is taken for its diagonal: white noise. Noise and prior are learned by the same averaging; the dose, which is also the
noise of counts, is the mean of the pixels around the particles, one for all images.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.metrics.fsc import shell_sum
from cryorbit.metrics.resample import move_volume
from cryorbit.physics.counts import check_counts, count_information, count_log_likelihood
from cryorbit.physics.cryoem import form_images
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball, information
from cryorbit.physics.noise import log_likelihood
from cryorbit.physics.slicing import insert_symmetric, slice_grid, slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.local import PoseSamples
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import FourierStack
from cryorbit.volumes.gaussian import GaussianVolume

LIKELIHOODS = ("gaussian", "poisson")
POSTERIORS = ("gaussian", "dirac")
PRIORS = ("learned", "standard")
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
        self.dose = _dose(stack) if config.likelihood == "poisson" else None
        d = stack.box
        self.tensors: State = {
            "mean": torch.zeros(d, d, d, device=stack.device),
            "precision": torch.ones(d, d, d // 2 + 1, device=stack.device),
            "noise": torch.ones(self.shells, device=stack.device),
            "prior": torch.full((self.shells,), 2.0, device=stack.device),
        }

    @property
    def volume(self) -> GaussianVolume:
        """The distribution so far."""
        if self.config.posterior == "dirac":
            return GaussianVolume.from_map(self.tensors["mean"])
        return GaussianVolume.from_map(self.tensors["mean"], variance=self.kept / self.tensors["precision"])

    def state(self) -> State:
        """Everything a resumed run needs."""
        return dict(self.tensors)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        self.tensors = {name: value.to(self.stack.device) for name, value in state.items()}

    def total_steps(self) -> int:
        """Batches of all passes."""
        return self.config.epochs * self.batches

    def finished(self) -> bool:
        """Never early."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One batch: precision, noise and prior in closed form, the mean along the natural gradient of a draw."""
        t, rate = self.tensors, (1 + index) ** -self.config.decay
        chosen = self._batch(index)
        scale = len(self.stack) / len(chosen)
        ctf = self.stack.ctf(chosen)
        if self.dose is not None:
            ctf = ctf / self.stack.equalisation(chosen)  # counts are as they were found
        rotations, shifts = (x[chosen].to(ctf.device) for x in (self.poses.rotations, self.poses.shifts))
        if index == 0:
            t["noise"] = self._fit(chosen, torch.zeros_like(ctf, dtype=torch.complex64))[1]
            t["prior"] = t["noise"].clone() if self.config.prior == "learned" else t["prior"]
        t["precision"] = (1 - rate) * t["precision"] + rate * self._precision(rotations, ctf, scale)
        volume = self.volume
        draw = volume.draw(torch.Generator().manual_seed(self.seed * 1_000_003 + index))
        slices = slice_grid(slicing_grid(draw, self.disk.radius), rotations, self.disk)
        per_image, noise = self._fit(chosen, form_images(slices, shifts, self.disk, ctf))
        likelihood = scale * per_image.sum()
        (gradient,) = torch.autograd.grad(likelihood, [volume.data])
        pull = volume_to_fourier(t["mean"]) / t["prior"][self.index.clamp(max=self.shells - 1)]
        natural = (volume_to_fourier(self._symmetrised(gradient)) / self.stack.box**3 - pull) / t["precision"]
        t["mean"] = t["mean"] + rate * fourier_to_volume(natural * self.kept, self.stack.box)
        elbo = float((likelihood - volume.divergence(t["prior"])).detach()) / len(self.stack)
        self._learn(noise, rate)
        return {"elbo_per_image": elbo, "rate": rate}

    def _fit(
        self, chosen: Int[Tensor, " b"], predicted: Complex[Tensor, "b p"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " shells"]]:
        """Log-likelihood of each image, and the noise that the batch shows: ``E|n|^2`` of a Fourier pixel per shell."""
        if self.dose is None:
            images = self.stack.images(chosen)
            power = (images - predicted).detach().abs().square().mean(dim=0)
            per_shell = shell_mean(power, self.disk, self.shells)
            noise = self.tensors["noise"][self.disk.shell] / self.stack.box**2
            return log_likelihood(images, predicted, noise, self.disk), _filled(per_shell)
        counts, excess = self.stack.raw(chosen), self.stack.to_raw(predicted)
        variance = float(1 / count_information(excess.detach(), self.dose).mean())
        white = torch.full((self.shells,), variance * (counts.shape[-1] * self.stack.scale) ** 2, device=counts.device)
        return count_log_likelihood(counts, excess, self.dose).sum(dim=(1, 2)), white

    def _batch(self, index: int) -> Int[Tensor, " b"]:
        """Every image once in each pass, in an order of the pass's own."""
        epoch, number = divmod(index, self.batches)
        order = torch.randperm(len(self.stack), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return order[number * self.config.batch : (number + 1) * self.config.batch].sort().values

    def _precision(
        self, rotations: Float[Tensor, "b 3 3"], ctf: Float[Tensor, "b p"], scale: float
    ) -> Float[Tensor, "d d h"]:
        """What the batch, taken for all images, says of the precision's diagonal: inserted CTF^2 over noise, and the prior."""
        weights = ctf.square()
        acc = insert_symmetric(weights.to(torch.complex64), weights, rotations, self.symmetry, self.disk)
        shell = self.index.clamp(max=self.shells - 1)
        return scale * information(acc) / self.tensors["noise"][shell] + 1 / self.tensors["prior"][shell]

    def _symmetrised(self, gradient: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """The gradient summed over the group: images show every mate of the map."""
        if len(self.symmetry) == 1:
            return gradient
        still = torch.zeros(3)
        return torch.stack([move_volume(gradient, element, still) for element in self.symmetry]).sum(dim=0)

    def _learn(self, noise: Float[Tensor, " shells"], rate: float) -> None:
        """The noise of the batch, and the prior that makes the distribution itself most probable."""
        t = self.tensors
        t["noise"] = (1 - rate) * t["noise"] + rate * noise
        if self.config.prior == "standard":
            return
        variance = self.kept / t["precision"]
        second = (volume_to_fourier(t["mean"]).abs().square() + variance) * self.kept
        count = shell_sum(self.kept, self.index, self.stack.box)
        found = shell_sum(second, self.index, self.stack.box) / count.clamp_min(1)
        t["prior"] = torch.where(count > 0, (1 - rate) * t["prior"] + rate * found.clamp_min(1e-12), t["prior"])


def _filled(power: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
    """Shells the disk does not reach take the last one's value."""
    return torch.where(power > 0, power, power[power > 0][-1])


def _dose(stack: FourierStack) -> float:
    """Mean of the pixels around the particles, all images together: of few electrons one image has too few to tell."""
    total = 0.0
    for part in torch.arange(len(stack)).split(_CHUNK):
        counts = stack.raw(part)
        check_counts(counts, first=int(part[0]))
        total += float(counts[:, stack.background.to(counts.device)].double().mean(dim=1).sum())
    return total / len(stack)


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
