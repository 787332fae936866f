"""What a sample of the images says: dead images, background, and whether the protein is bright."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from cryorbit.io.implausible import MIN_BOX
from cryorbit.io.particle_set import ParticleSet

SAMPLE = 500
_SAMPLE_BYTES = 2**28
_CHUNK_BYTES = 2**25
_CENTRE, _RIM = 0.25, 0.45  # of the box: inside the first radius lies protein, beyond the second background
_MIN_SCORE, _MIN_EFFECT = 4.0, 0.02
FARTHEST = 1e3
"""Deviations of a usual image that the pixels of one image may lie apart."""


@dataclass(frozen=True)
class ImageChecks:
    """Numbers over ``sampled`` images; lists hold particle numbers counted from 1.

    ``background_mean`` and ``background_sd``: medians, outside the inscribed circle. ``contrast``: centre minus rim
    over the background's standard deviation, mean over images; ``contrast_score``: the same over its standard error;
    ``largest``: absolute value of a pixel; ``deviation``: of all pixels of an image, median over images; ``stray``: images
    whose pixels lie further apart than ``FARTHEST`` of that.
    """

    sampled: int
    not_finite: tuple[int, ...]
    constant: tuple[int, ...]
    background_mean: float
    background_sd: float
    background_sd_spread: float
    contrast: float
    contrast_score: float
    largest: float
    deviation: float
    stray: tuple[int, ...] = ()

    @property
    def protein(self) -> str:
        """``bright``, ``dark``, or ``unclear``."""
        if abs(self.contrast_score) < _MIN_SCORE or abs(self.contrast) < _MIN_EFFECT:
            return "unclear"
        return "bright" if self.contrast > 0 else "dark"


def sample_of(count: int, box: int) -> NDArray[np.int64]:
    """Evenly spaced image numbers: all of a small set, at most 500 images and 256 MiB of a large one."""
    most = max(1, min(SAMPLE, _SAMPLE_BYTES // (4 * box**2)))
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _rows(images: Float32[np.ndarray, "m d d"], radius: Float32[np.ndarray, "d d"]) -> NDArray[np.float64]:
    box = images.shape[-1]
    corners = images[:, radius > box / 2].astype(np.float64)
    centre = images[:, radius < _CENTRE * box].mean(axis=1, dtype=np.float64)
    rim = images[:, (radius > _RIM * box) & (radius <= box / 2)].mean(axis=1, dtype=np.float64)
    whole = images.std(axis=(1, 2), dtype=np.float64)
    largest, spread = np.abs(images).max(axis=(1, 2)), np.ptp(images, axis=(1, 2))
    return np.stack([corners.mean(axis=1), corners.std(axis=1), centre - rim, whole, largest, spread], axis=1)


def check_images(particles: ParticleSet) -> ImageChecks | None:
    """Look at a sample of the images; None where the set has no images or they are under ``MIN_BOX``."""
    images = particles.images
    if images is None or images.box < MIN_BOX:
        return None
    chosen = sample_of(len(particles), images.box)
    offset = np.arange(images.box, dtype=np.float32) - images.box // 2
    radius = np.hypot(offset[:, None], offset[None, :])
    step = max(1, _CHUNK_BYTES // (4 * images.box**2))
    with np.errstate(invalid="ignore", over="ignore"):
        rows = np.concatenate(
            [_rows(images.read(chosen[i : i + step], check=False), radius) for i in range(0, len(chosen), step)]
        )
    finite = np.isfinite(rows).all(axis=1)
    constant = finite & (rows[:, 5] == 0)
    good = rows[finite & ~constant]
    bad, flat = (tuple((chosen[mask] + 1).tolist()) for mask in (~finite, constant))
    if not len(good):
        return ImageChecks(len(chosen), bad, flat, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    deviation = float(np.median(good[:, 1]))
    low, high = np.percentile(good[:, 1], (5, 95))
    contrast = good[:, 2] * particles.sign
    error = contrast.std(ddof=1) / np.sqrt(len(good)) if len(good) > 1 else np.inf
    usual = float(np.median(good[:, 3]))
    stray = finite & (rows[:, 5] > FARTHEST * usual)
    return ImageChecks(
        sampled=len(chosen),
        not_finite=bad,
        constant=flat,
        background_mean=float(np.median(good[:, 0])) * particles.sign,
        background_sd=deviation,
        background_sd_spread=float(high / low) if low > 0 else 1.0,
        contrast=float(contrast.mean() / (deviation or usual)),
        contrast_score=float(contrast.mean() / error) if error > 0 else 0.0,
        largest=float(good[:, 4].max()),
        deviation=usual,
        stray=tuple((chosen[stray] + 1).tolist()),
    )
