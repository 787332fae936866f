"""Find the rotation, shift and hand that lay one map on another. Call it through ``metrics/align.py``.

1. Both maps' transforms, whitened, to a small radius: every rotation of a HEALPix grid, both hands, and *all* shifts at once (one small
   inverse transform per rotation and hand).
2. The best few distinct rotations of each hand are refined together with the shift by L-BFGS through the differentiable transform.
3. The best of each hand is refined to the radius the two maps share, shells weighted by what their FSC says they are worth.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.so3 import distance, exp, healpix_grid
from cryorbit.metrics.fsc import crossing, fsc, shell_power
from cryorbit.metrics.resample import Spectrum, move_volume, spectrum
from cryorbit.physics.fourier import fourier_to_volume
from cryorbit.types import Volume

_SEARCH_RADIUS, _MIDDLE_RADIUS, _LARGEST_RADIUS = 7, 14, 40


@dataclass(frozen=True)
class MapAlignment:
    """A map laid on a reference: an atom at r of the moving map is at ``rotation @ (+-r) + shift`` (minus when ``mirrored``).

    ``map`` is the moved map (see ``resample.move_volume`` for its accuracy); ``shift`` (3,) angstrom; ``correlation`` Pearson's, between the
    moved map and the reference over the box; ``score`` and ``score_other_hand`` the whitened correlation to a quarter of Nyquist or so with
    this hand and the other: close together, the maps are too coarse to tell the hand.
    """

    map: Volume
    rotation: Float[Tensor, "3 3"]
    shift: Float[Tensor, "3"]
    mirrored: bool
    correlation: float
    score: float
    score_other_hand: float


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: on a shared machine, waiting for a second thread costs more than it brings (7x, measured)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Target:
    """Half of the reference's transform inside a ball, with a weight per voxel, and the moving map to read from."""

    k: Float[Tensor, "p 3"]
    shell: Int[Tensor, " p"]
    reference: Complex[Tensor, " p"]
    moving: Spectrum
    weight: Float[Tensor, " p"]
    norm: float


def _ball(radius: int) -> Int[Tensor, "p 3"]:
    """(x, y, z) of one of each Friedel pair with 0 < |k| <= radius."""
    axis = torch.arange(-radius, radius + 1)
    z, y, x = torch.meshgrid(axis, axis, axis[radius:], indexing="ij")
    first = (x > 0) | ((y > 0) | ((y == 0) & (z > 0)))
    keep = first & (x**2 + y**2 + z**2 <= radius**2)
    return torch.stack([x[keep], y[keep], z[keep]], dim=-1)


def _target(moving: Tensor, reference: Tensor, radius: int, shell_weight: Float[Tensor, " shells"]) -> _Target:
    points = _ball(radius)
    k = points.to(torch.float32)
    shell = k.norm(dim=-1).round().to(torch.int64)
    values = spectrum(reference, radius).at(k)
    weight = shell_weight.to(torch.float32)[shell]
    source = spectrum(moving, radius)
    power = [(weight * v.abs().square()).sum() for v in (values, source.at(k))]
    return _Target(k, shell, values, source, weight, float((power[0] * power[1]).sqrt().clamp(min=1e-30)))


def _whitening(moving: Tensor, reference: Tensor, power: float) -> Float[Tensor, " shells"]:
    """``(P_moving P_reference) ** -power`` per shell: 1/2 makes all voxels count alike, 0 leaves them as they are."""
    product = shell_power(moving) * shell_power(reference)
    return (product / product.max().clamp(min=1e-300)).clamp(min=1e-24) ** -power


