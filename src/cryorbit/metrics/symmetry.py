"""Find the point group of a map nobody has aligned: which rotations about which axes leave it as it is.

1. The map is cut out and centred at its centre of mass; its noise is read off outside the molecule, or taken from the
   FSC of its halves.
2. The map's correlation with itself is tabulated for 2- to 12-fold rotations about every axis of a HEALPix hemisphere
   and all small shifts at once.
3. Every point group is laid over the table in every orientation; the best orientations are refined together with the
   common centre of the axes, all elements of the group at once.
4. The largest group is kept all of whose elements fit the map about as well as the best rotation found, and as well as
   its noise allows. A round molecule fits itself roughly at any rotation: what counts is the information shared,
   ``-sum n_s ln(1 - c_s^2)`` over shells, beyond what it shares with itself at random rotations.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import healpix_grid
from cryorbit.metrics.map_search import _one_thread
from cryorbit.metrics.symmetry_search import (
    FIRST_SHELL,
    MAX_FOLD,
    WEAK,
    Ball,
    Fit,
    Particle,
    ball_of,
    best_start,
    cut_out,
    group_elements,
    half_turns,
    refine,
    tabulate,
)
from cryorbit.types import Volume

_GROUPS = ("I", "O", "T", *(f"{kind}{n}" for n in range(MAX_FOLD, 1, -1) for kind in "DC"))
_SEARCH_RADIUS, _FINAL_RADIUS = 8.0, 16.0  # Fourier pixels of a box as wide as the molecule
_PROMISING, _WORTH_A_LOOK = 0.25, 0.4  # least correlation of an element on the table, and refined
_ENOUGH = 0.35  # of the information the noise allows, beyond that at rotations outside the group
_APART = 0.1  # least distance from them: a map round about an axis has no fold that can be told
_SURE = 25.0  # nats an element must share; the best rotation of pure noise shares up to 9
_EVEN = 0.5  # least information of an element as a fraction of the best one's


@dataclass(frozen=True)
class GroupScore:
    """How well one point group fits: ``correlation`` of the map with its group average; of its elements, the least
    correlation (``element``), and the least and best ``information`` as fractions of what the noise allows; ``nats`` the least, in all.
    """

    name: str
    order: int
    correlation: float
    element: float
    information: float
    best: float
    nats: float


@dataclass(frozen=True)
class SymmetryFinding:
    """Point group of a map: an atom at r goes to ``rotation @ r + shift`` (angstrom) to put the axes as
    ``groups/point.py`` has them; ``score`` the correlation of the map with its group average; ``table`` all groups
    that were fitted.
    """

    name: str
    rotation: Float[Tensor, "3 3"]
    shift: Float[Tensor, "3"]
    score: float
    table: tuple[GroupScore, ...]


def no_symmetry(table: tuple[GroupScore, ...] = ()) -> SymmetryFinding:
    """C1, after looking at the groups of ``table``."""
    return SymmetryFinding("C1", torch.eye(3), torch.zeros(3), 1.0, table)


def _judge(ball: Ball, fit: Fit) -> tuple[GroupScore, float]:
    """The score of a fit, and the information at rotations that do not belong to the group."""
    members, elements = point_group(fit.name).to(torch.float32), group_elements(fit.name)
    agreement = ball.agreement(fit.turned(elements), fit.middle)
    share = ball.count * ball.expected
    correlation = agreement @ (share / share.sum())
    twice = torch.where((elements @ elements - torch.eye(3)).abs().amax(dim=(-1, -2)) < 1e-3, 1.0, 2.0)
    average = (1.0 + float((correlation * twice).sum())) / len(members)
    other = healpix_grid(1)[::9]
    near = torch.einsum("gij,sij->gs", other, members).amax(dim=1)
    other = fit.turned(other[near < 1 + 2 * math.cos(0.3)])
    half = ball.information(ball.agreement(fit.turned(half_turns(fit.name)), fit.middle)).max()
    random = ball.information(ball.agreement(other, fit.middle)).median()
    information = ball.information(agreement)
    least, best = float(information.min()), float(information.max())
    nats = float(ball.nats(agreement).min())
    score = GroupScore(fit.name, len(members), max(average, 0.0) ** 0.5, float(correlation.min()), least, best, nats)
    return score, float(torch.maximum(half, random))


def _radii(particle: Particle, box: int, radius: int | None) -> tuple[int, int]:
    """Fourier radii of the search and of the judgement, in pixels of the small box."""
    small = particle.data.shape[-1]
    wide = small / (2 * particle.radius)
    weak = torch.nonzero(particle.expected[FIRST_SHELL:] <= WEAK)
    last = int(weak[0]) + FIRST_SHELL - 1 if len(weak) else small
    last = min(last, round(_FINAL_RADIUS * wide))
    last = min(max(last if radius is None else round(radius * small / box), FIRST_SHELL + 2), small // 2 - 2)
    return min(round(_SEARCH_RADIUS * wide), last), last


def detect_symmetry(
    volume: Volume,
    radius: int | None = None,
    mask_diameter: float | None = None,
    fsc: Float[Tensor, " shells"] | None = None,
) -> SymmetryFinding:
    """Point group of a map reconstructed without symmetry, and the motion that puts its axes where they belong.

    Parameters
    ----------
    volume
        Map with bright protein, anywhere in its box, at any orientation; the axes need not pass through the centre.
    radius
        Last Fourier shell to look at; by default the last before the map is mostly noise, and no more than 16 per
        diameter of the molecule.
    mask_diameter
        Of the molecule, angstrom; by default measured on the map.
    fsc
        FSC of the two half maps this map is the mean of, unmasked; by default the noise is read off outside the
        molecule, which fails on maps that were masked.

    Returns
    -------
    SymmetryFinding: ``C1`` when no group fits. Folds beyond 12 are not tried.

    Raises
    ------
    DataError
        ``DATA214``: the map is constant, not finite, or has no positive density; ``DATA215``: fewer than 16 pixels.
    """
    box, data = volume.box, volume.data.detach().to("cpu", torch.float32)
    if box < 16:
        raise DataError("DATA215", f"a map of {box} pixels is too small to look for a symmetry in, expected 16 or more")
    if not bool(torch.isfinite(data).all()) or float(data.std()) == 0:
        raise DataError("DATA214", "the map is constant or holds values that are not finite", "was it written whole?")
    with _one_thread():
        particle = cut_out(data, None if mask_diameter is None else mask_diameter / volume.pixel_size, fsc)
        fit, table = _best_group(particle, *_radii(particle, box, radius))
    if fit is None:
        return no_symmetry(tuple(table))
    middle = (particle.middle + fit.middle) * volume.pixel_size
    rotation = fit.frame.T
    return SymmetryFinding(fit.name, rotation, -rotation @ middle, table[-1].correlation, tuple(table))


def _best_group(particle: Particle, search: int, final: int) -> tuple[Fit | None, list[GroupScore]]:
    """The largest group that fits, and the scores of those that were fitted on the way, it last."""
    coarse, fine = (ball_of(particle, r) for r in (search, final))
    turns, shifts = tabulate(coarse)
    tried: list[GroupScore] = []
    for name in sorted(_GROUPS, key=lambda name: len(point_group(name)), reverse=True):
        least, fit = best_start(name, turns, shifts)
        if least < _PROMISING:
            continue
        fit = refine(coarse, fit, 10)
        score, base = _judge(coarse, fit)
        if score.element > _WORTH_A_LOOK and final > search:
            fit = refine(fine, fit, 15)
            score, base = _judge(fine, fit)
        tried.append(score)
        whole = max(1.0, score.best)  # the noise outside the molecule may be more than the noise on it
        enough = score.information - base > max(_ENOUGH * (whole - base), _APART)
        sure = score.nats > _SURE and score.element > _WORTH_A_LOOK
        if enough and sure and score.information > _EVEN * score.best:
            return fit, tried
    return None, tried
