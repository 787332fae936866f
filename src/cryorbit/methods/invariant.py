"""Rotation-invariant features of pictures (papers/004): an encoder-decoder with one latent for the in-plane angle.

The encoder reads a turned picture and gives an angle and a latent vector z; the decoder makes the unturned picture of z alone. Losses,
equation numbers of the paper: angle ``exp|theta - theta^| - 1`` (1), reconstruction ``|x - x^|_2 + |x - x^|_1`` (2), Wasserstein critic (3),
summed (5).

The preset ``paper004`` follows section 5: Adam at 1e-4, a tenth of it after 200 of 300 epochs, weight decay 1e-5, the critic every 4th step.
Where the paper is silent or cannot be followed: layers are ours (``networks/pictures.py``); (4) adds the critic's loss to the decoder's, in
which D(G(z)) cancels, so each is given its own, as printed in (3); the critic is made Lipschitz by the gradient penalty of the paper's
reference [8], weight 10; the exponent of (1) is cut at 6, where a first guess would overflow.

By default instead: the angle is a point on the circle with the loss ``1 - cos``, which has no jump at half a turn, and weighs 30, because (2)
sums over pixels and drowns it; no critic (docs/methods/invariant.md measures what it brings); Adam at 1e-3.

``supervised = False`` never sees an unturned picture, which is all that real particles offer. Two turned copies of what is shown must give
angles that differ by the turn between them (equivariance), and the picture decoded from one, turned by the angle of the other, must be the
other (a canonical picture). The frame is then free: one turn for all, and possibly another for each kind of picture.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryorbit.errors import ConfigError
from cryorbit.groups.so2 import SO2
from cryorbit.networks.critic import Critic, gradient_penalty
from cryorbit.networks.pictures import Decoder, Encoder
from cryorbit.physics.planar import rotate_images
from cryorbit.simulate.pictures import TurnedPictures
from cryorbit.training.checkpoint import State
from cryorbit.training.optimiser import adam_state, epoch_batch, load_adam

_LARGEST_EXPONENT = 6.0
_PENALTY = 10.0
_CHUNK = 1000


@dataclass(frozen=True)
class InvariantConfig:
    """Settings.

    Attributes
    ----------
    angle
        ``circle``: (cos, sin) and the loss 1 - cos; ``scalar``: one number and the loss of papers/004 eq. 1.
    angle_weight
        Factor on the angle loss: the reconstruction sums over pixels and would drown it (1 in papers/004 eq. 5).
    supervised
        Whether the unturned pictures are shown.
    critic
        Weight of the adversarial loss; 0 leaves the critic out.
    critic_every
        Steps of the decoder for one of the critic.
    latent
        Numbers in z.
    epochs, batch
        Passes over the pictures, and pictures in a step.
    rate, drop_epoch
        Adam's rate, a tenth of it from this epoch on (0: never).
    weight_decay
        Adam's.
    """

    angle: str = "circle"
    angle_weight: float = 30.0
    supervised: bool = True
    critic: float = 0.0
    critic_every: int = 4
    latent: int = 32
    epochs: int = 30
    batch: int = 128
    rate: float = 1e-3
    drop_epoch: int = 20
    weight_decay: float = 1e-5


PRESETS = {
    "default": InvariantConfig(),
    "paper004": InvariantConfig(angle="scalar", angle_weight=1.0, critic=1.0, epochs=300, rate=1e-4, drop_epoch=200),
    "unsupervised": InvariantConfig(supervised=False),
}


def angle_loss(found: Float[Tensor, " b"], truth: Float[Tensor, " b"], kind: str) -> Float[Tensor, ""]:
    """Mean of papers/004 eq. 1 (``scalar``) or of ``1 - cos`` of the difference (``circle``)."""
    apart = found - truth
    if kind == "scalar":
        return (apart.abs().clamp(max=_LARGEST_EXPONENT).exp() - 1).mean()
    return (1 - apart.cos()).mean()


def reconstruction_loss(found: Float[Tensor, "b d d"], truth: Float[Tensor, "b d d"]) -> Float[Tensor, ""]:
    """Mean over pictures of the L2 plus the L1 norm of the difference (papers/004 eq. 2)."""
    apart = (found - truth).flatten(1)
    return ((apart.square().sum(1) + 1e-12).sqrt() + apart.abs().sum(1)).mean()


class Invariant:
    """The model and its training; a ``training.loop.Method``.

    Parameters
    ----------
    pictures
        The training set.
    config
        Settings.
    seed
        Weights, order and angles.
    """

    name = "invariant"

    def __init__(self, pictures: TurnedPictures, config: InvariantConfig, *, seed: int = 0) -> None:
        if config.angle not in ("circle", "scalar"):
            raise ConfigError("CONF431", f"angle is {config.angle!r}, expected circle or scalar")
        if config.angle == "scalar" and not config.supervised:
            raise ConfigError("CONF432", "one number cannot follow a turn without a truth", "use angle = circle")
        self.pictures, self.config, self.seed = pictures, config, seed
        side, numbers = pictures.side, 2 if config.angle == "circle" else 1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder, self.decoder = Encoder(side, config.latent + numbers), Decoder(side, config.latent)
            self.critic = Critic(side)
        both = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimiser = torch.optim.Adam(both, lr=config.rate, weight_decay=config.weight_decay)
        self.critic_optimiser = torch.optim.Adam(
            self.critic.parameters(), lr=config.rate, weight_decay=config.weight_decay, betas=(0.5, 0.9)
        )

    def encode(self, shown: Float[Tensor, "b d d"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b l"]]:
        """Angle in radian and invariant features of each picture."""
        out = self.encoder(shown)
        z, head = out[:, : self.config.latent], out[:, self.config.latent :]
        return (torch.atan2(head[:, 1], head[:, 0] + 1e-9) if head.shape[1] == 2 else head[:, 0]), z

    @torch.no_grad()
    def canonical(self, shown: Float[Tensor, "n d d"]) -> tuple[Float[Tensor, "n d d"], Float[Tensor, " n"]]:
        """Unturned pictures and angles in radian."""
        parts = []
        for part in shown.split(_CHUNK):
            angle, z = self.encode(part)
            parts.append((self.decoder(z), angle))
        pictures, angles = zip(*parts, strict=True)
        return torch.cat(pictures), torch.cat(angles)

    # -- training ---------------------------------------------------------------------------------------------------------------

    def _per_epoch(self) -> int:
        return math.ceil(len(self.pictures) / self.config.batch)

    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.config.epochs * self._per_epoch()

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One step of encoder and decoder, and every so often one of the critic."""
        c = self.config
        epoch, chosen, generator = epoch_batch(len(self.pictures), c.batch, index, self.seed)
        shown, truth, angles = self.pictures.draw(chosen, generator)
        rate = c.rate * (0.1 if c.drop_epoch and epoch >= c.drop_epoch else 1.0)
        for group in (*self.optimiser.param_groups, *self.critic_optimiser.param_groups):
            group["lr"] = rate
        values: dict[str, float | str] = {}
        if c.supervised:
            found, z = self.encode(shown)
            made = self.decoder(z)
            losses = {
                "angle": c.angle_weight * angle_loss(found, angles, c.angle),
                "picture": reconstruction_loss(made, truth),
            }
        else:
            made, losses = self._unsupervised(shown, generator)
            truth = shown
        if c.critic and index % c.critic_every == 0:
            values |= self._critic_step(truth, made.detach(), generator)
        if c.critic:
            losses["adversarial"] = c.critic * self.critic(made).mean()  # eq. 3: the critic is low on real pictures
        self.optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimiser.step()
        return values | {name: float(loss.detach()) for name, loss in losses.items()}

    def _unsupervised(self, shown: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        turns = SO2().random(2 * len(shown), generator)
        first, second = (rotate_images(shown, t) for t in turns.chunk(2))
        (angle_1, z_1), (angle_2, z_2) = self.encode(first), self.encode(second)
        apart = turns[: len(shown)] - turns[len(shown) :]
        made_1, made_2 = self.decoder(z_1), self.decoder(z_2)
        crossed = reconstruction_loss(rotate_images(made_1, angle_2), second)
        crossed = crossed + reconstruction_loss(rotate_images(made_2, angle_1), first)
        turned = self.config.angle_weight * angle_loss(angle_1 - angle_2, apart, "circle")
        return made_1, {"angle": turned, "picture": 0.5 * crossed}

    def _critic_step(self, real: Tensor, made: Tensor, generator: torch.Generator) -> dict[str, float | str]:
        penalty = gradient_penalty(self.critic, real, made, generator)
        gap = self.critic(real).mean() - self.critic(made).mean()
        self.critic_optimiser.zero_grad()
        (gap + _PENALTY * penalty).backward()
        self.critic_optimiser.step()
        return {"critic_gap": float(gap.detach()), "critic_penalty": float(penalty.detach())}

    # -- resume -----------------------------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder, "critic": self.critic}

    def state(self) -> State:
        """Weights, and the optimisers' averages."""
        weights = {
            f"{name}.{k}": v.detach().clone() for name, m in self._modules().items() for k, v in m.state_dict().items()
        }
        return weights | adam_state(self.optimiser) | adam_state(self.critic_optimiser, "critic_adam")

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        for name, module in self._modules().items():
            module.load_state_dict({k: state[f"{name}.{k}"] for k in module.state_dict()})
        load_adam(self.optimiser, state)
        load_adam(self.critic_optimiser, state, "critic_adam")