def _search(target: _Target, box: int, radius: int) -> tuple[Float[Tensor, "2 g"], Float[Tensor, "2 g 3"]]:
    """Best score over all shifts, and that shift in pixels, for each hand and rotation of the grid."""
    grid, side = healpix_grid(2), 2 * radius + 2
    x, y, z = target.k.to(torch.int64).unbind(-1)
    place = ((z % side) * side + y % side) * (side // 2 + 1) + x
    on_plane = x == 0
    mate = (((-z[on_plane]) % side) * side + (-y[on_plane]) % side) * (side // 2 + 1)
    scores, shifts = [], []
    for rotations in grid.split(256):
        samples = target.moving.at(torch.einsum("gji,pj->gpi", rotations, target.k))
        for values in (samples, samples.conj()):
            cross = target.weight * target.reference * values.conj()
            full = cross.new_zeros((len(rotations), side * side * (side // 2 + 1)))
            full[:, place] = cross
            full[:, mate] = cross[:, on_plane].conj()
            field = fourier_to_volume(full.reshape(-1, side, side, side // 2 + 1), side) * (side**3 / 2)
            best, where = field.flatten(1).max(dim=1)
            position = torch.stack([where % side, where // side % side, where // side**2], dim=-1) - side // 2
            scores.append(best / target.norm)
            shifts.append(position.to(torch.float32) * (box / side))
    score = torch.stack([torch.cat(scores[0::2]), torch.cat(scores[1::2])])
    return score, torch.stack([torch.cat(shifts[0::2]), torch.cat(shifts[1::2])])


def _score(target: _Target, rotation: Tensor, shift_px: Tensor, mirrored: bool) -> Tensor:
    """Weighted correlation of the moved map with the reference; differentiable."""
    samples = target.moving.at(target.k @ rotation)
    moved = samples.conj() if mirrored else samples
    angle = (-2 * torch.pi / target.moving.box) * (target.k @ shift_px)
    product = target.reference.conj() * moved * torch.polar(torch.ones_like(angle), angle)
    return (target.weight * product.real).sum() / target.norm


def _refine(target: _Target, rotation: Tensor, shift_px: Tensor, mirrored: bool) -> tuple[Tensor, Tensor, float]:
    """Nearest maximum of the score over rotation and shift. The rotation step is scaled so that 1 moves the rim by about a pixel."""
    reach = 0.3 * target.moving.box

    def loss(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        step = torch.tensor(theta, dtype=torch.float32, requires_grad=True)
        value = -_score(target, exp(step[:3] / reach) @ rotation, shift_px + step[3:], mirrored)
        (gradient,) = torch.autograd.grad(value, step)
        return float(value.detach()), gradient.numpy().astype(np.float64)

    found = optimize.minimize(
        loss, np.zeros(6), jac=True, method="L-BFGS-B", options={"maxiter": 60, "ftol": 1e-9, "gtol": 1e-6}
    )
    step = torch.from_numpy(found.x).to(torch.float32)
    return exp(step[:3] / reach) @ rotation, shift_px + step[3:], -float(found.fun)


def _distinct(score: Float[Tensor, " g"], count: int, apart: float = 0.4) -> list[int]:
    """The best ``count`` rotations of the grid more than ``apart`` radian from each other."""
    grid = healpix_grid(2)
    chosen: list[int] = []
    for i in score.argsort(descending=True).tolist():
        if not chosen or float(distance(grid[i].expand(len(chosen), 3, 3), grid[chosen]).min()) > apart:
            chosen.append(i)
        if len(chosen) == count:
            break
    return chosen


def _worth(moved: Tensor, moving: Tensor, reference: Tensor) -> tuple[Float[Tensor, " shells"], int]:
    """Weight of each shell given how well the maps agree there, and the radius worth using.

    With a clean reference and a moving map of FSC c the likelihood weighs a shell by ``c / (1 - c^2) / sqrt(P_moving P_reference)``.
    """
    curve = fsc(moved, reference).clamp(min=0.0, max=0.97)
    shell = crossing(curve, 0.2)
    radius = len(curve) - 2 if shell is None else int(shell) + 1
    return curve / (1 - curve.square()) * _whitening(moving, reference, 0.5), radius


def align_volumes(
    moving: Volume,
    reference: Volume,
    start: tuple[Float[Tensor, "3 3"], Float[Tensor, "3"], bool] | None = None,
    candidates: int = 5,
) -> MapAlignment:
    """Lay ``moving`` on ``reference`` over all rotations, shifts and both hands.

    Parameters
    ----------
    moving, reference
        Maps of the same box and pixel size.
    start
        Rotation, shift in angstrom and hand known from elsewhere (the poses): refined as one more candidate; the search is done all the same.
    candidates
        Rotations refined for each hand.

    Returns
    -------
    MapAlignment: phantoms of 64^3 come back within 0.3 degrees and 0.1 pixels.

    Raises
    ------
    DataError
        Boxes or pixel sizes differ, or a map is constant or not finite.
    """
    box, pixel_size = reference.box, reference.pixel_size
    if moving.box != box or abs(moving.pixel_size / pixel_size - 1) > 2e-3:
        raise DataError(
            "DATA212",
            f"maps to align have {moving.box} pixels of {moving.pixel_size:.4g} A and {box} pixels of {pixel_size:.4g} A, expected the same",
            "resample one of them to the other's box and pixel size",
        )
    a, b = (v.data.detach().to("cpu", torch.float32) for v in (moving, reference))
    for name, v in (("moving", a), ("reference", b)):
        if not bool(torch.isfinite(v).all()) or float(v.std()) == 0:
            raise DataError(
                "DATA213",
                f"the {name} map is constant or holds values that are not finite",
                "was it written completely?",
            )
    with _one_thread():
        rotation, shift_px, mirrored, score, other = _best_motion(a, b, pixel_size, start, candidates)
    moved = move_volume(a, rotation, shift_px, mirrored)
    correlation = float(torch.corrcoef(torch.stack([moved.flatten(), b.flatten()]).double())[0, 1])
    laid = Volume(moved.to(moving.data), pixel_size)
    return MapAlignment(laid, rotation, shift_px * pixel_size, mirrored, correlation, score, other)


def _best_motion(
    a: Float[Tensor, "d d d"],
    b: Float[Tensor, "d d d"],
    pixel_size: float,
    start: tuple[Float[Tensor, "3 3"], Float[Tensor, "3"], bool] | None,
    candidates: int,
) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"], bool, float, float]:
    """Rotation, shift in pixels and hand that lay ``a`` on ``b``, and the scores of this hand and the other."""
    box = b.shape[-1]
    nyquist = box // 2 - 1
    low, middle = min(_SEARCH_RADIUS, nyquist), min(_MIDDLE_RADIUS, nyquist)
    score, shift = _search(_target(a, b, low, _whitening(a, b, 0.5)), box, low)
    target = _target(a, b, middle, _whitening(a, b, 0.25))
    grid = healpix_grid(2)
    trials = [(grid[i], shift[hand, i], bool(hand)) for hand in (0, 1) for i in _distinct(score[hand], candidates)]
    if start is not None:
        trials.append((start[0].to(torch.float32), start[1].to(torch.float32) / pixel_size, start[2]))
    found = [(*_refine(target, r, s, m), m) for r, s, m in trials]
    best = {hand: max((f for f in found if f[3] == hand), key=lambda f: f[2]) for hand in (False, True)}
    mirrored = best[True][2] > best[False][2]
    rotation, shift_px, final, _ = best[mirrored]
    weight, radius = _worth(move_volume(a, rotation, shift_px, mirrored), a, b)
    radius = min(radius, _LARGEST_RADIUS, nyquist)
    if radius >= 4:
        rotation, shift_px, _ = _refine(_target(a, b, radius, weight), rotation, shift_px, mirrored)
    return rotation, shift_px, mirrored, final, best[not mirrored][2]
