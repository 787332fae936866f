"""Networks from first and second moments, given in real space, to two periodic functions: a signal and a density.

``Paper003``: papers/003 appendix A.1. Two separate networks of the same shape; each reads ``M1`` as a field of 1 channel and ``M2`` as
a field of n channels (complex in Fourier space, so 2 and 2n), passes each through periodic convolutions with leaky ReLU (slope 0.02),
stacks them to 6 channels, and ends in convolutions and fully connected layers. The number of layers, windows and widths are in the
paper's figure 11 alone; those here are ours (two convolutions a branch, windows of 5, 64 channels, 256 units).

``Equivariant``: shifting the density shifts the moments, ``M1 -> P M1``, ``M2 -> P M2 P^T``; every layer here keeps that exactly, so nothing
has to be learnt n times. Channels are mixed by periodic convolutions and by multiplication with ``M2`` itself and with ``M2`` whitened:
the step ``M2 u / |M2 u|`` of papers/003 eq. 18, which the paper hopes convolutions will learn, as a layer.
Its density is read off: beside a known signal moments are linear in the density, so least squares gives it in closed form from the signal that
the network draws, through which both are learnt; convolutions mend what a wrong signal leaves. Moving the moments moves the signal, and the
density stays.

Inputs are scaled by the power of the signal, and the density leaves through a softmax.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryorbit.physics.fourier import fourier_to_outer, fourier_to_signal, outer_to_fourier, signal_to_fourier

_SLOPE = 0.02  # of the leaky ReLU, papers/003 appendix A
_NOTHING = 1e-20  # added to what is divided by, for signals of zeros
_LEAST = 1e-2  # of a density in units of the uniform one, before its logarithm


def _scaled(
    first: Float[Tensor, "b n"], second: Float[Tensor, "b n n"]
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n n"], Float[Tensor, "b 1"]]:
    """Moments of the signal divided by its root mean square, which is the third value."""
    power = second.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
    rms = power.sqrt()[:, None]
    return first / rms, second / power[:, None, None], rms


class _Branch(nn.Module):
    """One of the two networks of appendix A.1."""

    def __init__(self, length: int, channels: int, units: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> nn.Module:
            return nn.Conv1d(inputs, outputs, 5, padding=2, padding_mode="circular")

        act = nn.LeakyReLU(_SLOPE)
        self.upper = nn.Sequential(conv(2, channels), act, conv(channels, 3), act)
        self.lower = nn.Sequential(conv(2 * length, channels), act, conv(channels, 3), act)
        self.joined = nn.Sequential(conv(6, channels), act, conv(channels, 8), act, nn.Flatten())
        self.full = nn.Sequential(nn.Linear(8 * length, units), act, nn.Linear(units, length))

    def forward(self, first: Float[Tensor, "b 2 n"], second: Float[Tensor, "b m n"]) -> Float[Tensor, "b n"]:
        return self.full(self.joined(torch.cat([self.upper(first), self.lower(second)], dim=1)))


class Paper003(nn.Module):
    """Encoder of papers/003 appendix A.1, for signals of ``length`` samples."""

    def __init__(self, length: int, channels: int = 64, units: int = 256) -> None:
        super().__init__()
        self.signal = _Branch(length, channels, units)
        self.density = _Branch(length, channels, units)

    def forward(
        self, first: Float[Tensor, "b n"], second: Float[Tensor, "b n n"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Signals, and densities that sum to 1, from real-space moments."""
        first, second, rms = _scaled(first, second)
        m1, m2 = torch.view_as_real(signal_to_fourier(first)), torch.view_as_real(outer_to_fourier(second))
        fields = m1.movedim(-1, 1), torch.cat(m2.unbind(-1), dim=1)
        return rms * self.signal(*fields), torch.softmax(self.density(*fields), dim=1)


