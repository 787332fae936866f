"""Networks that invert moments, and their two phases (papers/003 section 5.1.1, 5.1.2), each a method of the training loop.

``Supervised``: pairs drawn afresh at every step (the paper repeats 1.75 million pairs for 30,000 epochs), errors of signal and density each
taken at its best shift (eq. 22 as the loss, over fractions of a sample), because the moments cannot tell the frame. AdamW, one cycle of cosine.

``Refinement``: the weights of a network, trained or not, are changed until the moments of its output are the moments of the data (eq. 28).
Changed: both terms are relative, as in eq. 23, which makes the paper's unstated weight lambda 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cryorbit.errors import ConfigError
from cryorbit.metrics.signals import frame_shift, signal_error
from cryorbit.networks.moment_encoder import Equivariant, Paper003
from cryorbit.physics.moments import Moments, analytic_moments, real_space, relative_errors
from cryorbit.simulate.mra import Mixtures
from cryorbit.training.checkpoint import State
from cryorbit.training.optimiser import adam_state, load_adam, warm_cosine

Pair = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]

NETWORKS = ("equivariant", "paper003")


def make_network(name: str, length: int, seed: int = 0) -> nn.Module:
    """The network ``name`` (one of :data:`NETWORKS`) for signals of ``length`` samples, weights drawn by ``seed``.

    Raises
    ------
    ConfigError
        CONF403 no such network.
    """
    if name not in NETWORKS:
        raise ConfigError("CONF403", f"unknown network {name}", f"known networks: {', '.join(NETWORKS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Equivariant() if name == "equivariant" else Paper003(length)


@dataclass(frozen=True)
class SupervisedConfig:
    """Settings of the supervised phase.

    Attributes
    ----------
    network
        ``equivariant`` or ``paper003``.
    steps, batch
        Optimiser steps, and fresh pairs in each.
    rate
        Highest learning rate.
    oversample
        Shifts tried per sample in the loss.
    """

    network: str = "equivariant"
    steps: int = 2000
    batch: int = 128
    rate: float = 2e-3
    oversample: int = 4


def predict(network: nn.Module, moments: Moments) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Signals and densities for a batch of moments, in the network's precision."""
    first, second = real_space(moments)
    signal, density = network(first.float(), second.float())
    return signal, density


class Supervised:
    """Train a network on problems drawn from ``family``; a ``training.loop.Method``."""

    name = "supervised"

    def __init__(self, family: Mixtures, config: SupervisedConfig, seed: int = 0) -> None:
        self.family, self.config, self.seed = family, config, seed
        self.network = make_network(config.network, family.length, seed)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=config.rate, weight_decay=1e-4)

    def total_steps(self) -> int:
        """As configured."""
        return self.config.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One batch of fresh problems."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        signal, density = (x.float() for x in self.family.draw(self.config.batch, generator))
        v, rho = predict(self.network, analytic_moments(signal, density))
        of_signal = signal_error(v, signal, self.config.oversample).mean()
        of_density = signal_error(rho, density, self.config.oversample).mean()
        self.optimiser.param_groups[0]["lr"] = self.config.rate * warm_cosine(index, self.config.steps)
        self.optimiser.zero_grad()
        (of_signal + of_density).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        return {"signal_error": float(of_signal.detach()), "density_error": float(of_density.detach())}

    def state(self) -> State:
        """Weights, and the optimiser's averages."""
        return {f"network.{k}": v for k, v in self.network.state_dict().items()} | adam_state(self.optimiser)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        self.network.load_state_dict(
            {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        )
        load_adam(self.optimiser, state)


class Refinement:
    """Fit the weights of ``network`` to the moments of each problem by itself (papers/003 eq. 28); a ``training.loop.Method``.

    Parameters
    ----------
    network
        Trained or not; left as it is: every problem gets a copy.
    given
        Moments, one entry per problem.
    steps, rate
        Adam steps and their learning rate.
    """

    name = "reconstruction"

    def __init__(self, network: nn.Module, given: Sequence[Moments], steps: int = 500, rate: float = 1e-3) -> None:
        self.steps = steps
        self.given = Moments(
            torch.stack([m.first for m in given]).to(torch.complex64),
            torch.stack([m.second for m in given]).to(torch.complex64),
        )
        self.fields = tuple(x.float() for x in real_space(self.given))
        self.template = network
        start = dict(network.named_parameters())
        self.weights = {k: v.detach().expand(len(given), *v.shape).clone().requires_grad_() for k, v in start.items()}
        self.optimiser = torch.optim.Adam(self.weights.values(), lr=rate)
        with torch.no_grad():
            self.frame = self._frames()

    def _outputs(self) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        def one(weights: State, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            v, rho = torch.func.functional_call(self.template, weights, (first[None], second[None]))
            return v[0], rho[0]

        return torch.vmap(one)(self.weights, *self.fields)

    def _frames(self) -> Int[Tensor, "b n"]:
        """Where each density is read so that it fits the signal it came with; found once, at the start (papers/003 section 5.1.2)."""
        v, rho = self._outputs()
        moves = [frame_shift(*pair) for pair in zip(v, rho, self._each(), strict=True)]
        n = v.shape[1]
        return (torch.arange(n) - torch.tensor(moves)[:, None]) % n

    def _each(self) -> list[Moments]:
        return [Moments(*pair) for pair in zip(self.given.first, self.given.second, strict=True)]

    def pairs(self) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Signals and densities as they stand, each density in the frame of its signal."""
        v, rho = self._outputs()
        return v, rho.gather(1, self.frame)

    def total_steps(self) -> int:
        """As given."""
        return self.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One Adam step on every problem."""
        first, second = relative_errors(analytic_moments(*self.pairs()), self.given)
        self.optimiser.zero_grad()
        (first + second).sum().backward()
        self.optimiser.step()
        return {"first_error": float(first.detach().mean()), "second_error": float(second.detach().mean())}

    def state(self) -> State:
        """Weights of every problem, the optimiser's averages, and the frames."""
        weights = {f"network.{k}": v.detach() for k, v in self.weights.items()}
        return weights | adam_state(self.optimiser) | {"frame": self.frame}

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        with torch.no_grad():
            for name, value in self.weights.items():
                value.copy_(state[f"network.{name}"])
        self.frame = state["frame"]
        load_adam(self.optimiser, state)
