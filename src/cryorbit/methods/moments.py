"""Map and density of views from the moments of images, without poses (papers/003 section 4.2 and 5.2).

* **volume**: spherical harmonics times spherical Bessel functions in a ball, or a sum of Gaussians (``methods/moment_maps.py``).
* **poses**: a density over view directions, softmax on a HEALPix grid of one number per direction or of spherical harmonics; in-plane
  rotations uniform.
* **objective**: squared mismatch of first and second moment (eq. 30), each entry over the power of its two rings (so that inner rings, where
  nearly all power is, do not decide alone), and a penalty on negative density of the map.

Changed from the paper: L-BFGS on coefficients in place of networks; the second moment in blocks, one per angular order, which uniform in-plane
rotation makes exact; several random starts, radii marched outwards. What two moments cannot tell (other maps have nearly the same ones) is
left to a prior: the family of maps, its penalty, and the starts.
"""

import math
from dataclasses import astuple, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.methods.moment_fit import Found, MomentFit, MomentMap, MomentsConfig
from cryorbit.methods.moment_maps import BallMaps
from cryorbit.physics.image_moments import ImageMoments
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.third_moments import ThirdMoments
from cryorbit.volumes.ball import BallBasis

MARGIN = 2
"""Fourier pixels beyond the rings, at least, that maps reach which third moments decide."""

_FINER = 1.2  # degree over rings beyond the first ones, over what it is there
_DEGREES = 4  # of harmonics for each HEALPix pixel along the side of a base pixel
_FINEST = 5  # HEALPix order of directions: beyond, slices do not fit a computer


def check_inversion(config: MomentsConfig, basis: PolarBasis, rings: int, *, third: bool) -> None:
    """Refuse settings that cannot invert moments on ``rings`` of the rings of ``basis``, ``third`` ones among them: CONF115."""
    most = basis.rings
    counts = 1 <= config.kept <= config.starts and min(config.degree, config.iterations) >= 1
    sound = all(0 <= x < math.inf for x in astuple(config))
    directions = 12 * 4**config.order  # of HEALPix
    margin = max(config.margin, MARGIN) if third else 0 if config.gaussians else config.margin
    fits = config.order <= _FINEST and (not margin or rings + margin <= basis.box / 2)
    if not (2 <= rings <= most and counts and sound and fits and 1 <= (config.view_degree + 1) ** 2 <= directions):
        raise ConfigError(
            "CONF115",
            f"{config} cannot invert moments on {most} rings",
            f"rings 2 to {most} (0: all), degree and iterations from 1, kept from 1 to starts, none negative or infinite, views of at most "
            f"{directions} harmonics, the number of directions, order at most {_FINEST}, rings and margin within half the box",
        )


def _check(moments: ImageMoments, config: MomentsConfig, rings: int, third: ThirdMoments | None) -> None:
    """CONF115 settings out of range, DATA409 moments without a signal, DATA416 shifts, DATA418 third moments on other rings."""
    most = len(moments.first) - 1
    check_inversion(config, moments.basis, rings, third=third is not None)
    moments.check()
    if third is None:
        return
    third.check()
    if third.filters.basis != moments.basis or rings != most:
        raise DataError(
            "DATA418",
            f"third moments on {third.filters.basis} beside moments on {moments.basis}, {rings} of these rings asked for",
            "measure both on the rings to be matched",
        )


