"""Nearest maximum of a correlation over a rotation and a shift, by damped Gauss-Newton steps from many starts at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from cryorbit.groups.so3 import exp

_GAINED = 1e-6  # of the correlation, by the last step


class Slope(NamedTuple):
    """A correlation at B motions: its value (B,), its gradient (B, 6) by a rotation that follows (radian) and by the shift, and minus its
    curvature (B, 6, 6) by the same.
    """

    value: Float[Tensor, " b"]
    gradient: Float[Tensor, "b 6"]
    curvature: Float[Tensor, "b 6 6"]


def correlated(
    weight: Float[Tensor, "#b p"],
    reference: Complex[Tensor, "#b p"],
    moved: Complex[Tensor, "b p"],
    slopes: Complex[Tensor, "b 6 p"],
    shell: Int[Tensor, " p"],
) -> Slope:
    """``sum w conj(reference) moved``, of which ``slopes`` are the derivatives of ``moved``.

    The curvature is that of maps which agree in every shell as far as these do.
    """
    target = weight * reference.conj()
    each = (target * moved).real
    shells = torch.zeros(2, len(each), int(shell.max()) + 1)
    shells.index_add_(2, shell, torch.stack([each, (weight * moved.abs().square()).expand_as(each)]))
    share = weight * (shells[0] / shells[1].clamp(min=1e-30)).clamp(min=0.0)[:, shell]
    gradient = torch.einsum("bp,bip->bi", target.expand_as(moved), slopes).real
    return Slope(each.sum(dim=1), gradient, torch.einsum("bip,bjp->bij", share[:, None] * slopes.conj(), slopes).real)


def climb(
    measure: Callable[[Tensor, Tensor], Slope],
    rotation: Float[Tensor, "b 3 3"],
    shift: Float[Tensor, "b 3"],
    iterations: int = 15,
) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 3"]]:
    """The rotations and shifts after at most ``iterations`` calls of ``measure``; a step that lowers the correlation is not taken."""
    best, damping = measure(rotation, shift), torch.full((len(shift),), 1e-3)
    for _ in range(iterations - 1):
        spread = best.curvature.diagonal(dim1=1, dim2=2)
        firm = spread * damping[:, None] + 1e-6 * spread.amax(dim=1, keepdim=True) + 1e-30
        step = torch.linalg.solve(best.curvature + torch.diag_embed(firm), best.gradient)
        new_rotation, new_shift = exp(step[:, :3]) @ rotation, shift + step[:, 3:]
        now = measure(new_rotation, new_shift)
        better = now.value > best.value
        gained = torch.where(better, now.value - best.value, 0.0) / now.value.abs().clamp(min=1e-30)
        rotation, shift = _where(better, new_rotation, rotation), _where(better, new_shift, shift)
        best = Slope(*(_where(better, new, old) for new, old in zip(now, best, strict=True)))
        damping = torch.where(better, 0.2 * damping, 8.0 * damping)
        if bool(((gained < _GAINED) & (better | (damping > 1.0))).all()):
            break
    return rotation, shift


def _where(chosen: Bool[Tensor, " b"], new: Tensor, old: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)
