"""A network from the moments of particle images to a map, taught on random molecules: the supervised inversion that papers/003 thinks possible
for cryo-EM and names as future work. A learned answer to the question which of the maps of like moments a molecule would have.

* **material**: molecules of ``simulate/proteins.py`` in the ball basis, each seen from a density of views drawn afresh at every step (mixtures
  of von Mises-Fisher, narrow to broad, some partly uniform): exact moments, by products of constant matrices.
* **input**: both moments over the root power of their rings (contrast drops out), the logarithm of the power relative to the mass, whitened by
  principal components down to ``noise``, which is also added while learning.
* **output**: coefficients of the map. Moments know neither frame nor hand: the loss is one minus the correlation at the best rotation and hand
  (``volumes/ball_match.py``), every coefficient times its wavenumber to the power ``emphasis``; of several heads the best one's, and a
  little of the others' mean, lest one is never used.

The density is not predicted: given a map, moments are linear in it. The map that comes out is the mean of what is possible, so too smooth,
and does not have the moments exactly: it is a start for the inversion of ``methods/moments.py``.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from cryorbit.errors import ConfigError
from cryorbit.networks.residual import ResidualNetwork
from cryorbit.physics.image_moments import ImageMoments, ring_power
from cryorbit.simulate.orientations import random_directions
from cryorbit.simulate.proteins import Proteins
from cryorbit.training.checkpoint import State
from cryorbit.training.optimiser import adam_state, load_adam, warm_cosine
from cryorbit.volumes.ball import BallBasis, BallSlices
from cryorbit.volumes.ball_match import BallMatch

_MEASURED = 16  # batches that the whitening is measured on
_OTHERS = 0.05  # weight of the mean over all heads in the loss
_SCALES = ("mean", "whitening", "spread")  # principal axes have no sign of their own: another machine's may differ
_CLAMP = 6.0  # standard deviations that an input may be off


@dataclass(frozen=True)
class PriorConfig:
    """Settings of the training.

    Attributes
    ----------
    molecules
        Drawn once.
    steps, batch
        Optimiser steps, and pairs of molecule and density in each.
    rate
        Highest learning rate.
    width, blocks
        Of the network.
    noise
        Standard deviation of the errors of the inputs, in units where the moments of a ring with itself are 1.
    emphasis
        Power of the wavenumber in the loss.
    heads
        Maps that come out; the best of them counts, so that they may differ where the moments allow several.
    """

    molecules: int = 20_000
    steps: int = 1000
    batch: int = 256
    rate: float = 1e-3
    width: int = 1024
    blocks: int = 3
    noise: float = 2e-3
    emphasis: float = 1.0
    heads: int = 4


def random_densities(
    directions: Float[Tensor, "v 3"], count: int, generator: torch.Generator
) -> Float[Tensor, "count v"]:
    """Densities over directions that sum to 1: one to eight von Mises-Fisher lobes of kappa about 1 to 25, four in ten with a uniform part."""
    lobes = 8
    means = random_directions(count * lobes, generator).float().view(count, lobes, 3)
    kappa = torch.exp(
        3.2 * torch.rand(count, 1, generator=generator) + 0.4 * torch.randn(count, lobes, generator=generator)
    )
    there = torch.arange(lobes) < torch.randint(1, lobes + 1, (count, 1), generator=generator)
    weight = kappa / (1 - torch.exp(-2 * kappa)) * there
    heights = torch.exp(kappa[..., None] * (means @ directions.float().mT - 1))
    density = (weight[..., None] * heights).sum(dim=1)
    share = torch.rand(count, 1, generator=generator) * (torch.rand(count, 1, generator=generator) < 0.4)
    return (1 - share) * density / density.sum(dim=1, keepdim=True) + share / len(directions)


def scaled_moments(first: Complex[Tensor, "b k"], second: Complex[Tensor, "b m k k"]) -> Float[Tensor, "b f"]:
    """Real numbers that say all that both moments say but the contrast: (B, F)."""
    power = ring_power(second)
    power = torch.maximum(power, 1e-9 * power.amax(dim=1, keepdim=True))
    scale = power.rsqrt()
    rings = torch.triu_indices(second.shape[2], second.shape[3])
    m2 = (second * scale[:, None, :, None] * scale[:, None, None])[:, :, rings[0], rings[1]].flatten(1)
    m1 = first * scale
    falloff = 0.3 * (power / first.real[:, :1].square().clamp_min(1e-30)).log()
    return torch.cat([m2.real, m2.imag, m1.real, m1.imag, falloff], dim=1)


class MomentPrior:
    """The network and its training; a ``training.loop.Method``.

    Parameters
    ----------
    basis
        Of the maps that come out.
    rotations
        (V, 3, 3): views of the densities while learning.
    rings
        ``k = 0 .. rings`` of the moments.
    family
        Molecules to learn from.
    config
        Settings.
    seed
        Of everything drawn.

    Raises
    ------
    ConfigError
        CONF117 settings out of range.
    """

    name = "moment_prior"

    def __init__(
        self,
        basis: BallBasis,
        rotations: Float[Tensor, "v 3 3"],
        rings: int,
        family: Proteins,
        config: PriorConfig,
        seed: int = 0,
    ) -> None:
        sizes = (config.molecules, config.steps, config.batch, config.width, config.blocks + 1, config.heads)
        positive = all(0 < x < math.inf for x in (config.noise, config.rate)) and math.isfinite(config.emphasis)
        if min(sizes) < 1 or config.molecules < 2 or not positive or not 2 <= rings <= basis.rings:
            raise ConfigError(
                "CONF117",
                f"{config} cannot learn moments of {rings} rings in a basis of {basis.rings}",
                "two molecules or more, every count at least 1, noise and rate above 0, from 2 rings to those of the basis",
            )
        self.basis, self.rings, self.config, self.seed = basis, rings, config, seed
        self.directions = rotations[:, 2].float()
        self.slices = BallSlices(basis, rotations, rings, basis.degrees)
        self.match = BallMatch(basis)
        generator = torch.Generator().manual_seed(seed)
        self.molecules = family.coefficients(basis, config.molecules, generator)
        self.spread = self.molecules.std(dim=0)
        weight = basis.wavenumbers.float() ** config.emphasis
        self.weight = weight / weight.mean()
        drawn = torch.cat([self.draw(generator)[1] for _ in range(_MEASURED)])
        self.mean = drawn.mean(dim=0)
        _, values, axes = torch.linalg.svd(drawn - self.mean, full_matrices=False)
        deviation = values / len(drawn) ** 0.5
        kept = int((deviation > config.noise / 2).sum())
        self.whitening = axes[:kept].mT / (deviation[:kept] + config.noise)
        self._make_network()

    def _make_network(self) -> None:
        """A fresh one for as many inputs as there are whitened ones."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            outputs = self.config.heads * len(self.basis)
            self.network = ResidualNetwork(self.whitening.shape[1], outputs, self.config.width, self.config.blocks)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=self.config.rate, weight_decay=1e-2)

    def moments(
        self, coefficients: Float[Tensor, "b n"], density: Float[Tensor, "b v"]
    ) -> tuple[Complex[Tensor, "b k"], Complex[Tensor, "b m k k"]]:
        """First and second moments of maps, each seen from its own density."""
        slices = self.slices.batch(coefficients)
        weighed = slices * density[:, None, :, None]
        return weighed[:, 0].sum(dim=1), weighed.mT @ slices.conj()

    def draw(self, generator: torch.Generator) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b f"]]:
        """A batch of molecules, and their moments from densities of their own."""
        which = torch.randint(len(self.molecules), (self.config.batch,), generator=generator)
        density = random_densities(self.directions, len(which), generator)
        molecules = self.molecules[which]
        return molecules, scaled_moments(*self.moments(molecules, density))

    def _whitened(self, scaled: Float[Tensor, "b f"]) -> Float[Tensor, "b i"]:
        """Inputs of the network."""
        return (scaled - self.mean) @ self.whitening

    def _maps(self, scaled: Float[Tensor, "b f"]) -> Float[Tensor, "b h n"]:
        """Outputs of the network, of any length."""
        out: Tensor = self.network(self._whitened(scaled).clamp(-_CLAMP, _CLAMP))
        return out.view(len(scaled), self.config.heads, -1) * self.spread

    def _scaled(self, moments: ImageMoments) -> Float[Tensor, "1 f"]:
        """Moments of centred particles as the network takes them.

        Raises
        ------
        ConfigError
            CONF120 of another box or circle, or too few rings.
        DataError
            DATA409 moments without a signal; DATA416 shifts that leave too little of them.
        """
        moments.check()
        found, needed = moments.centred_basis, self.basis
        if (found.box, found.radius) != (needed.box, needed.radius) or found.rings < self.rings:
            raise ConfigError(
                "CONF120",
                f"moments on {found} for a network of box {needed.box}, radius {needed.radius:g} and {self.rings} rings",
                "measure the moments on the network's rings, or train one for these",
            )
        inner = moments.within(self.rings)
        inner = inner.centred() if moments.shift_sigma_px else inner
        second = inner.second[: self.basis.degrees + 1]
        return scaled_moments(*(x.to(torch.complex64)[None] for x in (inner.first, second)))

    @torch.no_grad()
    def predict(self, moments: ImageMoments) -> Float[Tensor, "h n"]:
        """Coefficients of the maps that each head takes the moments for, of any scale, each in a frame and hand of its own."""
        return self._maps(self._scaled(moments))[0]

    def strangeness(self, moments: ImageMoments) -> float:
        """Root mean square of the whitened inputs: below 1 for most of what the network has learnt from, large for what is unlike it."""
        return float(self._whitened(self._scaled(moments)).square().mean().sqrt())

    def total_steps(self) -> int:
        """As configured."""
        return self.config.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One batch of molecules seen from fresh densities."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index + 1)
        truth, scaled = self.draw(generator)
        scaled = scaled + self.config.noise * torch.randn(scaled.shape, generator=generator)
        maps = (self._maps(scaled) * self.weight).flatten(0, 1)
        copies = (truth * self.weight).repeat_interleave(self.config.heads, dim=0)
        mismatch = self.match.mismatch(maps, copies).view(len(truth), -1)
        best = mismatch.amin(dim=1).mean()
        loss = best + _OTHERS * mismatch.mean()
        self.optimiser.param_groups[0]["lr"] = self.config.rate * warm_cosine(index, self.config.steps)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        return {"mismatch": float(best.detach())}

    def state(self) -> State:
        """Weights, what inputs and outputs are scaled by, and the optimiser's averages; the molecules come again from the seed."""
        scales = {name: getattr(self, name) for name in _SCALES}
        return {f"network.{k}": v for k, v in self.network.state_dict().items()} | scales | adam_state(self.optimiser)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        for name in _SCALES:
            setattr(self, name, state[name])
        self._make_network()
        self.network.load_state_dict(
            {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        )
        load_adam(self.optimiser, state)
