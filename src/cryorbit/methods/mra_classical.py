"""Signal and shift density from moments without training: spectral, L-BFGS, bispectrum.

Each function takes moments and returns ``(signal, density)``, (n,) each, in one common frame; the frame itself cannot be known.

spectral
    papers/003 eq. 16, 17: ``M2`` whitened by its diagonal is ``diag(u) T diag(u)*``, with the phases u of the signal and the Toeplitz
    matrix of ``rho^``. Its first eigenvector gives u where ``rho`` has one peak and all frequencies carry signal. Changed: on a band
    neither holds exactly, so the eigenvector only starts an alternation: ``rho^`` from u by weighted least squares over both
    moments, then u from ``M2`` with ``rho^`` divided out, whose first eigenvector is u exactly. The density is the one closest to
    ``rho^`` in the band where that is known.
lbfgs
    The moment mismatch (papers/003 eq. 28, squared and relative) over signal and density from random starts.
bispectrum
    Bendory et al., IEEE Trans. Signal Process. 66 (2018) 1037, iterative phase synchronisation: needs third moments, no density.
"""

import math
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Complex, Float
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.physics.fourier import fourier_to_signal, signal_to_fourier
from cryorbit.physics.moments import Moments, analytic_moments, differences, relative_errors

Pair = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]

_SWEEPS = 100  # alternations of the spectral method; it stops earlier when phases stand still
_STILL = 1e-12
_EXACT = 1e-12  # noise of analytic moments relative to the strongest power: rounding


def _floor(moments: Moments) -> float:
    """Variance per frequency below which a measured power means nothing."""
    return moments.noise_variance + _EXACT * float(moments.power.max())


def _weights(moments: Moments) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """One over the variance of each entry of ``M1`` and ``M2`` as one observation has it, to first order."""
    spread = moments.power.clamp(min=0) + _floor(moments)
    return 1 / spread, 1 / (spread[:, None] * spread)


def _amplitude(moments: Moments) -> Float[Tensor, " n"]:
    """``|v^|``; frequencies whose power is not significant are zero."""
    power = moments.power
    error = 3 * (power.clamp(min=0) + _floor(moments)) / math.sqrt(moments.count) + _EXACT * power.max()
    return torch.where(power > error, power, 0.0).sqrt()


def _real(phases: Complex[Tensor, " n"]) -> Complex[Tensor, " n"]:
    """Unit phases closest to ``phases`` that a real signal may have, ``u(-k) = u(k)*``; an eigenvector's own phase is taken out first."""
    turn = torch.angle((phases * phases.flip(0).roll(1)).sum()) / 2
    phases = phases * torch.polar(torch.ones_like(turn), -turn)
    both = phases + phases.conj().flip(0).roll(1)
    return torch.where(both.abs() > 0, both / both.abs().clamp(min=1e-300), 1.0 + 0j)


def density_of(
    signal_hat: Complex[Tensor, " n"], moments: Moments
) -> tuple[Complex[Tensor, " n"], Float[Tensor, " n"]]:
    """``rho^`` that fits both moments best for a known signal, and its precision (one over the variance) per frequency.

    Weighted least squares: every entry ``M2(k + d, k)`` and ``M1(d)`` is ``rho^(d)`` times something known (eq. 15, 26).
    """
    first, second = _weights(moments)
    model = signal_hat[:, None] * signal_hat.conj()
    lags = differences(len(signal_hat)).reshape(-1)

    def by_lag(values: Tensor) -> Tensor:
        return torch.zeros_like(values[0]).index_add(0, lags, values.reshape(-1))

    top = by_lag(second * moments.second * model.conj()) + first * moments.first * signal_hat.conj()
    below = by_lag(second * model.abs().square()) + first * signal_hat.abs().square()
    return torch.where(below > 0, top / below.clamp(min=1e-300), 0), below * min(moments.count, 1 / _EXACT)


