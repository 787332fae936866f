"""From a table of shifted observations to signal, density and what to think of them. Orchestration only: the work is in ``methods/mra_*``."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.methods.mra_classical import bispectrum, lbfgs, shifts_evidence, spectral
from cryorbit.methods.mra_em import em
from cryorbit.metrics.signals import FINE, best_shift, signal_error
from cryorbit.physics.moments import Moments, MomentSums, analytic_moments, mean_bispectrum, relative_errors
from cryorbit.physics.mra import shift_signal

METHODS = ("spectral", "em", "bispectrum", "lbfgs")
AUTO = "auto"  # em, which has measured best; spectral where there is no noise and hence no likelihood
_BLOCK = 65536  # observations read at once
_LEAST = 1e-16  # mean square that numbers may have, and one over the most
_PER_SAMPLE = 10  # fewer observations than this per sample deserve a word
_EVIDENCE = 20.0  # squared ratio of a density's strongest frequency to its error below which it may be flat
_NEEDS_SHAPE = ("spectral", "em", "lbfgs")  # methods that need shifts that are not uniform


@dataclass(frozen=True)
class Recovery:
    """Signal and density (L,), float64, in one frame; ``metrics`` ready for JSON; ``warnings`` in words."""

    signal: Float[Tensor, " n"]
    density: Float[Tensor, " n"]
    metrics: dict[str, object]
    warnings: tuple[str, ...]


def _blocks(table: NDArray[np.floating]) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, len(table), _BLOCK)]


def _tensor(rows: NDArray[np.floating]) -> Float[Tensor, "b n"]:
    return torch.from_numpy(np.array(rows, dtype=np.float32))


def sums_of(table: NDArray[np.floating]) -> MomentSums:
    """Moments of a table in one pass, a block in memory at a time."""
    blocks = (MomentSums.of(_tensor(table[block])) for block in _blocks(table))
    first = next(blocks)
    for sums in blocks:
        first = first + sums
    return first


def recover(table: NDArray[np.floating], sigma: float | None, method: str = AUTO, seed: int = 0) -> Recovery:
    """Recover signal and shift density from observations.

    Parameters
    ----------
    table
        (N, L) observations.
    sigma
        Noise per sample; ``None`` reads it off the highest quarter of the frequencies.
    method
        One of :data:`METHODS`, or :data:`AUTO`: ``em`` with noise, ``spectral`` without. ``em`` starts from ``spectral``, keeps its density
        and, like ``bispectrum``, reads the observations again.
    seed
        Random starts of ``lbfgs``.

    Raises
    ------
    ConfigError
        CONF405 unknown method; CONF406 a sigma that is negative, not finite, or larger than the observations themselves.
    DataError
        DATA403 nothing but noise; DATA405 numbers too small or too large.
    """
    if method not in (AUTO, *METHODS):
        raise ConfigError("CONF405", f"unknown method {method}", f"known methods: {', '.join((AUTO, *METHODS))}")
    if sigma is not None and not 0 <= sigma < float("inf"):
        raise ConfigError("CONF406", f"sigma is {sigma:g}, expected a number that is not negative")
    started = time.process_time()
    sums = sums_of(table)
    total = float(sums.second.diagonal().mean()) / sums.count
    if not _LEAST < total < 1 / _LEAST:
        raise DataError(
            "DATA405",
            f"the observations have a root mean square of {total**0.5:.3g}, expected {_LEAST**0.5:g} to {_LEAST**-0.5:g}",
            "scale them: single precision does not hold products of such numbers",
        )
    variance = max(0.0, sums.noise_variance()) if sigma is None else sigma**2
    if variance > total * (1 + 6 / (sums.count * len(sums.first)) ** 0.5):
        raise ConfigError(
            "CONF406",
            f"sigma {variance**0.5:g} is larger than the observations, whose root mean square is {total**0.5:.3g}",
            "--sigma is the standard deviation of the noise in one sample",
        )
    moments = sums.debiased(variance)
    if method == AUTO:
        method = "em" if variance else "spectral"
    pair = _solve(table, moments, method, seed)
    warnings = _warnings(sums.count, pair, moments, method)
    errors = [float(e) for e in relative_errors(analytic_moments(*pair), moments)]
    metrics: dict[str, object] = {
        "method": method,
        "observations": sums.count,
        "length": len(sums.first),
        "sigma": variance**0.5,
        "sigma_estimated": sigma is None,
        "snr": max(0.0, total - variance) / variance if variance else None,
        "first_moment_error": errors[0],
        "second_moment_error": errors[1],
        "shifts_evidence": min(shifts_evidence(pair[0], moments), 1e12),
        "cpu_seconds": time.process_time() - started,
        "warnings": list(warnings),
    }
    return Recovery(*pair, metrics, warnings)


def _solve(
    table: NDArray[np.floating], moments: Moments, method: str, seed: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    if method == "lbfgs":
        return lbfgs(moments, torch.Generator().manual_seed(seed))
    if method == "bispectrum":
        rows = [(len(table[b]), mean_bispectrum(_tensor(table[b]))) for b in _blocks(table)]
        total = rows[0][0] * rows[0][1]
        for count, part in rows[1:]:
            total = total + count * part
        return bispectrum(total / len(table), moments)
    start = spectral(moments)
    if method == "spectral":
        return start
    result = em(_tensor(table), moments.noise_variance**0.5, start, hold_density=True)
    return result.signal, result.density


def _warnings(
    count: int, pair: tuple[Float[Tensor, " n"], Float[Tensor, " n"]], moments: Moments, method: str
) -> tuple[str, ...]:
    found = []
    if count < _PER_SAMPLE * len(pair[0]):
        found.append(f"only {count} observations of {len(pair[0])} samples: the second moment is mostly chance")
    if method in _NEEDS_SHAPE and shifts_evidence(pair[0], moments) < _EVIDENCE:
        found.append(
            "the shifts look uniform: first and second moments cannot tell the signal then; try --method bispectrum"
        )
    return tuple(found)


def compare(recovery: Recovery, signal: Float[Tensor, " n"], density: Float[Tensor, " n"]) -> dict[str, object]:
    """Errors against a truth (papers/003 eq. 22), over the grid's shifts and over continuous ones.

    Raises
    ------
    DataError
        DATA404 the truth has another length.
    """
    if len(signal) != len(recovery.signal):
        raise DataError("DATA404", f"the truth has {len(signal)} samples, the observations have {len(recovery.signal)}")
    pairs = {"signal": (recovery.signal, signal), "density": (recovery.density, density)}
    return {
        f"{name}_error{suffix}": float(signal_error(found, true, oversample))
        for name, (found, true) in pairs.items()
        for suffix, oversample in (("", FINE), ("_grid", 1))
    }


def into_frame_of(recovery: Recovery, signal: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The recovered pair moved together so that the signal lies on ``signal``, for a figure."""
    shift = best_shift(recovery.signal, signal, FINE)
    return shift_signal(recovery.signal, -shift), shift_signal(recovery.density, shift)
