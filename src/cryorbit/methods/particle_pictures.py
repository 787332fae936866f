"""Each particle's own picture, without noise and in one orientation, learnt from particles alone: papers/004 as a likelihood.

The paper's aim with what real particles offer: no unturned picture, no true angle, but CTFs, shifts and coloured noise. An encoder that a
turn of the image does not change (``PolarEncoder``) gives features z of the image, a decoder makes a picture of z, and what is maximised is the
likelihood of the image given that picture,

``p(y) = sum over angles and shifts of p(angle) p(shift) N(y; c e_shift (g_angle . picture(z)), noise)``,

whole sums over a grid (``poses/own.py``), Gaussian noise of one variance per spectral shell that is fitted along. Nothing guesses an angle or a
shift: both are read off the posterior at the end. The encoder sees the image whitened, times its CTF: ``y c / sqrt(noise)``.

The frame is the model's own, one turn for all pictures that grow out of one another. Mirror images are different pictures.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.groups.so2 import SO2
from cryorbit.metrics.masks import soft_disc
from cryorbit.networks.pictures import Decoder, PolarEncoder
from cryorbit.physics.fourier import disk_to_images, images_to_disk
from cryorbit.physics.planar import PolarGrid
from cryorbit.physics.spectrum import followed_noise, shell_mean
from cryorbit.physics.turning import planes_of, turned
from cryorbit.poses.grid import shift_grid
from cryorbit.poses.own import OwnPosterior, own_posterior
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack
from cryorbit.training.optimiser import adam_state, epoch_batch, load_adam, warm_cosine

_NOISE_RATE = 0.1
_SHIFT_STEP = 0.38  # of the box over the Fourier radius
_FIRST = 1000  # images that the first noise is measured on
_CHUNK = 500
_SPREAD = 3.0  # a decoded value of 1, in root mean powers of a Fourier pixel of the particles


@dataclass(frozen=True)
class ParticlePicturesConfig:
    """Settings.

    Attributes
    ----------
    latent
        Numbers in z.
    periods
        Fourier radius, in units of 1 / particle diameter.
    shift_range
        Largest shift searched, in particle diameters; 0 searches none.
    steps, batch
        Adam's steps, and images in one.
    rate
        Adam's highest rate; it falls to nothing as half a period of a cosine.
    """

    latent: int = 16
    periods: float = 8.0
    shift_range: float = 0.1
    steps: int = 3000
    batch: int = 64
    rate: float = 1e-3


@dataclass(frozen=True)
class Seen:
    """What is made of a batch of particles.

    Attributes
    ----------
    pictures
        (B, D, D) without noise and CTF, up to the Fourier radius, in the model's frame, on the scale of the stack's Fourier pixels.
    features
        (B, L) z.
    angles, shifts
        (B,) radian as in ``groups.so2``, (B, 2) pixels of the working box: the most probable ones.
    gain
        (B,) log marginal likelihood over that of noise alone, nats.
    """

    pictures: Float[Tensor, "b d d"]
    features: Float[Tensor, "b l"]
    angles: Float[Tensor, " b"]
    shifts: Float[Tensor, "b 2"]
    gain: Float[Tensor, " b"]


class ParticlePictures:
    """The model and its training; a ``training.loop.Method``.

    Parameters
    ----------
    stack
        Particles as Fourier pixels up to ``config.periods``.
    config
        Settings.
    mask_diameter
        Particle diameter in angstrom.
    seed
        Weights and batches.
    """

    name = "particle-pictures"

    def __init__(
        self, stack: FourierStack, config: ParticlePicturesConfig, *, mask_diameter: float, seed: int = 0
    ) -> None:
        for name in ("latent", "periods", "steps", "batch", "rate"):
            value = getattr(config, name)
            if not 0 < value < math.inf:
                raise ConfigError("CONF435", f"{name} = {value} makes no pictures", f"give {name} > 0")
        if not 0 <= config.shift_range < 0.5:
            raise ConfigError(
                "CONF436", f"shift_range = {config.shift_range} is no shift", "give 0 to 0.5 particle diameters"
            )
        self.stack, self.config, self.seed, device = stack, config, seed, stack.device
        side = stack.box * stack.pixel_size
        if not 4 * stack.pixel_size <= mask_diameter <= side:
            raise ConfigError(
                "CONF437",
                f"the mask diameter is {mask_diameter:g} A, expected {4 * stack.pixel_size:.4g} to {side:.4g}, the box",
                "give the particle's diameter in angstrom",
            )
        per_diameter = side / mask_diameter
        self.radius = max(2, min(round(config.periods * per_diameter), int(stack.disk.radius), (stack.box - 1) // 2))
        self.disk, self._keep = stack.at_radius(self.radius)
        self.mask = soft_disc(stack.box, 0.5 * mask_diameter / stack.pixel_size).to(device)
        count = max(6, math.ceil(math.pi * self.radius / per_diameter))
        self.angles = (torch.arange(count) * (math.pi / count)).to(device)
        limit = config.shift_range * mask_diameter / stack.pixel_size
        step = min(_SHIFT_STEP * stack.box / self.radius, max(limit, 1e-3))
        self.shifts = shift_grid(limit, step, 0.5 * limit)
        self.grid = PolarGrid(stack.box)
        first, _ = self._images(torch.arange(min(_FIRST, len(stack))))
        self.initial_noise = shell_mean(first.abs().square().mean(dim=0), self.disk, self.radius + 2)
        self.noise = self.initial_noise.clone()
        self.strength = _SPREAD * math.sqrt(self._signal())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = PolarEncoder(self.grid.rings, config.latent).to(device)
            self.decoder = Decoder(stack.box, config.latent).to(device)
        self.optimiser = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=config.rate)

    def _signal(self) -> float:
        """Mean power of a particle in a pixel, beyond the background's where that can be measured."""
        background = self.stack.background_power
        total = self.initial_noise[1 : self.radius + 1]
        left = total if background is None else total - background.to(total)[1 : self.radius + 1]
        return max(float(left.mean()), 1e-3 * float(total.mean()))

    # -- the model --------------------------------------------------------------------------------------------------------------

    def _images(self, chosen: Int[Tensor, " b"]) -> tuple[Complex[Tensor, "b p"], Float[Tensor, "b p"]]:
        return self.stack.images(chosen)[:, self._keep], self.stack.ctf(chosen)[:, self._keep]

    def _features(self, images: Tensor, ctf: Tensor) -> Float[Tensor, "b l"]:
        filtered = disk_to_images(images * ctf / self.noise[self.disk.shell].sqrt(), self.disk)
        spread = filtered.square().mean(dim=(1, 2), keepdim=True).sqrt()
        return self.encoder(self.grid.sample(filtered / spread.clamp_min(1e-12)))

    def _posterior(self, images: Tensor, ctf: Tensor) -> tuple[Tensor, Tensor, OwnPosterior]:
        """Features, pictures, and where each picture may lie in its image."""
        z = self._features(images, ctf)
        pictures = self.decoder(z) * (self.strength * self.mask)
        slices = turned(planes_of(pictures, float(self.radius)), self.angles, self.disk)
        precision = self.disk.weight / self.noise[self.disk.shell]
        return z, pictures, own_posterior(images, ctf, slices, precision, self.shifts, self.disk)

    @torch.no_grad()
    def canonical(self, chosen: Int[Tensor, " n"]) -> Seen:
        """Pictures, features and poses of the particles ``chosen``."""
        parts = []
        for part in chosen.split(_CHUNK):
            z, pictures, posterior = self._posterior(*self._images(part))
            best = posterior.scores.flatten(1).argmax(dim=1)
            shift, turn = best // (2 * len(self.angles)), best % (2 * len(self.angles))
            angle = torch.cat([self.angles, self.angles + math.pi])[turn]
            parts.append(
                (
                    disk_to_images(images_to_disk(pictures, self.disk), self.disk),  # what is compared, and no more
                    z,
                    SO2().compose(angle, torch.zeros_like(angle)),
                    self.shifts.points.to(angle)[shift],
                    posterior.log_evidence,
                )
            )
        return Seen(*(torch.cat(values) for values in zip(*parts, strict=True)))

    # -- training ---------------------------------------------------------------------------------------------------------------

    def total_steps(self) -> int:
        """As many as are set."""
        return self.config.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One Adam step on minus the mean log likelihood of a batch; the noise follows."""
        _, chosen, _ = epoch_batch(len(self.stack), self.config.batch, index, self.seed)
        rate = self.config.rate * warm_cosine(index, self.config.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        images, ctf = self._images(chosen)
        _, _, posterior = self._posterior(images, ctf)
        gain = posterior.log_evidence.mean()
        self.optimiser.zero_grad()
        (-gain).backward()
        self.optimiser.step()
        residual = posterior.residual(images, ctf) / len(chosen)
        self.noise = followed_noise(self.noise, self.initial_noise, residual, self.disk, self.radius, _NOISE_RATE)
        inside = slice(1, self.radius + 1)
        return {
            "gain": float(gain.detach()),
            "effective_poses": float(posterior.chances().detach().flatten(1).square().sum(dim=1).reciprocal().median()),
            "noise_fraction": float(self.noise[inside].mean() / self.initial_noise[inside].mean()),
        }

    # -- resume -----------------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Weights, noise, the scale of pictures, and the optimiser's averages."""
        modules = {"encoder": self.encoder, "decoder": self.decoder}
        weights = {f"{n}.{k}": v.detach().clone() for n, m in modules.items() for k, v in m.state_dict().items()}
        scale = {"noise": self.noise.clone(), "initial_noise": self.initial_noise.clone()}
        return weights | scale | {"strength": torch.tensor([self.strength]).double()} | adam_state(self.optimiser)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        self.encoder.load_state_dict({k: state[f"encoder.{k}"] for k in self.encoder.state_dict()})
        self.decoder.load_state_dict({k: state[f"decoder.{k}"] for k in self.decoder.state_dict()})
        noise = fitted(state, {"noise": self.noise.shape, "initial_noise": self.noise.shape, "strength": (1,)})
        self.noise, self.initial_noise = (noise[k].to(self.stack.device) for k in ("noise", "initial_noise"))
        self.strength = float(noise["strength"])
        load_adam(self.optimiser, state)
