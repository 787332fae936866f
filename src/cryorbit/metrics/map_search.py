"""Find the rotation, shift and hand that lay one map on another. Call it through ``metrics/align.py``.

1. Both maps' transforms to a small radius, and a larger one where that leaves the hand undecided: every rotation of a HEALPix grid,
   both hands, and *all* shifts at once (one small inverse transform per rotation and hand), once with the shells whitened and once
   nearly as they are.
2. The best few distinct rotations of each hand are refined together with the shift, all of them at once, by Gauss-Newton steps.
3. They are compared by the information the maps share, ``-sum n_s ln(1 - FSC_s^2)``: it needs no choice of weights or of a radius,
   shells of noise add the same to every candidate, and its gradient is what step 4 climbs.
4. The best of each hand are refined further, every shell weighted by what its FSC says it is worth.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.so3 import distance, exp, healpix_grid
from cryorbit.metrics.climb import Slope, climb, correlated
from cryorbit.metrics.fsc import shell_power
from cryorbit.metrics.resample import Spectrum, move_volume, spectrum
from cryorbit.physics.fourier import fourier_to_volume
from cryorbit.types import Volume

# The second where the first leaves the hand undecided: a round molecule shows its shape only there.
_SEARCH_RADII = (7, 10)
_MIDDLE_RADIUS, _LARGEST_RADIUS = 14, 40
_WHITENINGS = (0.5, 0.15)  # half: all voxels count alike; less: shells the moving map does not reach count little
_HIGHEST = 0.97  # FSC beyond which a shell is worth no more
_UNDECIDED = 0.05

# Points of Fourier space that lie on neither map's grid, but for a chance motion: between its grid points a transform is read as if the map
# faded outwards, noise more than molecule, so maps that lie on each other would look better apart.
_ASKEW = exp(torch.tensor([0.5, 0.3, 0.9]))

Motion = tuple[Tensor, Tensor, bool]  # rotation, shift in pixels, mirrored


@dataclass(frozen=True)
class MapAlignment:
    """A map laid on a reference: an atom at r of the moving map is at ``rotation @ (+-r) + shift`` (minus when
    ``mirrored``).

    ``map`` is the moved map (see ``resample.move_volume`` for its accuracy); ``shift`` (3,) angstrom; ``correlation``
    Pearson's, between the moved map and the reference over the box; ``score`` and ``score_other_hand`` the information
    shared with this hand and with the other, nats per Fourier voxel: ``hand_undecided`` when they are within 5 % of
    each other.
    """

    map: Volume
    rotation: Float[Tensor, "3 3"]
    shift: Float[Tensor, "3"]
    mirrored: bool
    correlation: float
    score: float
    score_other_hand: float

    @property
    def hand_undecided(self) -> bool:
        """Whether the maps are too coarse or too noisy to tell the hand."""
        return self.score - self.score_other_hand < _UNDECIDED * self.score


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: on a shared machine, waiting for a second thread costs more than it brings (7x,
    measured).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Pair:
    """The two maps' transforms inside a ball of Fourier space: half of the reference's voxels, and the moving map to
    read from.
    """

    k: Float[Tensor, "p 3"]
    shell: Int[Tensor, " p"]
    reference: Complex[Tensor, " p"]
    moving: Spectrum
    whitening: Float[Tensor, " p"]

    def moved(self, motion: Motion) -> Complex[Tensor, " p"]:
        """The moving map's transform after ``motion``."""
        rotation, shift_px, mirrored = motion
        samples = self.moving.at(self.k @ rotation)
        angle = (-2 * torch.pi / self.moving.box) * (self.k @ shift_px)
        return (samples.conj() if mirrored else samples) * torch.polar(torch.ones_like(angle), angle)

    def slopes(
        self, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 3"], mirrored: Bool[Tensor, " b"]
    ) -> tuple[Complex[Tensor, "b p"], Complex[Tensor, "b 6 p"]]:
        """The moving map's transform after each motion, and its derivatives by a small rotation that follows (radian) and by the shift."""
        samples, gradient = self.moving.slope(self.k @ rotation)
        turning = torch.linalg.cross(gradient @ rotation.mT.to(gradient), self.k.to(gradient).expand_as(gradient))
        unit = -2 * torch.pi / self.moving.box
        angle = unit * torch.einsum("pj,bj->bp", self.k, shift_px)
        phase = torch.polar(torch.ones_like(angle), angle)
        moved = torch.where(mirrored[:, None], samples.conj(), samples) * phase
        turning = torch.where(mirrored[:, None, None], turning.conj(), turning) * phase[..., None]
        return moved, torch.cat([turning.mT, 1j * unit * self.k.mT * moved[:, None]], dim=1)

    def _agreement(self, motion: Motion) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
        """FSC after ``motion`` and the geometric mean of the two maps' power, shells 0 to the radius of the ball."""
        moved, count = self.moved(motion), int(self.shell.max()) + 1

        def total(values: Tensor) -> Tensor:
            return torch.bincount(self.shell, weights=values.double(), minlength=count)

        power = (total(self.reference.abs().square()) * total(moved.abs().square())).sqrt().clamp(min=1e-30)
        return total((self.reference.conj() * moved).real) / power, power / total(
            torch.ones_like(self.whitening)
        ).clamp(min=1)

    def information(self, motion: Motion) -> float:
        """Mutual information of the maps after ``motion`` if both are Gaussian per shell, nats per voxel."""
        c = self._agreement(motion)[0].clamp(min=0.0, max=_HIGHEST)
        return float(-(torch.log1p(-c.square())[self.shell]).mean())

    def reach(self, motion: Motion) -> int:
        """Last shell before the FSC falls below 0.1 (at least 3)."""
        below = torch.nonzero(self._agreement(motion)[0][4:] < 0.1)
        return int(below[0]) + 3 if len(below) else int(self.shell.max())

    def worth(self, motion: Motion) -> Float[Tensor, " p"]:
        """Weight of each voxel in the gradient of the information: ``c / (1 - c^2) / sqrt(P_moving P_reference)``, 0
        beyond ``reach``.
        """
        c, power = self._agreement(motion)
        c = c.clamp(min=0.0, max=_HIGHEST)
        c[self.reach(motion) + 1 :] = 0.0
        weight = c / (1 - c.square()) / power * power[1:].max()
        return weight.to(torch.float32)[self.shell]


