"""Soft masks: a sphere, and one drawn from a map."""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from cryorbit.conventions import centre
from cryorbit.errors import DataError
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier


def soft_sphere(box: int, radius_px: float, edge_px: float = 3.0) -> Float[Tensor, "d d d"]:
    """1 within ``radius_px`` of the centre index, a raised cosine over the next ``edge_px``, 0 beyond; float32."""
    if radius_px <= 0 or edge_px < 0:
        raise DataError("DATA203", f"a mask needs a positive radius and an edge >= 0, found {radius_px} and {edge_px}")
    axis = torch.arange(box, dtype=torch.float32) - centre(box)
    r = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    return _cosine_edge(r - radius_px, edge_px)


def _cosine_edge(outside: Float[Tensor, "*s"], edge_px: float) -> Float[Tensor, "*s"]:
    """1 where ``outside`` (distance beyond the border, pixels) is <= 0, falling to 0 at ``edge_px``."""
    if edge_px == 0:
        return (outside <= 0).to(torch.float32)
    return 0.5 + 0.5 * torch.cos(torch.pi * (outside / edge_px).clamp(0.0, 1.0))


def lowpass(volume: Float[Tensor, "d d d"], resolution_px: float, width_shells: float = 2.0) -> Float[Tensor, "d d d"]:
    """Keep detail coarser than ``resolution_px`` pixels; a raised cosine ``width_shells`` wide closes the band."""
    box = volume.shape[-1]
    cut = box / resolution_px
    gain = _cosine_edge(shell_index(box, volume.device).to(torch.float32) - cut, width_shells).to(volume.dtype)
    return fourier_to_volume(volume_to_fourier(volume) * gain, box)


def otsu(values: NDArray[np.float32], bins: int = 256) -> float:
    """Threshold that splits ``values`` in two classes of largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=bins)
    middle = 0.5 * (edges[1:] + edges[:-1])
    below, total = np.cumsum(counts), counts.sum()
    mean_below = np.cumsum(counts * middle) / np.maximum(below, 1)
    mean_above = ((counts * middle).sum() - np.cumsum(counts * middle)) / np.maximum(total - below, 1)
    between = below * (total - below).astype(np.float64) * (mean_below - mean_above) ** 2
    return float(middle[int(np.argmax(between))])


def mask_from_map(
    volume: Float[Tensor, "d d d"],
    pixel_size: float,
    lowpass_angst: float = 15.0,
    extend_px: float = 3.0,
    edge_px: float = 5.0,
) -> Float[Tensor, "d d d"]:
    """Soft mask around the molecule of a map, without a threshold to choose.

    The map is low-passed (to ``lowpass_angst``, but never finer than 4 pixels), thresholded inside the inscribed sphere
    at half of Otsu's value, cut down to its largest connected piece, filled, grown by ``extend_px`` and closed by a
    raised cosine of ``edge_px``.

    Parameters
    ----------
    volume
        (D, D, D) map with bright protein.
    pixel_size
        Angstrom per pixel.
    lowpass_angst, extend_px, edge_px
        As above; angstrom, pixels, pixels.

    Returns
    -------
    (D, D, D) float32 in [0, 1].

    Raises
    ------
    DataError
        The map has no positive density to draw a mask around.
    """
    box = volume.shape[-1]
    smooth = lowpass(volume.detach().to("cpu", torch.float32), max(lowpass_angst / pixel_size, 4.0)).numpy()
    inside = soft_sphere(box, box / 2 - 1, 0.0).numpy() > 0.5
    smooth = smooth - np.median(smooth[inside])
    threshold = 0.5 * otsu(smooth[inside])
    solid = inside & (smooth > max(threshold, 0.0))
    labels, pieces = ndimage.label(solid)
    if not pieces or not np.isfinite(smooth).all():
        raise DataError(
            "DATA204",
            "the map has no positive density to draw a mask around",
            "is the contrast inverted, or the map empty?",
        )
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    filled = ndimage.binary_fill_holes(largest)
    outside = ndimage.distance_transform_edt(~filled)
    return _cosine_edge(torch.from_numpy(outside.astype(np.float32)) - extend_px, edge_px)
