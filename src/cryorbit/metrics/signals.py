"""Signals and shift densities compared up to the shift that no observation can tell (papers/003 eq. 22, section 5.1.2).

Eq. 22 tries the n shifts of the grid. A method whose frame is arbitrary is half a sample off at worst there, which alone
costs several per cent for narrow signals; ``oversample`` tries fractions of a sample as well.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.physics.fourier import circular_correlation
from cryorbit.physics.moments import Moments, analytic_moments, relative_errors
from cryorbit.physics.mra import shift_signal

FINE = 20  # shifts tried per sample where an error is said to be over continuous shifts


def best_shift(
    estimate: Float[Tensor, "*b n"], truth: Float[Tensor, "*b n"], oversample: int = 1
) -> Float[Tensor, "*b"]:
    """The shift of ``truth``, in samples, that brings it closest to ``estimate``.

    With ``oversample`` above 1 the highest of the shifts tried is refined by the parabola through its neighbours.
    """
    correlation = circular_correlation(truth, estimate, oversample)
    best = correlation.argmax(dim=-1)
    shift = best.to(estimate.dtype)
    if oversample > 1:
        m = correlation.shape[-1]
        around = torch.stack([(best - 1) % m, best, (best + 1) % m], dim=-1)
        left, middle, right = correlation.gather(-1, around).unbind(-1)
        bend = left - 2 * middle + right
        shift = shift + torch.where(bend < 0, 0.5 * (left - right) / bend.clamp(max=-1e-30), 0.0).clamp(-0.5, 0.5)
    return shift / oversample


def signal_error(
    estimate: Float[Tensor, "*b n"], truth: Float[Tensor, "*b n"], oversample: int = 1
) -> Float[Tensor, "*b"]:
    """``min_s |s . truth - estimate| / |truth|`` (papers/003 eq. 22), differentiable in ``estimate`` with the shift held.

    Parameters
    ----------
    estimate, truth
        (..., n) signals or densities.
    oversample
        1 tries the shifts of the grid, as the paper does; m tries steps of 1 / m sample.
    """
    with torch.no_grad():
        shift = best_shift(estimate, truth, oversample)
    return (shift_signal(truth, shift) - estimate).norm(dim=-1) / truth.norm(dim=-1)


def align_signal(estimate: Float[Tensor, "*b n"], truth: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """``estimate`` moved onto ``truth`` over continuous shifts, for a figure."""
    return shift_signal(estimate, -best_shift(estimate, truth, FINE))


def frame_shift(signal: Float[Tensor, " n"], density: Float[Tensor, " n"], given: Moments) -> int:
    """By how many samples to move ``density`` so that it fits the ``given`` moments beside ``signal`` best (papers/003 section 5.1.2)."""
    n = len(density)
    shifted = torch.stack([density.roll(shift) for shift in range(n)])
    first, second = relative_errors(analytic_moments(signal.expand(n, n), shifted), given)
    return int((first + second).argmin())