class _Block(nn.Module):
    """Residual: channels, and channels multiplied by each matrix, through a periodic convolution."""

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.mix = nn.Conv1d(3 * channels, channels, window, padding=window // 2, padding_mode="circular")
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(
        self, h: Float[Tensor, "b c n"], plain: Float[Tensor, "b n n"], white: Float[Tensor, "b n n"]
    ) -> Float[Tensor, "b c n"]:
        x = self.norm(h)
        x = self.mix(torch.cat([x, x @ plain, x @ white], dim=1))
        return h + self.out(nn.functional.leaky_relu(x, _SLOPE))


class Equivariant(nn.Module):
    """Encoder that turns a shift of the moments into the same shift of its signal and leaves the density where it is, for any length."""

    def __init__(self, channels: int = 32, blocks: int = 6, window: int = 5, lags: int = 12) -> None:
        super().__init__()
        self.lags = lags
        self.first = nn.Conv1d(lags + 1, channels, window, padding=window // 2, padding_mode="circular")
        self.blocks = nn.ModuleList(_Block(channels, window) for _ in range(blocks))
        self.last = nn.Conv1d(channels, 1, window, padding=window // 2, padding_mode="circular")
        self.mended = nn.Sequential(
            nn.Conv1d(1, channels, window, padding=window // 2, padding_mode="circular"),
            nn.LeakyReLU(_SLOPE),
            nn.Conv1d(channels, channels, window, padding=window // 2, padding_mode="circular"),
            nn.LeakyReLU(_SLOPE),
            nn.Conv1d(channels, 1, window, padding=window // 2, padding_mode="circular"),
        )

    def forward(
        self, first: Float[Tensor, "b n"], second: Float[Tensor, "b n n"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Signals, and densities that sum to 1, from real-space moments."""
        first, second, rms = _scaled(first, second)
        n = first.shape[1]
        x = torch.arange(n, device=first.device)
        field = torch.stack([second[:, x, (x + lag) % n] for lag in range(self.lags)], dim=1)
        h = self.first(torch.cat([first[:, None], field], dim=1))
        plain, white = second / math.sqrt(n), _whitened(second)
        for block in self.blocks:
            h = block(h, plain, white)
        signal = self.last(h)[:, 0]
        read = n * read_density(signal, first, second)
        logits = read.clamp(min=_LEAST).log() + self.mended(read[:, None])[:, 0]
        return rms * signal, torch.softmax(logits, dim=1)


def read_density(
    signal: Float[Tensor, "b n"], first: Float[Tensor, "b n"], second: Float[Tensor, "b n n"], floor: float = 1e-3
) -> Float[Tensor, "b n"]:
    """The ``rho^`` with ``M1 = v^ rho^`` and ``M2 = v^ v^* rho^`` (papers/003 eq. 15, 26) for these signals, by least squares.

    Every frequency is held back by ``floor`` of what is known of the zeroth, so that those a signal does not have stay small.
    """
    n = signal.shape[1]
    transform = signal_to_fourier(signal)
    k = torch.arange(n, device=signal.device)
    ahead = (k[:, None] + k) % n  # [lag, k]: where k + lag lies
    products = transform[:, ahead] * transform[:, None].conj()
    top = (outer_to_fourier(second)[:, ahead, k] * products.conj()).sum(dim=2)
    top = top + signal_to_fourier(first) * transform.conj()
    below = products.abs().square().sum(dim=2) + transform.abs().square()
    return fourier_to_signal(top / (below + floor * below[:, :1] + _NOTHING)) / math.sqrt(n)


def _whitened(second: Float[Tensor, "b n n"], floor: float = 1e-3) -> Float[Tensor, "b n n"]:
    """``M2`` between signals whose spectrum is made flat where it is above ``floor`` of its highest power; eigenvalues near n rho."""
    transform = outer_to_fourier(second)
    power = transform.diagonal(dim1=1, dim2=2).real.clamp(min=0)
    scale = (power + floor * power.amax(dim=1, keepdim=True) + _NOTHING).rsqrt()
    return fourier_to_outer(transform * scale[:, :, None] * scale[:, None, :])
