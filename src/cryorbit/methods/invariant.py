"""Rotation-invariant features of pictures (papers/004): an encoder-decoder with one latent for the in-plane angle.

The encoder reads a turned picture and gives an angle and a latent vector z; the decoder makes the unturned picture of z alone. Losses,
equation numbers of the paper: angle ``exp|theta - theta^| - 1`` (1), reconstruction ``|x - x^|_2 + |x - x^|_1`` (2), Wasserstein critic (3),
summed (5).

The preset ``paper004`` follows section 5: Adam at 1e-4, a tenth of it after 200 of 300 epochs, weight decay 1e-5, the critic every 4th step.
Where the paper is silent or cannot be followed: layers are ours (``networks/pictures.py``); (4) adds the critic's loss to the decoder's, in
which D(G(z)) cancels, so each is given its own, as printed in (3); the critic is made Lipschitz by the gradient penalty of the paper's
reference [8], weight 10; the exponent of (1) is cut at 6, where a first guess would overflow.

By default instead the encoder reads a picture on rings from every angle of a grid on (``DirectedEncoder``): turned, the picture has the same
scores one place on, and z read from where it begins is the same. Scores, a classification of the true angle, and the prior of the angles say
where to begin; what z decodes to is laid on what is shown at every angle, and its fit, under noise as strong as the pictures, is added to them
before the peak is taken: it tells angles apart that are neighbours on the grid. ``fitted`` does without scores: z is exactly invariant
(``PolarEncoder``), and prior and fit under white noise of a fitted variance decide. ``circle`` guesses a point on the circle with the loss
``1 - cos``, which has no jump at half a turn, and weighs 30, because (2) sums over pixels and drowns it. All are without a critic
(docs/methods/invariant.md measures what it brings) and at Adam's 1e-3.

``supervised = False`` never sees an unturned picture, which is all that real particles offer: what is minimised is minus the log likelihood of
what is shown, marginal over the angles of the grid. The frame is then free: one turn for all, and possibly another for each kind of picture.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cryorbit.errors import ConfigError
from cryorbit.groups.so2 import SO2
from cryorbit.networks.critic import Critic, gradient_penalty
from cryorbit.networks.pictures import Decoder, DirectedEncoder, Encoder, PolarEncoder
from cryorbit.physics.planar import PolarGrid
from cryorbit.simulate.pictures import TurnedPictures
from cryorbit.training.checkpoint import State
from cryorbit.training.optimiser import adam_state, epoch_batch, load_adam

_LARGEST_EXPONENT = 6.0
_PENALTY = 10.0
_CHUNK = 1000
_LEAST = 1e-5  # of the pictures' power, below which the fitted variance does not fall: pictures without noise have none
_FOLLOW = 0.05  # share of a batch in the running variance
_WAYS, _AROUND = 2, math.pi / 4 + 1e-3  # pictures that may be meant, and how far around an angle one is the same
ANGLES = ("directed", "fitted", "circle", "scalar")


@dataclass(frozen=True)
class InvariantConfig:
    """Settings.

    Attributes
    ----------
    angle
        ``directed``: the best on a grid of angles, by learnt scores of what is shown and by the decoded picture; ``fitted``: the same
        without scores; ``circle``: (cos, sin) and the loss 1 - cos; ``scalar``: one number and the loss of papers/004 eq. 1.
    angle_weight
        Factor on the angle loss: the reconstruction sums over pixels and would drown it (1 in papers/004 eq. 5); ``fitted`` has none.
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

    angle: str = "directed"
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
    "unsupervised": InvariantConfig(angle="fitted", supervised=False),
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
        if config.angle not in ANGLES:
            raise ConfigError("CONF431", f"angle is {config.angle!r}, expected one of {', '.join(ANGLES)}")
        if config.angle != "fitted" and not config.supervised:
            raise ConfigError(
                "CONF432", f"angle = {config.angle} cannot be learnt without a truth", "use angle = fitted"
            )
        if config.critic and not config.supervised:
            raise ConfigError(
                "CONF433", "a critic compares with unturned pictures, of which none are shown", "use critic = 0"
            )
        self.pictures, self.config, self.seed = pictures, config, seed
        side, self.grid = pictures.side, PolarGrid(pictures.side)
        away = SO2().distance(self.grid.steps(), SO2().identity())
        self.prior = torch.log_softmax(
            -0.5 * (away / pictures.spread).square(), dim=0
        )  # uniform for an infinite spread
        self.variance = pictures.pictures.square().mean() + pictures.noise**2  # of a pixel about its prediction
        self.least = _LEAST * self.variance
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder: nn.Module
            if config.angle == "directed":
                self.encoder = DirectedEncoder(self.grid.rings, self.grid.angles, config.latent)
            elif config.angle == "fitted":
                self.encoder = PolarEncoder(self.grid.rings, config.latent)
            else:
                self.encoder = Encoder(side, config.latent + (2 if config.angle == "circle" else 1))
            self.decoder, self.critic = Decoder(side, config.latent), Critic(side)
        both = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimiser = torch.optim.Adam(both, lr=config.rate, weight_decay=config.weight_decay)
        self.critic_optimiser = torch.optim.Adam(
            self.critic.parameters(), lr=config.rate, weight_decay=config.weight_decay, betas=(0.5, 0.9)
        )

    def features(self, shown: Float[Tensor, "b d d"]) -> Float[Tensor, "b l"]:
        """z of each picture."""
        return self._encode(shown)[0]

    def _encode(
        self, shown: Tensor, begin: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b n"]]:
        """z, read from step ``begin`` on where there is a choice; and what is known of the angle before z is decoded: the log chance of each
        on the grid, or a guess of one number or a point."""
        if self.config.angle == "directed":
            z, chance = self.encoder(self.grid.sample(shown), self.prior, begin)
            return z, chance
        if self.config.angle == "fitted":
            return self.encoder(self.grid.sample(shown)), self.prior.expand(len(shown), -1)
        out = self.encoder(shown)
        return out[:, : self.config.latent], out[:, self.config.latent :]

    def _scored(self, known: Tensor, misfit: Float[Tensor, "b a"]) -> Float[Tensor, "b a"]:
        """Score of each angle of the grid: what is known, and the squared distance of what is shown from what is made."""
        return known - 0.5 * misfit / self.variance

    def _guess(self, head: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """Angle in radian."""
        return torch.atan2(head[:, 1], head[:, 0] + 1e-9) if head.shape[1] == 2 else head[:, 0]

    @torch.no_grad()
    def canonical(self, shown: Float[Tensor, "n d d"]) -> tuple[Float[Tensor, "n d d"], Float[Tensor, " n"]]:
        """Unturned pictures and angles in radian."""
        parts = []
        for part in shown.split(_CHUNK):
            if isinstance(self.encoder, DirectedEncoder):
                parts.append(self._both_ways(self.encoder, part))
            else:
                parts.append(self._one_way(part))
        pictures, angles = zip(*parts, strict=True)
        return torch.cat(pictures), torch.cat(angles)

    def _one_way(self, shown: Tensor) -> tuple[Tensor, Tensor]:
        z, known = self._encode(shown)
        made = self.decoder(z)
        if self.config.angle != "fitted":
            return made, self._guess(known)
        return made, self.grid.peak(self._scored(known, self.grid.distance(shown, made)))

    def _both_ways(self, encoder: DirectedEncoder, shown: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the pictures read from the likeliest angle and from the likeliest far from it, each by what is likely around it, which
        errs least where a picture may be either way up; the angle is the best of those around the likelier."""
        features, chance = encoder.look(self.grid.sample(shown), self.prior)
        left, pictures, angles, masses = chance, [], [], []
        for _ in range(_WAYS):
            begin = left.argmax(dim=-1)
            around = self.grid.away(begin) <= _AROUND
            masses.append(left.masked_fill(~around, -torch.inf).logsumexp(dim=-1))
            made = self.decoder(encoder.read(features, begin))
            pictures.append(made)
            angles.append(self.grid.peak(self._scored(chance, self.grid.distance(shown, made)), around))
            left = left.masked_fill(around, -torch.inf)
        share = torch.stack(masses).softmax(dim=0)
        best = share.argmax(dim=0, keepdim=True)
        mean = (share[..., None, None] * torch.stack(pictures)).sum(dim=0)
        return mean, torch.stack(angles).gather(0, best)[0]

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
        z, known = self._encode(shown, self.grid.nearest(angles))
        made = self.decoder(z)
        losses: dict[str, Tensor] = {}
        if c.supervised:
            losses["picture"] = reconstruction_loss(made, truth)
        if c.angle == "directed":
            losses["angle"] = -c.angle_weight * self.grid.at(known, angles).mean()
        elif c.angle == "fitted":
            marginal = self._marginal(known, self.grid.distance(shown, made.detach() if c.supervised else made))
            if not c.supervised:
                losses["marginal"] = marginal
        else:
            losses["angle"] = c.angle_weight * angle_loss(self._guess(known), angles, c.angle)
        if c.critic and index % c.critic_every == 0:
            values |= self._critic_step(truth, made.detach(), generator)
        if c.critic:
            losses["adversarial"] = c.critic * self.critic(made).mean()  # eq. 3: the critic is low on real pictures
        self.optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimiser.step()
        return values | {name: float(loss.detach()) for name, loss in losses.items()}

    def _marginal(self, known: Tensor, misfit: Float[Tensor, "b a"]) -> Float[Tensor, ""]:
        """Minus the mean log likelihood of pictures, marginal over the angle, in units of the squared misfit; follows the variance."""
        likely, variance = self._scored(known, misfit), self.variance
        left = (likely.softmax(dim=1) * misfit).detach().sum(dim=1).mean() / self.pictures.pictures[0].numel()
        self.variance = torch.maximum((1 - _FOLLOW) * variance + _FOLLOW * left, self.least)
        return -2 * variance * likely.logsumexp(dim=1).mean()

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
        weights["variance"] = self.variance.clone()
        return weights | adam_state(self.optimiser) | adam_state(self.critic_optimiser, "critic_adam")

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        for name, module in self._modules().items():
            module.load_state_dict({k: state[f"{name}.{k}"] for k in module.state_dict()})
        self.variance = state["variance"].clone()
        load_adam(self.optimiser, state)
        load_adam(self.critic_optimiser, state, "critic_adam")
