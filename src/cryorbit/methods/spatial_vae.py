"""spatial-VAE (Bepler et al. 2019), the rival of papers/004: a variational autoencoder whose decoder is a function of coordinates.

Rotation and shift are latents that move the coordinates the decoder is asked at; what is left is content, z. Trained without any truth. The
objective is the ELBO: Gaussian pixels of a fitted variance, standard normal z, ``N(0, spread^2)`` for the angle without the term of its mean
where angles are uniform (their code's choice), ``N(0, shift^2)`` for the shift. Networks are smaller than theirs (one convolutional encoder as
in ``methods/invariant.py``, 64 units in the decoder against 500).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.groups.so2 import SO2
from cryorbit.networks.pictures import CoordinateDecoder, Encoder, coordinates
from cryorbit.simulate.pictures import TurnedPictures
from cryorbit.training.checkpoint import State
from cryorbit.training.optimiser import adam_state, epoch_batch, load_adam

_CHUNK = 500
_WIDE = math.pi  # spread of the angle's prior where angles are uniform


@dataclass(frozen=True)
class SpatialVAEConfig:
    """Settings: numbers in z; the prior's standard deviation of the shift in half sides; epochs, pictures in a step, Adam's rate; the
    decoder's units."""

    latent: int = 8
    shift: float = 0.05
    epochs: int = 30
    batch: int = 128
    rate: float = 1e-3
    units: int = 64


class SpatialVAE:
    """The model and its training; a ``training.loop.Method``.

    Parameters
    ----------
    pictures
        The training set; only turned copies are looked at.
    config
        Settings.
    seed
        Weights, order, angles and samples.
    """

    name = "spatial-vae"

    def __init__(self, pictures: TurnedPictures, config: SpatialVAEConfig, *, seed: int = 0) -> None:
        self.pictures, self.config, self.seed = pictures, config, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = Encoder(pictures.side, 2 * (3 + config.latent))
            self.decoder = CoordinateDecoder(config.latent, config.units)
        self.log_sigma = torch.zeros((), requires_grad=True)
        weights = [*self.encoder.parameters(), *self.decoder.parameters(), self.log_sigma]
        self.optimiser = torch.optim.Adam(weights, lr=config.rate)

    def _moved(self, angle: Float[Tensor, " b"], shift: Float[Tensor, "b 2"]) -> Float[Tensor, "b p 2"]:
        """Where in the canonical picture each pixel of the shown one is looked up: ``g^T (x - s)``."""
        points = coordinates(self.pictures.side, angle)
        return (points - shift[:, None]) @ SO2().matrix(angle)

    def _posterior(self, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of (angle, shift, z)."""
        mean, log_sd = self.encoder(shown).chunk(2, dim=1)
        return mean, log_sd.clamp(-8.0, 3.0)

    @torch.no_grad()
    def canonical(self, shown: Float[Tensor, "n d d"]) -> tuple[Float[Tensor, "n d d"], Float[Tensor, " n"]]:
        """Pictures decoded without turn and shift, and angles in radian, at the posterior's mean; in a frame of the model's own."""
        parts = []
        for part in shown.split(_CHUNK):
            mean, _ = self._posterior(part)
            still = torch.zeros(len(part))
            made = self.decoder(self._moved(still, torch.zeros(len(part), 2)), mean[:, 3:])
            parts.append((made.view_as(part), mean[:, 0]))
        pictures, angles = zip(*parts, strict=True)
        return torch.cat(pictures), torch.cat(angles)

    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.config.epochs * math.ceil(len(self.pictures) / self.config.batch)

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One Adam step on the negative ELBO of a batch, one sample for each picture."""
        _, chosen, generator = epoch_batch(len(self.pictures), self.config.batch, index, self.seed)
        shown, _, _ = self.pictures.draw(chosen, generator)
        mean, log_sd = self._posterior(shown)
        sample = mean + log_sd.exp() * torch.randn(mean.shape, generator=generator)
        made = self.decoder(self._moved(sample[:, 0], sample[:, 1:3]), sample[:, 3:])
        error = (made - shown.flatten(1)).square().sum(1)
        fit = 0.5 * error * torch.exp(-2 * self.log_sigma) + shown[0].numel() * self.log_sigma
        divergence = self._divergence(mean, log_sd)
        loss = (fit + divergence).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return {
            "loss": float(loss.detach()),
            "sse": float(error.detach().mean()),
            "kl": float(divergence.detach().mean()),
        }

    def _divergence(self, mean: Tensor, log_sd: Tensor) -> Float[Tensor, " b"]:
        uniform = math.isinf(self.pictures.spread)
        prior = torch.ones(mean.shape[1])
        prior[0], prior[1:3] = _WIDE if uniform else self.pictures.spread, self.config.shift
        away = (mean / prior).square()
        if uniform:
            away = torch.cat([torch.zeros_like(away[:, :1]), away[:, 1:]], dim=1)
        return (0.5 * (away + (log_sd.exp() / prior).square() - 1) - log_sd + prior.log()).sum(1)

    def state(self) -> State:
        """Weights, and the optimiser's averages."""
        modules = {"encoder": self.encoder, "decoder": self.decoder}
        weights = {f"{n}.{k}": v.detach().clone() for n, m in modules.items() for k, v in m.state_dict().items()}
        return weights | {"log_sigma": self.log_sigma.detach().clone()} | adam_state(self.optimiser)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        self.encoder.load_state_dict({k: state[f"encoder.{k}"] for k in self.encoder.state_dict()})
        self.decoder.load_state_dict({k: state[f"decoder.{k}"] for k in self.decoder.state_dict()})
        with torch.no_grad():
            self.log_sigma.copy_(state["log_sigma"])
        load_adam(self.optimiser, state)
