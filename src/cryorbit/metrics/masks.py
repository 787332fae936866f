"""Soft masks: a sphere, and one drawn from a map; and whether a map is bright or dark inside."""

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
    _check_radius(radius_px, edge_px)
    axis = torch.arange(box, dtype=torch.float32) - centre(box)
    r = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    return _cosine_edge(r - radius_px, edge_px)


def soft_disc(box: int, radius_px: float, edge_px: float = 3.0) -> Float[Tensor, "d d"]:
    """As :func:`soft_sphere`, in the plane."""
    _check_radius(radius_px, edge_px)
    axis = torch.arange(box, dtype=torch.float32) - centre(box)
    return _cosine_edge(torch.hypot(axis[:, None], axis) - radius_px, edge_px)


def _check_radius(radius_px: float, edge_px: float) -> None:
    if radius_px <= 0 or edge_px < 0:
        raise DataError("DATA203", f"a mask needs a positive radius and an edge >= 0, found {radius_px} and {edge_px}")


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


def mask_within(
    sphere: Float[Tensor, "d d d"], volume: Float[Tensor, "d d d"], pixel_size: float
) -> Float[Tensor, "d d d"] | None:
    """:func:`mask_from_map` of what a map has inside ``sphere``; None where nothing there is bright enough to draw a mask around."""
    try:
        return mask_from_map(volume * sphere, pixel_size).to(sphere)
    except DataError:
        return None


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


def _about(values: Float[Tensor, " n"], level: Float[Tensor, ""]) -> float:
    """Third moment of ``values`` about ``level``, over the second's power 3/2; 0 where all values are ``level``."""
    away = (values - level).to(torch.float64)
    return float(away.pow(3).mean() / away.square().mean().pow(1.5).clamp_min(1e-300))


def contrast_sign(volume: Float[Tensor, "d d d"], mask_diameter: float, pixel_size: float) -> int:
    """Whether the particle of a map is brighter (1) or darker (-1) than what surrounds it.

    The sign of the sum of two third moments of the density inside the mask: about the level of the shell just outside, low-passed
    to an eighth of the diameter (a body differs from its surroundings, also where it fills the mask), and about its own mean, at a
    sixteenth (few voxels are molecule, also where the CTF has taken the lowest frequencies and with them the mean), the latter
    kept within 0.5. Low-passes are never finer than 2 pixels. Densities may have any scale and offset and may be masked already.

    Parameters
    ----------
    volume
        (D, D, D) map, of at least some agreement with the truth: on noise alone the answer is a coin's.
    mask_diameter
        Particle diameter in angstrom.
    pixel_size
        Angstrom per pixel.

    Returns
    -------
    1 or -1; 1 for a flat map.

    Raises
    ------
    DataError
        DATA203 the mask is empty.
    """
    box, radius = volume.shape[-1], 0.5 * mask_diameter / pixel_size
    radius = min(radius, 0.5 * box - 1)
    inside = soft_sphere(box, radius, 0.0) > 0.5
    around = (soft_sphere(box, 1.25 * radius + 1, 0.0) > 0.5) & ~inside
    values = volume.detach().to("cpu", torch.float32)
    values = values - values.mean()
    coarse, fine = (lowpass(values, max(2 * radius / parts, 2.0)) for parts in (8, 16))
    body = _about(coarse[inside], coarse[around].mean())
    detail = _about(fine[inside], fine[inside].mean())
    total = body + min(max(detail, -0.5), 0.5)  # a body that fills the mask has body near 1 and detail far below 0
    return -1 if total < 0 else 1
