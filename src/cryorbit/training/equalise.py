"""Noise that differs between optics groups, made equal: one whitening factor per group and spectral shell.

An engine assumes one noise variance per shell for all particles. Groups from another microscope, detector or ice thickness have
another, so an image ``y = c s + n`` of group g and its CTF are both multiplied by ``f_g(|k|) = sqrt(v / v_g)``: the noise becomes v
in every group and ``f c s`` is still what the CTF predicts. This is the inverse-variance weighting of per-group noise spectra
(Scheres 2012, J. Struct. Biol. 180, eq. 8-9) moved from the likelihood into the data.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.conventions import centre
from cryorbit.physics.fourier import FourierDisk, images_to_disk
from cryorbit.physics.noise import estimate_spectrum

LEAST_IMAGES = 50
"""Groups with fewer images are measured together."""
MOST_IMAGES = 500
"""Images read of each group, fewer when there are many groups."""
_IMAGES_IN_ALL = 20_000
_CHUNK = 100
_EMPTIED = 0.01
_LARGEST_RATIO = 30.0
_TINY = 1e-30


def pooled_groups(labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Group numbers 0 .. G - 1 of ``labels``, all groups of fewer than 50 images pooled in one, the last.

    A pool still below 50 joins the largest group: no spectrum can be measured on it.
    """
    _, group, count = torch.unique(labels, return_inverse=True, return_counts=True)
    large = count >= LEAST_IMAGES
    kept = int(large.sum())
    number = torch.where(large, large.cumsum(0) - 1, kept)
    pooled = number[group]
    if 0 < int((pooled == kept).sum()) < LEAST_IMAGES and kept:
        pooled = torch.where(pooled == kept, number[count.argmax()], pooled)
    return pooled


def background_window(box: int, radius_px: float) -> Float[Tensor, "d d"]:
    """0 on the particle, a disc of ``radius_px`` (at most the inscribed one), 1 on the background, a raised cosine of a tenth of
    the box between.

    The window is continuous across the box's border, so it blurs a spectrum by little: even the corners alone measure noise
    better than whole images do.
    """
    axis = torch.arange(box, dtype=torch.float32) - centre(box)
    beyond = torch.hypot(axis[:, None], axis) - min(radius_px, 0.5 * box - 1)
    return 0.5 - 0.5 * torch.cos(torch.pi * (beyond / (0.1 * box)).clamp(0.0, 1.0))


def background_spectrum(
    images: Float[Tensor, "b d d"], window: Float[Tensor, "d d"], disk: FourierDisk
) -> Float[Tensor, " s"]:
    """Noise variance per pixel and shell of images under ``window``, divided by the window's energy.

    Where the window leaves out the particle it holds no signal but what the CTF spreads and what neighbours bring. The mean
    under the window is removed from each image, so shell 0 says nothing.
    """
    mean = (images * window).sum(dim=(1, 2)) / window.sum()
    values = images_to_disk((images - mean[:, None, None]) * window, disk)
    return estimate_spectrum(values, disk) / window.square().mean()


def is_emptied(background: Float[Tensor, "*g s"], whole: Float[Tensor, "*g s"]) -> bool:
    """Whether the background of some group has been masked away: less than 1 % of the images' power is left, shell 0 aside."""
    return bool((background[..., 1:].sum(dim=-1) < _EMPTIED * whole[..., 1:].sum(dim=-1)).any())


def _smoothed(log_ratio: Float[Tensor, "g s"], disk: FourierDisk) -> Float[Tensor, "g s"]:
    """A straight line through each shell and its two neighbours on either side, weighted by their pixels; shell 0 has no say."""
    count = disk.shell_sums(torch.ones(len(disk)), log_ratio.shape[1])
    count[0] = 0.0
    shell = torch.arange(log_ratio.shape[1], dtype=torch.float32)
    offset = shell[None] - shell[:, None]
    weight = (3.0 - offset.abs()).clamp_min(0.0) * count
    zeroth, first, second = (weight.sum(1), (weight * offset).sum(1), (weight * offset.square()).sum(1))
    line = weight * (second[:, None] - first[:, None] * offset)
    return log_ratio @ (line / (zeroth * second - first.square()).clamp_min(_TINY)[:, None]).T


def whitening_factors(
    spectra: Float[Tensor, "g s"], counts: Int[Tensor, " g"], disk: FourierDisk
) -> Float[Tensor, "g s"]:
    """Factor by which images and CTF of each group are multiplied.

    The ratio of each group's spectrum to their geometric mean is smoothed over shells and kept within 1/30 .. 30 (a shell that
    a filter has emptied is not noise-free). Factors are scaled so that their square, averaged over particles, is 1 in every
    shell: the information in the data keeps its scale, and no group is amplified beyond ``sqrt(N / N_g)``.

    Parameters
    ----------
    spectra
        (G, S) noise variance per group and shell of ``disk``.
    counts
        (G,) particles per group.
    disk
        The pixels the spectra were measured on.
    """
    share = (counts / counts.sum())[:, None]
    log = spectra.clamp_min(_TINY).log()
    ratio = _smoothed(log - (share * log).sum(dim=0), disk).exp().clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)
    return (ratio * (share / ratio).sum(dim=0)).rsqrt()


def measure_factors(
    read: Callable[[NDArray[np.int64]], Float[Tensor, "m d d"]],
    group: Int[Tensor, " n"],
    window: Float[Tensor, "d d"],
    disk: FourierDisk,
) -> Float[Tensor, "g s"]:
    """Whitening factors of the groups 0 .. G - 1 in ``group``, from an even sample of each one's images.

    Where a group's background is empty (below 1 % of the images' power: they were masked), whole images are measured.

    Parameters
    ----------
    read
        Images at given indices, (M, D, D).
    group
        (N,) group of each particle, from :func:`pooled_groups`.
    window, disk
        Where and at which Fourier pixels noise is measured.
    """
    counts = torch.bincount(group)
    most = min(max(_IMAGES_IN_ALL // len(counts), LEAST_IMAGES), MOST_IMAGES)
    windows = (window, torch.ones_like(window))
    spectra = torch.zeros(2, len(counts), int(disk.shell.max()) + 1)
    for number in range(len(counts)):
        members = torch.nonzero(group == number)[:, 0]
        sample = members[torch.linspace(0, len(members) - 1, min(most, len(members))).round().to(torch.int64)]
        for part in sample.split(_CHUNK):
            images = read(part.numpy())
            for row, where in zip(spectra, windows, strict=True):
                mean = background_spectrum(images, where.to(images.device), disk.to(images.device))
                row[number] += (len(part) / len(sample)) * mean.cpu()
    background, whole = spectra
    return whitening_factors(whole if is_emptied(background, whole) else background, counts, disk)
