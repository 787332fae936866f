"""First and second moments of shifted signals: analytic, and empirical in one pass (papers/003 sections 3.1, 4.1, 5.1.2).

With the unitary transform ``v^`` and ``rho^(k) = sum_s rho(s) exp(-2 pi i k s / n)``,

    M1(k) = v^(k) rho^(k),    M2(k1, k2) = v^(k1) rho^(k1 - k2) v^(k2)*        (eq. 6, 15, 26, 27)

Sign: a shift ``v(x - s)`` multiplies ``v^(k)`` by ``exp(-2 pi i k s / n)``, as in eq. 26; eq. 4 and 5 of the paper print ``exp(+iks)``.
Both signs describe the same problem (``rho`` mirrored), but not the same ``rho``.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.physics.fourier import fourier_to_outer, fourier_to_signal, outer_to_fourier, signal_to_fourier

_BLOCK = 2048  # bispectra in memory at once


@dataclass(frozen=True)
class Moments:
    """Noise-free moments of one problem or a batch, in the Fourier domain.

    Attributes
    ----------
    first
        (..., n) ``M1``, k in FFT order.
    second
        (..., n, n) ``M2``, Hermitian.
    noise_variance
        Variance per sample of the noise that was subtracted; 0 for analytic moments.
    count
        Number of observations behind them; infinite for analytic moments.
    """

    first: Complex[Tensor, "*b n"]
    second: Complex[Tensor, "*b n n"]
    noise_variance: float = 0.0
    count: float = math.inf

    @property
    def power(self) -> Float[Tensor, "*b n"]:
        """``|v^(k)|^2``, the diagonal of ``M2``; noise can make it negative."""
        return self.second.diagonal(dim1=-2, dim2=-1).real


def differences(n: int) -> Int[Tensor, "n n"]:
    """``(k1 - k2) mod n``: where ``rho^`` is read in ``M2``."""
    k = torch.arange(n)
    return (k[:, None] - k) % n


def characteristic(density: Float[Tensor, "*b n"]) -> Complex[Tensor, "*b n"]:
    """``rho^(k) = sum_s rho(s) exp(-2 pi i k s / n)``; 1 at k = 0 for a density that sums to 1."""
    return signal_to_fourier(density) * math.sqrt(density.shape[-1])


def analytic_moments(signal: Float[Tensor, "*b n"], density: Float[Tensor, "*b n"]) -> Moments:
    """Moments of ``signal`` at shifts drawn from ``density`` (papers/003 eq. 15, 26, 27 with the sum over shifts done).

    Parameters
    ----------
    signal, density
        (..., n) samples, and probabilities of the shifts 0 .. n - 1, which sum to 1.
    """
    v, rho = signal_to_fourier(signal), characteristic(density)
    lags = differences(signal.shape[-1]).to(signal.device)
    return Moments(v * rho, v[..., :, None] * v[..., None, :].conj() * rho[..., lags])


@dataclass(frozen=True)
class MomentSums:
    """Running sums over observations; ``a + b`` is the sums of both sets, so parts of a set may be summed anywhere.

    Attributes
    ----------
    count
        Observations so far.
    first, second
        (n,) and (n, n) float64 sums of ``y`` and ``y y^T`` in real space.
    """

    count: int
    first: Float[Tensor, " n"]
    second: Float[Tensor, "n n"]

    @staticmethod
    def of(observations: Float[Tensor, "b n"]) -> "MomentSums":
        """Sums over one block of observations."""
        rows = observations.double()  # an offset of the data must not drown the second moment
        return MomentSums(len(rows), rows.sum(dim=0), rows.mT @ rows)

    def __add__(self, other: "MomentSums") -> "MomentSums":
        if self.first.shape != other.first.shape:
            raise DataError(
                "DATA401", f"moments of signals of {len(self.first)} and {len(other.first)} samples cannot be added"
            )
        return MomentSums(self.count + other.count, self.first + other.first, self.second + other.second)

    def raw(self) -> tuple[Complex[Tensor, " n"], Complex[Tensor, "n n"]]:
        """Averages in the Fourier domain, the noise still in the second."""
        if self.count == 0:
            raise DataError("DATA402", "moments of no observations")
        return signal_to_fourier(self.first / self.count), outer_to_fourier(self.second / self.count)

    def noise_variance(self) -> float:
        """Median power of the highest quarter of the frequencies: the noise of observations whose signal has none there."""
        power = self.raw()[1].diagonal().real
        n = len(power)
        k = torch.minimum(torch.arange(n), n - torch.arange(n))
        return float(power[k > 3 * n // 8].median())

    def debiased(self, noise_variance: float) -> Moments:
        """Unbiased estimates of the noise-free moments (papers/003 eq. 25): ``noise_variance`` leaves the diagonal of ``M2``."""
        first, second = self.raw()
        return Moments(first, second - noise_variance * torch.eye(len(first)), noise_variance, float(self.count))


def relative_errors(found: Moments, given: Moments) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Relative Frobenius errors of ``found`` against ``given``, first and second moment (papers/003 eq. 23)."""
    first = (found.first - given.first).norm(dim=-1) / given.first.norm(dim=-1)
    second = (found.second - given.second).norm(dim=(-2, -1)) / given.second.norm(dim=(-2, -1))
    return first, second


def real_space(moments: Moments) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b n n"]]:
    """The same moments as averages of ``v`` and ``v v^T`` over shifts, in real space; errors (eq. 23) are the same there."""
    return fourier_to_signal(moments.first), fourier_to_outer(moments.second)


def bispectrum(signal: Float[Tensor, "*b n"]) -> Complex[Tensor, "*b n n"]:
    """``v^(k1) v^(k2)* v^(k2 - k1)`` of signals without their mean: blind to shifts (Bendory et al. 2018)."""
    v = signal_to_fourier(signal - signal.mean(dim=-1, keepdim=True))
    lags = differences(signal.shape[-1]).mT.to(signal.device)
    return v[..., :, None] * v[..., None, :].conj() * v[..., lags]


def mean_bispectrum(observations: Float[Tensor, "b n"]) -> Complex[Tensor, "n n"]:
    """Unbiased estimate of the signal's bispectrum from noisy observations, float64, in blocks.

    White noise adds to a bispectrum only where one of the three frequencies is zero; without the mean there is nothing there.
    """
    n = observations.shape[-1]
    total = torch.zeros(n, n, dtype=torch.complex128)
    for block in observations.split(_BLOCK):
        total = total + bispectrum(block).sum(dim=0)
    return total / len(observations)