def nearest_density(transform: Complex[Tensor, " n"], precision: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The density whose transform is ``transform`` as far as it is known: band-limited, not negative, sum 1.

    Each frequency is scaled by ``1 - 1 / snr`` (Wiener's filter with the measured power), and the band ends at the first one that is not
    three times its variance. Then the nearest point of the simplex is taken.
    """
    n = len(transform)
    snr = transform.abs().square() * precision
    k = torch.minimum(torch.arange(n), n - torch.arange(n))
    weak = k[snr < 3]
    end = int(weak.min()) if len(weak) else n
    kept = torch.where(k < max(end, 1), (1 - 1 / snr.clamp(min=1)).clamp(min=0) * transform, 0.0)
    kept[0] = 1.0
    return _simplex(fourier_to_signal(kept) / math.sqrt(n))


def shifts_evidence(signal: Float[Tensor, " n"], moments: Moments) -> float:
    """How far the shifts are from uniform: the largest ``|rho^(d)|^2``, d > 0, over its variance.

    With uniform shifts ``M1`` and ``M2`` hold the mean and the power spectrum of the signal and nothing else. 36 simulated sets of
    that kind (50,000 observations, sigma 1 and 3) gave 4 to 16; with a tenth of the shifts from a mixture of two Gaussians 31 to 2,243.
    """
    transform, precision = density_of(signal_to_fourier(signal), moments)
    return float((transform.abs().square() * precision)[1:].max())


def _simplex(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Nearest point with no negative entry and sum 1 (Held, Wolfe and Crowder 1974)."""
    ordered = values.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(values) + 1)
    return (values - excess[ordered > excess][-1]).clamp(min=0)


def _marched(second: Complex[Tensor, "n n"]) -> Complex[Tensor, " n"]:
    """Phases from the first off-diagonal of ``M2`` alone: ``arg M2(k + 1, k)`` is the step from k to k + 1, up to a common shift."""
    n = len(second)
    steps = torch.angle(second.diagonal(-1))[: (n - 1) // 2]
    half = torch.cat([steps.new_zeros(1), torch.cumsum(steps, dim=0)])
    angle = torch.cat([half, steps.new_zeros(1 - n % 2), -half[1:].flip(0)])
    return torch.polar(torch.ones_like(angle), angle)


def spectral(moments: Moments, sweeps: int = _SWEEPS) -> Pair:
    """First eigenvector of the whitened second moment, then alternating least squares (papers/003 eq. 16, 17; see above).

    Parameters
    ----------
    moments
        Of one problem.
    sweeps
        Alternations at most, from two starts, the better fit kept; 0 leaves the plain eigenvector.

    Raises
    ------
    DataError
        DATA403 the second moment has no significant power: nothing but noise.
    """
    amplitude = _amplitude(moments)
    if not bool((amplitude > 0).any()):
        raise DataError(
            "DATA403", "the second moment is no larger than its noise", "check sigma, or average more observations"
        )
    inverse = torch.where(amplitude > 0, 1 / amplitude.clamp(min=1e-300), 0.0)
    start = _real(_leading(moments.second * inverse.outer(inverse)))
    if sweeps == 0:
        return _signed(amplitude * start, moments)
    pairs = [_alternate(amplitude, phases, moments, sweeps) for phases in (start, _marched(moments.second))]
    return min(pairs, key=lambda pair: mismatch(pair[0], pair[1], moments))


def mismatch(signal: Float[Tensor, " n"], density: Float[Tensor, " n"], moments: Moments) -> float:
    """Squared difference of the moments of a pair from ``moments``, each entry over its variance for one observation."""
    found, (first, second) = analytic_moments(signal, density), _weights(moments)
    misfit = (first * (found.first - moments.first).abs().square()).sum()
    return float(misfit + (second * (found.second - moments.second).abs().square()).sum())


def _leading(matrix: Complex[Tensor, "n n"]) -> Complex[Tensor, " n"]:
    return torch.linalg.eigh(matrix).eigenvectors[:, -1]


def _alternate(amplitude: Float[Tensor, " n"], phases: Complex[Tensor, " n"], moments: Moments, sweeps: int) -> Pair:
    """``rho^`` from the phases, the phases from ``M2`` with ``rho^`` divided out, until they stand still."""
    lags, weight = differences(len(amplitude)), _weights(moments)[1] * amplitude.outer(amplitude)

    def divided(phases: Complex[Tensor, " n"]) -> Complex[Tensor, "n n"]:
        return moments.second * density_of(amplitude * phases, moments)[0][lags].conj() * weight

    return _signed(amplitude * _synchronised(divided, phases, sweeps), moments)


def _synchronised(
    matrix: Callable[[Complex[Tensor, " n"]], Complex[Tensor, "n n"]], phases: Complex[Tensor, " n"], sweeps: int
) -> Complex[Tensor, " n"]:
    """Phases that are the first eigenvector of the matrix they make, by repeating that until they stand still."""
    for _ in range(sweeps):
        new = _real(_leading(matrix(phases)))
        new = new * torch.sign((new * phases.conj()).real.sum())
        moved, phases = float((new - phases).abs().max()), new
        if moved < _STILL:
            break
    return phases


def _signed(signal_hat: Complex[Tensor, " n"], moments: Moments) -> Pair:
    """The pair of v or -v, which ``M2`` cannot tell apart, that fits both moments better; the density fitted to the signal."""
    pairs = [(fourier_to_signal(v), nearest_density(*density_of(v, moments))) for v in (signal_hat, -signal_hat)]
    return min(pairs, key=lambda pair: mismatch(pair[0], pair[1], moments))


def lbfgs(
    moments: Moments,
    generator: torch.Generator,
    restarts: int = 3,
    iterations: int = 500,
    start: Pair | None = None,
) -> Pair:
    """Minimise the squared relative errors of both moments (papers/003 eq. 23, 28) over signal and density; the best of several starts.

    Parameters
    ----------
    moments
        Of one problem.
    generator
        Draws the starts: white signals of the right power, densities near uniform.
    restarts
        Random starts; ``start`` is one more.
    iterations
        Of L-BFGS, per start.
    start
        A pair to start from.
    """
    n = len(moments.first)
    scale = float(moments.power.clamp(min=0).mean().sqrt())
    starts = [] if start is None else [start]
    for _ in range(restarts):
        signal = scale * torch.randn(n, generator=generator, dtype=torch.float64)
        starts.append((signal, torch.softmax(0.1 * torch.randn(n, generator=generator, dtype=torch.float64), 0)))

    def loss(packed: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        x = torch.from_numpy(packed).requires_grad_()
        first, second = relative_errors(analytic_moments(x[:n], torch.softmax(x[n:], 0)), moments)
        value = first.square() + second.square()
        (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient.numpy()

    best = None
    for signal, density in starts:
        packed = torch.cat([signal, density.clamp(min=1e-6).log()]).numpy()
        options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-10}
        found = scipy.optimize.minimize(loss, packed, jac=True, method="L-BFGS-B", options=options)
        best = found if best is None or found.fun < best.fun else best
    if best is None:
        raise ConfigError("CONF401", "nothing to start L-BFGS from", "give restarts or a start")
    x = torch.from_numpy(best.x)
    return x[:n], torch.softmax(x[n:], 0)


def bispectrum(third: Complex[Tensor, "n n"], moments: Moments, sweeps: int = _SWEEPS) -> Pair:
    """Phases from third moments by iterative phase synchronisation, started by frequency marching (Bendory et al. 2018).

    Needs no assumption on the density (a uniform one will do), and more observations: its noise grows with the cube of sigma.

    Parameters
    ----------
    third
        (n, n) ``v^(k1) v^(k2)* v^(k2 - k1)`` of the signal without its mean (``physics.moments.mean_bispectrum``).
    moments
        First and second moments: amplitudes, the mean, and the density once the signal is known.
    sweeps
        Rounds of synchronisation at most.
    """
    amplitude, n = _amplitude(moments), len(third)
    lags, weight = differences(n).mT, amplitude.outer(amplitude)
    start = third.clone()
    start[1, 0] = 1.0  # the mean was taken out: its angle is that of noise, and a first step of any angle is a shift
    signal_hat = amplitude * _synchronised(
        lambda phases: third * (amplitude * phases)[lags].conj() * weight, _marched(start), sweeps
    )
    signal_hat[0] = moments.first[0]  # the mean: known, sign and all
    rho, precision = density_of(signal_hat, moments)
    return fourier_to_signal(signal_hat), nearest_density(rho, precision)
