"""Signals, shift densities and noisy observations of multi-reference alignment (papers/003 section 5.1).

The paper draws both from mixtures of one to three Gaussians on a periodic interval and gives no widths. Ours: centres uniform,
weights uniform in [0.5, 1.5], standard deviations uniform in [0.04, 0.10] of the period; signals have root mean square 1,
densities sum to 1. At 41 samples a Gaussian of width 0.04 has fallen to 3e-6 at the highest frequency: the samples hold a
band-limited function.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.groups.cyclic import Cyclic
from cryorbit.physics.mra import MRA

_WRAPS = 3  # periods on either side; widths are a fraction of one
_BLOCK = 16384  # observations made at once


@dataclass(frozen=True)
class Mixtures:
    """Family of periodic mixtures of Gaussians that signals and densities are drawn from.

    Attributes
    ----------
    length
        Samples per period.
    components
        Gaussians in each signal and each density.
    width
        Smallest and largest standard deviation, in periods.
    weight
        Smallest and largest weight of one Gaussian before normalisation.

    Raises
    ------
    ConfigError
        CONF341 fewer than 4 samples or no component; CONF342 a range that is not 0 < lowest <= highest, or widths above half a period or
        below a tenth of a sample.
    """

    length: int = 41
    components: int = 2
    width: tuple[float, float] = (0.04, 0.10)
    weight: tuple[float, float] = (0.5, 1.5)

    def __post_init__(self) -> None:
        if self.length < 4 or self.components < 1:
            raise ConfigError(
                "CONF341",
                f"{self.components} Gaussians on {self.length} samples, expected at least 1 on at least 4 samples",
            )
        for name, (low, high) in (("width", self.width), ("weight", self.weight)):
            least, most = (
                (0.1 / self.length, 0.5) if name == "width" else (0.0, math.inf)
            )  # narrower falls between samples
            if not (least < low <= high <= most and math.isfinite(high)):
                raise ConfigError(
                    "CONF342", f"{name} from {low:g} to {high:g}, expected {least:.3g} < lowest <= highest <= {most:g}"
                )

    def _mixtures(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n"]:
        shape = (count, self.components, 1)

        def uniform(low: float, high: float) -> Tensor:
            u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
            return low + (high - low) * u

        centre, width, weight = uniform(0.0, 1.0), uniform(*self.width), uniform(*self.weight)
        x = torch.arange(self.length, dtype=torch.float64, device=generator.device) / self.length
        out = torch.zeros(count, self.length, dtype=torch.float64, device=generator.device)
        for wrap in range(-_WRAPS, _WRAPS + 1):
            out = out + (weight * torch.exp(-0.5 * ((x - centre + wrap) / width) ** 2)).sum(dim=1)
        return out

    def draw(self, count: int, generator: torch.Generator) -> tuple[Float[Tensor, "count n"], Float[Tensor, "count n"]]:
        """``count`` signals (root mean square 1) and as many shift densities (sum 1), float64."""
        signal, density = self._mixtures(count, generator), self._mixtures(count, generator)
        rms = signal.square().mean(dim=1, keepdim=True).sqrt()
        return signal / rms, density / density.sum(dim=1, keepdim=True)


def observations(
    signal: Float[Tensor, " n"],
    density: Float[Tensor, " n"],
    count: int,
    sigma: float,
    generator: torch.Generator,
) -> Iterator[Float[Tensor, "b n"]]:
    """Blocks of ``v_j = s_j . v + noise`` (papers/003 eq. 24), float32, ``count`` rows in all; memory does not grow with ``count``.

    Parameters
    ----------
    signal, density
        (n,) the signal, and the probabilities of the shifts 0 .. n - 1.
    count
        Observations in all.
    sigma
        Standard deviation of the white noise per sample.
    generator
        Fixes shifts and noise.

    Raises
    ------
    ConfigError
        CONF343 ``sigma`` or ``count`` is negative or not finite.
    """
    if not 0 <= sigma < math.inf or count < 0:
        raise ConfigError("CONF343", f"{count} observations with noise {sigma:g}, expected finite, neither below zero")
    model = MRA(Cyclic(len(signal)))
    table = model.observe(signal.float(), torch.arange(len(signal)))
    for start in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - start)
        shifts = torch.multinomial(density, rows, replacement=True, generator=generator)
        yield table[shifts] + sigma * torch.randn(rows, len(signal), generator=generator)