def _ball(radius: int) -> Int[Tensor, "p 3"]:
    """(x, y, z) of one of each Friedel pair with 0 < |k| <= radius."""
    axis = torch.arange(-radius, radius + 1)
    z, y, x = torch.meshgrid(axis, axis, axis[radius:], indexing="ij")
    first = (x > 0) | ((y > 0) | ((y == 0) & (z > 0)))
    keep = first & (x**2 + y**2 + z**2 <= radius**2)
    return torch.stack([x[keep], y[keep], z[keep]], dim=-1)


def _pair(moving: Tensor, reference: Tensor, radius: int, turn: Tensor = _ASKEW) -> _Pair:
    k = _ball(radius).to(torch.float32) @ turn
    shell = k.norm(dim=-1).round().to(torch.int64)
    power = shell_power(moving) * shell_power(reference)
    whitening = (power / power.max().clamp(min=1e-300)).clamp(min=1e-20).rsqrt().to(torch.float32)
    return _Pair(k, shell, spectrum(reference, radius).at(k), spectrum(moving, radius), whitening[shell])


def _search(pair: _Pair, radius: int) -> tuple[Float[Tensor, "w 2 g"], Float[Tensor, "w 2 g 3"]]:
    """Best correlation over all shifts, and that shift in pixels, for each whitening, hand and rotation of the grid; ``pair`` not turned."""
    box, side = pair.moving.box, 2 * radius + 2
    targets = [pair.reference * pair.whitening ** (2 * power) for power in _WHITENINGS]
    x, y, z = pair.k.to(torch.int64).unbind(-1)
    place = ((z % side) * side + y % side) * (side // 2 + 1) + x
    on_plane = x == 0
    mate = (((-z[on_plane]) % side) * side + (-y[on_plane]) % side) * (side // 2 + 1)
    scores, shifts = [], []
    for rotations in healpix_grid(2).split(256):
        samples = pair.moving.at(pair.k @ rotations)
        for target in targets:
            for values in (samples, samples.conj()):
                cross = target * values.conj()
                full = cross.new_zeros((len(rotations), side * side * (side // 2 + 1)))
                full[:, place] = cross
                full[:, mate] = cross[:, on_plane].conj()
                field = fourier_to_volume(full.reshape(-1, side, side, side // 2 + 1), side)
                best, where = field.flatten(1).max(dim=1)
                position = torch.stack([where % side, where // side % side, where // side**2], dim=-1) - side // 2
                scores.append(best)
                shifts.append(position.to(torch.float32) * (box / side))
    kinds = 2 * len(targets)
    score, shift = (torch.stack([torch.cat(found[i::kinds]) for i in range(kinds)]) for found in (scores, shifts))
    return score.unflatten(0, (-1, 2)), shift.unflatten(0, (-1, 2))


def _refine(pair: _Pair, weight: Float[Tensor, "#b p"], starts: Sequence[Motion], iterations: int = 15) -> list[Motion]:
    """Nearest maximum of the weighted correlation from each start."""
    mirrored = torch.tensor([start[2] for start in starts])

    def measure(rotation: Tensor, shift: Tensor) -> Slope:
        return correlated(weight, pair.reference[None], *pair.slopes(rotation, shift, mirrored), pair.shell)

    found = climb(measure, torch.stack([s[0] for s in starts]), torch.stack([s[1] for s in starts]), iterations)
    return [(r, s, bool(m)) for r, s, m in zip(*found, mirrored, strict=True)]


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


def align_volumes(
    moving: Volume,
    reference: Volume,
    start: tuple[Float[Tensor, "3 3"], Float[Tensor, "3"], bool] | None = None,
    candidates: int = 4,
) -> MapAlignment:
    """Lay ``moving`` on ``reference`` over all rotations, shifts and both hands.

    Parameters
    ----------
    moving, reference
        Maps of the same box and pixel size.
    start
        Rotation, shift in angstrom and hand known from elsewhere (the poses): refined as one more candidate; the search
        is done all the same.
    candidates
        Rotations refined for each hand and each of the two searches.

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
            f"maps to align have {moving.box} pixels of {moving.pixel_size:.4g} A and "
            f"{box} pixels of {pixel_size:.4g} A, expected the same",
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
    known = None if start is None else (start[0].to(torch.float32), start[1].to(torch.float32) / pixel_size, start[2])
    with _one_thread():
        rotation, shift_px, mirrored, score, other = _best_motion(a, b, known, candidates)
    moved = move_volume(a, rotation, shift_px, mirrored)
    correlation = float(torch.corrcoef(torch.stack([moved.flatten(), b.flatten()]).double())[0, 1])
    laid = Volume(moved.to(moving.data), pixel_size)
    return MapAlignment(laid, rotation, shift_px * pixel_size, mirrored, correlation, score, other)


def improve_alignment(
    moving: Float[Tensor, "d d d"], reference: Float[Tensor, "d d d"], start: Motion, *, rounds: int = 3
) -> Motion:
    """The nearest best motion to one that is about right: rotation (3, 3), shift (3,) pixels, hand (kept).

    Every shell to where the FSC ends counts by what it is worth; the reach grows as the maps fall into place.
    """
    a, b = (v.detach().to("cpu", torch.float32) for v in (moving, reference))
    motion = start[0].to("cpu", torch.float32), start[1].to("cpu", torch.float32), start[2]
    with _one_thread():
        pair = _pair(a, b, min(_LARGEST_RADIUS, b.shape[-1] // 2 - 1))
        for _ in range(rounds):
            (motion,) = _refine(pair, pair.worth(motion)[None], [motion])
    return motion


def _trials(coarse: _Pair, radius: int, candidates: int) -> list[Motion]:
    """The best few rotations of the grid for each hand and each whitening, refined a little."""
    grid, trials, weights = healpix_grid(2), [], []
    for power, score, shift in zip(_WHITENINGS, *_search(coarse, radius), strict=True):
        for hand in (0, 1):
            chosen = _distinct(score[hand], candidates)
            trials += [(grid[i], shift[hand, i], bool(hand)) for i in chosen]
            weights += [coarse.whitening ** (2 * power)] * len(chosen)
    return _refine(coarse, torch.stack(weights), trials, iterations=10)


def _best_motion(
    a: Float[Tensor, "d d d"], b: Float[Tensor, "d d d"], start: Motion | None, candidates: int
) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"], bool, float, float]:
    """Rotation, shift in pixels and hand that lay ``a`` on ``b``, and the scores of this hand and the other."""
    nyquist = b.shape[-1] // 2 - 1
    middle = min(_MIDDLE_RADIUS, nyquist)
    finer = _pair(a, b, middle)
    trials: list[Motion] = [] if start is None else [start]
    for low in sorted({min(radius, nyquist) for radius in _SEARCH_RADII}):
        trials += _trials(_pair(a, b, low, torch.eye(3)), low, candidates)
        told = sorted(trials, key=finer.information, reverse=True)
        ranked = [t for hand in (False, True) for t in [t for t in told if t[2] == hand][:3]]
        for _ in range(2):
            ranked = _refine(finer, torch.stack([finer.worth(t) for t in ranked]), ranked)
        best = {hand: max((t for t in ranked if t[2] == hand), key=finer.information) for hand in (False, True)}
        mirrored = finer.information(best[True]) > finer.information(best[False])
        motion, other = best[mirrored], best[not mirrored]
        final, final_other = finer.information(motion), finer.information(other)
        if final - final_other > _UNDECIDED * final:
            break
    if finer.reach(motion) == middle:
        finer = _pair(a, b, min(_LARGEST_RADIUS, nyquist))
        finer = _pair(a, b, finer.reach(motion))
    for _ in range(2):
        (motion,) = _refine(finer, finer.worth(motion)[None], [motion])
    return motion[0], motion[1], mirrored, final, final_other
