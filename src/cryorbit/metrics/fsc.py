"""Fourier shell correlation, the resolution it crosses a threshold at, and what follows from it.

Shells are hard and do not overlap: shell s holds every Fourier voxel whose ``|k|`` rounds to s (RELION's choice), and
the stored half of the transform is weighted so that both members of each Friedel pair count. Masks are in
``metrics/masks.py``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.physics.fourier import fourier_to_volume, friedel_weight, image_to_fourier, shell_index, volume_to_fourier


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise DataError(
            "DATA201",
            f"two maps to compare have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same",
            "crop or pad one of them",
        )


def shell_sum(values: Float[Tensor, "*s h"], shells: Int[Tensor, "*s h"], box: int) -> Float[Tensor, " shells"]:
    """Sum over the whole transform of ``values`` given on its rfft half, per shell 0 .. D // 2 of the index ``shells``."""
    values = values * friedel_weight(box, values)
    keep = shells <= box // 2
    zero = torch.zeros(box // 2 + 1, dtype=values.dtype, device=values.device)
    return zero.index_add(0, shells[keep], values[keep])


def _correlate(
    fa: Complex[Tensor, "*s h"], fb: Complex[Tensor, "*s h"], shells: Tensor, box: int
) -> Float[Tensor, " shells"]:
    cross = shell_sum((fa * fb.conj()).real, shells, box)
    power_a = shell_sum(fa.abs().square(), shells, box)
    power_b = shell_sum(fb.abs().square(), shells, box)
    norm = (power_a * power_b).sqrt()
    return torch.where(norm > 0, cross / torch.where(norm > 0, norm, 1.0), 0.0)


def fsc(a: Float[Tensor, "d d d"], b: Float[Tensor, "d d d"]) -> Float[Tensor, " shells"]:
    """Fourier shell correlation of two maps on the same grid.

    ``FSC(s) = Re sum F G* / sqrt(sum |F|^2 sum |G|^2)`` over shell s (Harauz and van Heel 1986).

    Parameters
    ----------
    a, b
        (D, D, D) maps; any scale and offset of either leaves every shell but 0 as it is.

    Returns
    -------
    (D // 2 + 1,) float64 in [-1, 1]; shell s is at spatial frequency ``s / (D * pixel_size)``. 0 where either map has
    no power.

    Raises
    ------
    DataError
        The maps differ in size.
    """
    _same_shape(a, b)
    fa, fb = (volume_to_fourier(v.to(torch.float64)) for v in (a, b))
    return _correlate(fa, fb, shell_index(a.shape[-1], a.device), a.shape[-1])


def frc(a: Float[Tensor, "d d"], b: Float[Tensor, "d d"]) -> Float[Tensor, " shells"]:
    """Fourier ring correlation of two images, as :func:`fsc`."""
    _same_shape(a, b)
    fa, fb = (image_to_fourier(v.to(torch.float64)) for v in (a, b))
    return _correlate(fa, fb, shell_index(a.shape[-1], a.device)[0], a.shape[-1])


def shell_power(volume: Float[Tensor, "d d d"]) -> Float[Tensor, " shells"]:
    """Mean ``|F|^2`` per shell (float64, unnormalised transform)."""
    box = volume.shape[-1]
    f, shells = volume_to_fourier(volume.to(torch.float64)), shell_index(box, volume.device)
    power = f.abs().square()
    return shell_sum(power, shells, box) / shell_sum(torch.ones_like(power), shells, box)


def crossing(curve: Float[Tensor, " shells"], threshold: float) -> float | None:
    """Shell (fractional) at which ``curve`` first falls below ``threshold``, None when it never does.

    The first shell s >= 1 below the threshold is found and the curve is taken as straight between s - 1 and s; shell 0,
    which says nothing (it compares two means), counts as 1.
    """
    values = curve.detach().to("cpu", torch.float64).clone()
    values[0] = 1.0
    below = torch.nonzero(values[1:] < threshold)
    if not len(below):
        return None
    s = int(below[0]) + 1
    high, low = float(values[s - 1]), float(values[s])
    return s - 1 + (high - threshold) / (high - low)


def last_shell(curve: Float[Tensor, " shells"], threshold: float) -> int:
    """Last shell before ``curve`` first falls below ``threshold``, the last of all when it never does."""
    below = torch.nonzero(curve[1:] < threshold)
    return int(below[0]) if len(below) else len(curve) - 1


def resolution(curve: Float[Tensor, " shells"], threshold: float, box: int, pixel_size: float) -> float:
    """Resolution in angstrom at which an FSC curve first crosses ``threshold``, by linear interpolation between shells.

    Parameters
    ----------
    curve
        (box // 2 + 1,) FSC.
    threshold
        0.143 between independent half maps (Rosenthal and Henderson 2003), 0.5 against a noise-free truth.
    box, pixel_size
        Side length in pixels and angstrom per pixel of the maps.

    Returns
    -------
    Angstrom; Nyquist (``2 * pixel_size``) when the curve never falls below the threshold, the side of the map when it does so before shell 1.
    """
    if len(curve) != box // 2 + 1:
        raise DataError(
            "DATA202",
            f"an FSC of {len(curve)} shells does not belong to a box of {box}, expected {box // 2 + 1} shells",
        )
    shell = crossing(curve, threshold)
    nyquist = 2.0 * pixel_size
    return nyquist if shell is None else max(box * pixel_size / max(shell, 1.0), nyquist)


def ssnr(curve: Float[Tensor, " shells"], halves: bool = True) -> Float[Tensor, " shells"]:
    """Spectral signal-to-noise ratio of the full map from an FSC.

    Between half maps ``2 FSC / (1 - FSC)`` (Rosenthal and Henderson 2003); against a noise-free truth
    (``halves=False``) ``FSC^2 / (1 - FSC^2)``. Negative correlations count as 0; the value is capped at 1e6.
    """
    c = curve.clamp(min=0.0, max=1.0)
    signal = 2 * c if halves else c.square()
    noise = 1 - c if halves else 1 - c.square()
    return (signal / noise.clamp(min=1e-12)).clamp(max=1e6)


def randomise_phases(volume: Float[Tensor, "d d d"], shell: int, generator: torch.Generator) -> Float[Tensor, "d d d"]:
    """Keep every amplitude; replace the phases at ``|k| >= shell`` by those of white noise (so the map stays real)."""
    box = volume.shape[-1]
    f = volume_to_fourier(volume.to(torch.float64))
    noise = torch.randn(volume.shape, generator=generator, dtype=torch.float64).to(volume.device)
    phase = torch.angle(volume_to_fourier(noise))
    swapped = torch.polar(f.abs(), phase)
    return fourier_to_volume(torch.where(shell_index(box, volume.device) >= shell, swapped, f), box).to(volume.dtype)


@dataclass(frozen=True)
class MaskedFSC:
    """FSC of two half maps with and without a mask, and what the mask alone adds (Chen et al. 2013, as RELION's
    postprocess).

    ``unmasked``, ``masked``, ``randomised`` (masked, after phases beyond ``shell`` were randomised) and ``corrected``
    are (shells,).
    """

    unmasked: Float[Tensor, " shells"]
    masked: Float[Tensor, " shells"]
    randomised: Float[Tensor, " shells"]
    corrected: Float[Tensor, " shells"]
    shell: int


def masked_fsc(
    half_1: Float[Tensor, "d d d"],
    half_2: Float[Tensor, "d d d"],
    mask: Float[Tensor, "d d d"],
    generator: torch.Generator,
    randomise_from: float = 0.8,
) -> MaskedFSC:
    """FSC of two half maps inside a soft mask, corrected for the correlation the mask itself makes.

    Phases of both halves are randomised from the first shell where the unmasked FSC falls below ``randomise_from``;
    from two shells beyond it ``corrected = (masked - randomised) / (1 - randomised)``, and ``masked`` before (RELION's
    rule).

    Parameters
    ----------
    half_1, half_2
        (D, D, D) independent half maps.
    mask
        (D, D, D) soft mask in [0, 1].
    generator
        Source of the random phases.
    randomise_from
        FSC below which phases are randomised.
    """
    unmasked = fsc(half_1, half_2)
    masked = fsc(half_1 * mask, half_2 * mask)
    below = torch.nonzero(unmasked[1:] < randomise_from)
    if not len(below):
        return MaskedFSC(unmasked, masked, torch.zeros_like(masked), masked, len(unmasked))
    shell = int(below[0]) + 1
    random_1, random_2 = (randomise_phases(h, shell, generator) * mask for h in (half_1, half_2))
    randomised = fsc(random_1, random_2)
    true = (masked - randomised) / (1 - randomised).clamp(min=1e-6)
    late = torch.arange(len(masked), device=masked.device) >= shell + 2
    corrected = torch.where(late, true.clamp(min=-1.0, max=1.0), masked)
    return MaskedFSC(unmasked, masked, randomised, corrected, shell)