def invert_moments(
    moments: ImageMoments, config: MomentsConfig, generator: torch.Generator, third: ThirdMoments | None = None
) -> MomentMap:
    """The map whose moments are closest to ``moments``.

    With third moments those that were kept are followed on among all maps in a ball (whatever the family before, with a margin of at least
    two Fourier pixels), and the one that meets all moments best three times as far.

    Parameters
    ----------
    moments
        Debiased; shifts that the images have are reckoned with.
    config
        Settings.
    generator
        Draws the starts.
    third
        Debiased, of the same rings.

    Raises
    ------
    ConfigError
        CONF115 settings out of range.
    DataError
        DATA409 moments without a signal; DATA417 ``tolerance`` for moments without variances; DATA418 third moments on other rings.
    """
    rings = config.rings or len(moments.first) - 1
    _check(moments, config, rings, third)
    least = max(2, math.ceil(moments.basis.box / (2 * moments.centred_basis.radius)))  # that some function reaches
    stages = sorted({min(max(least, x), rings) for x in (rings // 2, round(0.8 * rings), rings)})
    fit = MomentFit(moments, config, stages[0])
    found = sorted((_random_start(fit, generator) for _ in range(config.starts)), key=lambda x: x[2])
    found = found[: config.kept]
    for before, stage in pairwise(stages):
        wider = MomentFit(moments, config, stage)
        found = [wider.minimised(wider.maps.carried(a, before), views, config.iterations) for a, views, _ in found]
        fit = wider
    if third is not None:
        ball = in_ball(config)
        wider = MomentFit(moments, ball, rings, third)
        basis = BallMaps(wider.maps.polar, wider.rotations, ball.degree, ball.margin).basis
        starts = [(basis.nearest(fit.maps.volume(a)).float(), views) for a, views, _ in found]
        found = [wider.minimised(wider.scaled(a), views, config.iterations) for a, views in starts]
        parameters, views, _ = min(found, key=lambda x: x[2])
        found, fit = [wider.minimised(parameters, views, 3 * config.iterations)], wider
    return fit.as_map(min(found, key=lambda x: x[2]))


def invert_from(
    moments: ImageMoments, config: MomentsConfig, parameters: Float[Tensor, " n"], third: ThirdMoments | None = None
) -> MomentMap:
    """The map near a given one whose moments are closest to ``moments``; all rings at once: the inner ones alone lead a good start astray.

    Parameters
    ----------
    moments
        Debiased; shifts that the images have are reckoned with.
    config
        Settings; ``rings``, ``starts`` and ``kept`` are not looked at.
    parameters
        As many as the family of maps takes (``methods/moment_maps.py``), of any scale.
    third
        Debiased, of the same rings; to be matched as well.

    Raises
    ------
    ConfigError
        CONF115 settings out of range; CONF119 not a start of this family.
    DataError
        DATA409 moments without a signal; DATA417 ``tolerance`` for moments without variances; DATA418 third moments on other rings.
    """
    rings = len(moments.first) - 1
    _check(moments, config, rings, third)
    fit = MomentFit(moments, config, rings, third)
    expected, given = len(fit.maps.start(torch.Generator())), parameters.detach().float()
    if given.shape != (expected,) or not bool(given.isfinite().all()) or not bool(given.any()):
        raise ConfigError(
            "CONF119",
            f"a start of shape {tuple(given.shape)} for maps that take {expected} numbers, finite and not all 0",
            "make it in the same family",
        )
    return fit.as_map(fit.minimised(fit.scaled(given), fit.uniform, config.iterations))


def in_ball(config: MomentsConfig) -> MomentsConfig:
    """The same among all maps in a ball, as third moments decide on them."""
    return replace(config, gaussians=0, margin=max(MARGIN, config.margin))


def follow(
    moments: ImageMoments, config: MomentsConfig, volume: Float[Tensor, "d d d"], third: ThirdMoments | None = None
) -> MomentMap:
    """The map among all in a ball near ``volume`` (:func:`invert_from`)."""
    config, polar = in_ball(config), moments.centred_basis
    basis = BallBasis(polar.box, polar.radius, polar.rings + config.margin, config.degree)
    return invert_from(moments, config, basis.nearest(volume).float(), third)


def marched_rings(first: int, last: int) -> list[int]:
    """Where a march from ``first`` to ``last`` rings stops: a third of the first ones further each time."""
    return [*range(first + max(1, round(first / 3)), last, max(1, round(first / 3))), last] if last > first else []


def marched(config: MomentsConfig, first: int, rings: int) -> MomentsConfig:
    """Settings at ``rings`` of a march that begins with ``config`` at ``first``: finer harmonics, and views close enough for them."""
    degree = max(config.degree, round(_FINER * config.degree * rings / first))
    order = max(config.order, math.ceil(math.log2(degree / _DEGREES)))
    return replace(in_ball(config), degree=degree, order=order)


def march(
    moments: ImageMoments, config: MomentsConfig, volume: Float[Tensor, "d d d"], third: ThirdMoments, first: int
) -> MomentMap:
    """Follow a map that has the moments on ``first`` rings outwards, to the last ring.

    Third moments hold it where it is right; two moments alone lead away from it.

    Parameters
    ----------
    moments
        Debiased, on more rings than ``first``.
    config
        Settings at ``first`` rings.
    volume
        The map.
    third
        Debiased, of the same rings, through filters for each of :func:`marched_rings`.
    first
        Rings on which the map has been found.

    Raises
    ------
    ConfigError
        CONF115 settings out of range; CONF126 nothing to march to.
    DataError
        DATA409, DATA417, DATA418 as of :func:`invert_from`; DATA431 no filters of such reach.
    """
    stages = marched_rings(first, len(moments.first) - 1)
    if not stages:
        raise ConfigError(
            "CONF126", f"moments on {len(moments.first) - 1} rings, a map of {first}", "measure moments on more rings"
        )
    for rings in stages:
        found = follow(moments.within(rings), marched(config, first, rings), volume, third.within(rings))
        volume = found.volume
    return found


def _random_start(fit: MomentFit, generator: torch.Generator) -> Found:
    """The best map near a random one of the right power, its density near uniform at first."""
    parameters = fit.scaled(fit.maps.start(generator))
    views = 0.1 * torch.randn(len(fit.uniform), generator=generator)
    return fit.minimised(parameters, views, fit.config.iterations)
