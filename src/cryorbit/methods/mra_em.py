"""Marginal likelihood of shifted signals by expectation maximisation: the method moments are an approximation to.

``p(y) = sum_s rho(s) N(y; s . v, sigma^2)`` (papers/003 eq. 2, 24, shifts marginalised as in section 2). The E-step is one product of
observations and shifted copies, the M-step its transpose. Likelihood never falls; like any local search it can end in a wrong place, so
it is started from moments. A free density takes on the noise of the observations, a value per shift; one estimated from moments knows that it
is smooth, so it may be held. EM reads every observation in every round, where moments read each once: early rounds take a part of them.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.groups.cyclic import Cyclic
from cryorbit.physics.mra import MRA

_BLOCK = 16384
_PARTS = (64, 8, 1)  # first every 64th of the observations, then every 8th, then all
_FEWEST = 2048  # observations that a part must have


@dataclass(frozen=True)
class EMResult:
    """What EM ends with: the pair, and the mean log-likelihood of one observation before each round over all of them."""

    signal: Float[Tensor, " n"]
    density: Float[Tensor, " n"]
    log_likelihood: tuple[float, ...]


def em_round(
    observations: Float[Tensor, "b n"], signal: Float[Tensor, " n"], density: Float[Tensor, " n"], sigma: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], float]:
    """One E-step and M-step: new signal, new density, and the mean log-likelihood of the old ones."""
    n = len(signal)
    shifts = torch.arange(n)
    level = float(
        signal.mean()
    )  # the same at every shift: out of the products, where a pedestal would cost their digits
    copies = MRA(Cyclic(n)).observe(signal - level, shifts).to(observations.dtype)
    prior = density.clamp(min=1e-12).log().to(observations.dtype)
    weighted = torch.zeros(n, n, dtype=torch.float64)
    mass = torch.zeros(n, dtype=torch.float64)
    total = 0.0
    for rows in observations.split(_BLOCK):
        block = rows - level
        scores = block @ (copies.mT / sigma**2) + prior
        evidence = scores.logsumexp(dim=1, keepdim=True)
        posterior = (scores - evidence).exp()
        weighted += (posterior.mT @ block).double()
        mass += posterior.sum(dim=0).double()
        total += float(evidence.double().sum() - 0.5 * block.double().square().sum() / sigma**2)
    count = len(observations)
    back = (shifts[:, None] + shifts) % n
    new = weighted.gather(1, back).sum(dim=0) / count + level
    constant = (
        0.5 * n * math.log(2 * math.pi * sigma**2) + 0.5 * float((signal - level).double().square().sum()) / sigma**2
    )
    return new, mass / count, total / count - constant


def em(
    observations: Float[Tensor, "b n"],
    sigma: float,
    start: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    rounds: int = 30,
    tolerance: float = 1e-4,
    hold_density: bool = False,
) -> EMResult:
    """Climb the marginal likelihood from ``start``.

    Parameters
    ----------
    observations
        (N, n).
    sigma
        Standard deviation of the noise per sample.
    start
        Signal and density, in a common frame.
    rounds
        At most, for each part of the observations.
    tolerance
        A part is done when the signal changes by less than this fraction.

    hold_density
        Leave the density as it is in ``start``.

    Raises
    ------
    ConfigError
        CONF402 ``sigma`` is not positive: without noise there is no likelihood.
    """
    if sigma <= 0:
        raise ConfigError("CONF402", f"EM needs noise, found sigma {sigma:g}", "use --method spectral")
    signal, density = start[0].double(), start[1].double()
    trace: list[float] = []
    for part in _PARTS:
        rows = len(observations) // part
        if part > 1 and rows < _FEWEST:
            continue
        for _ in range(rounds):
            new, mass, likelihood = em_round(observations[::part], signal, density, sigma)
            density = density if hold_density else mass
            change = float((new - signal).norm() / new.norm().clamp(min=1e-30))
            signal = new
            if part == 1:
                trace.append(likelihood)
            if change < tolerance:
                break
    return EMResult(signal, density, tuple(trace))
