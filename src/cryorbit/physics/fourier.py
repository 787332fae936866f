"""Centred Fourier transforms and the disk of Fourier pixels every likelihood is summed over. The only caller of ``torch.fft``.

Transforms are unnormalised, with the phase origin at the centre index ``D // 2``:
``F(k) = sum_x f(x) exp(-2 pi i k.(x - centre) / D)``. White noise of variance s^2 in an image has ``E|F(k)|^2 = D^2 s^2``.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class FourierDisk:
    """The independent Fourier pixels of a D x D real image with ``|k| <= radius``, ordered by row.

    One pixel of each Friedel pair is kept: ``kx > 0``, or ``kx == 0`` and ``ky >= 0``. Pixels at ``|k| >= D / 2`` are left out: at Nyquist
    an even box stores a sum of two conjugates, which no shift or CTF acts on linearly.

    Attributes
    ----------
    box
        Side length D in pixels.
    radius
        Largest ``|k|`` in Fourier pixels.
    kx, ky
        (P,) integer frequencies.
    weight
        (P,) 1 at the origin, 2 elsewhere, so that ``sum(weight * |F|^2)`` counts the whole plane (Parseval).
    """

    box: int
    radius: float
    kx: Int[Tensor, " p"]
    ky: Int[Tensor, " p"]
    weight: Float[Tensor, " p"]

    def __len__(self) -> int:
        return self.kx.shape[0]

    @property
    def k(self) -> Float[Tensor, "p 2"]:
        """(P, 2) frequencies (kx, ky) in Fourier pixels."""
        return torch.stack([self.kx, self.ky], dim=-1).to(torch.float32)

    @property
    def k_norm(self) -> Float[Tensor, " p"]:
        """(P,) ``|k|`` in Fourier pixels."""
        return torch.hypot(self.kx.to(torch.float32), self.ky.to(torch.float32))

    @property
    def shell(self) -> Int[Tensor, " p"]:
        """(P,) index of the spectral shell, ``|k|`` rounded to the nearest integer."""
        return self.k_norm.round().to(torch.int64)

    def shell_sums(self, values: Float[Tensor, "*b p"], shells: int) -> Float[Tensor, "*b shells"]:
        """Sums over each shell 0 .. shells - 1 of the whole plane; on the device and in the precision of ``values``."""
        zero = values.new_zeros(*values.shape[:-1], shells)
        return zero.index_add(-1, self.shell.to(values.device), values * self.weight.to(values))

    def to(self, device: torch.device | str) -> "FourierDisk":
        """The same disk on another device."""
        return FourierDisk(self.box, self.radius, self.kx.to(device), self.ky.to(device), self.weight.to(device))


@lru_cache(maxsize=64)
def fourier_disk(box: int, radius: float | None = None) -> FourierDisk:
    """The disk of radius ``radius`` Fourier pixels (default: everything below Nyquist) of a box of ``box`` pixels."""
    limit = box / 2 if radius is None else min(float(radius), box / 2)
    ky, kx = torch.meshgrid(torch.arange(-(box // 2), box // 2 + 1), torch.arange(box // 2 + 1), indexing="ij")
    norm2 = kx**2 + ky**2
    inside = (norm2 <= limit**2) & (4 * norm2 < box**2) & ((kx > 0) | (ky >= 0))
    kx, ky = kx[inside], ky[inside]
    weight = torch.where((kx == 0) & (ky == 0), 1.0, 2.0)
    return FourierDisk(box, limit, kx, ky, weight)


Columns = Int[Tensor, " q"] | slice
"""Which columns of arrays on one disk belong to a smaller one."""


def disk_subset(outer: FourierDisk, inner: FourierDisk) -> Int[Tensor, " q"]:
    """Positions within ``outer`` of the pixels of ``inner`` (same box, smaller radius)."""
    width = 2 * outer.box + 1
    lookup = torch.full((width * width,), -1, dtype=torch.int64, device=outer.kx.device)
    lookup[(outer.ky + outer.box) * width + outer.kx] = torch.arange(len(outer), device=outer.kx.device)
    return lookup[(inner.ky + outer.box) * width + inner.kx]


def image_to_fourier(images: Float[Tensor, "*b d d"]) -> Complex[Tensor, "*b d h"]:
    """Centred 2-D transform, rfft layout (ky in FFT order, kx = 0 .. D // 2)."""
    return torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1)))


def fourier_to_image(transform: Complex[Tensor, "*b d h"], box: int) -> Float[Tensor, "*b d d"]:
    """Inverse of :func:`image_to_fourier` for images of side ``box``."""
    return torch.fft.fftshift(torch.fft.irfft2(transform, s=(box, box)), dim=(-2, -1))


def volume_to_fourier(volume: Float[Tensor, "*b d d d"]) -> Complex[Tensor, "*b d d h"]:
    """Centred 3-D transform, rfft layout (kz, ky in FFT order, kx = 0 .. D // 2)."""
    return torch.fft.rfftn(torch.fft.ifftshift(volume, dim=(-3, -2, -1)), dim=(-3, -2, -1))


def fourier_to_volume(transform: Complex[Tensor, "*b d d h"], box: int) -> Float[Tensor, "*b d d d"]:
    """Inverse of :func:`volume_to_fourier` for maps of side ``box``."""
    return torch.fft.fftshift(torch.fft.irfftn(transform, s=(box, box, box), dim=(-3, -2, -1)), dim=(-3, -2, -1))


def images_to_disk(images: Float[Tensor, "*b d d"], disk: FourierDisk) -> Complex[Tensor, "*b p"]:
    """Fourier pixels of ``disk`` of real images."""
    return rfft_to_disk(image_to_fourier(images), disk)


def rfft_to_disk(transform: Complex[Tensor, "*b d h"], disk: FourierDisk) -> Complex[Tensor, "*b p"]:
    """Pick the pixels of ``disk`` from transforms in rfft layout."""
    return transform[..., disk.ky % disk.box, disk.kx]


def disk_to_rfft(values: Complex[Tensor, "*b p"], disk: FourierDisk) -> Complex[Tensor, "*b d h"]:
    """Transforms in rfft layout, (..., D, D // 2 + 1), zero outside ``disk``; the ``kx = 0`` column is made Hermitian."""
    d = disk.box
    out = values.new_zeros(*values.shape[:-1], d * (d // 2 + 1))
    out = out.index_copy(-1, (disk.ky % d) * (d // 2 + 1) + disk.kx, values)
    mate = (disk.kx == 0) & (disk.ky > 0)
    out = out.index_copy(-1, ((-disk.ky[mate]) % d) * (d // 2 + 1), values[..., mate].conj().resolve_conj())
    return out.reshape(*values.shape[:-1], d, d // 2 + 1)


def disk_to_images(values: Complex[Tensor, "*b p"], disk: FourierDisk) -> Float[Tensor, "*b d d"]:
    """Real images of side D from their Fourier pixels (zero outside ``disk``)."""
    return fourier_to_image(disk_to_rfft(values, disk), disk.box)


def crop_fourier(transform: Complex[Tensor, "*b d h"], box: int, new_box: int) -> Complex[Tensor, "*b e g"]:
    """Centred 2-D rfft of side ``box`` cut down to side ``new_box`` (Fourier cropping; values unscaled)."""
    low = (new_box - 1) // 2
    rows = torch.cat([torch.arange(0, new_box - low), torch.arange(box - low, box)]).to(transform.device)
    return transform[..., rows, : new_box // 2 + 1]


def resize_volume(volume: Float[Tensor, "d d d"], new_box: int) -> Float[Tensor, "e e e"]:
    """Same object on a grid of ``new_box`` samples over the same extent: Fourier cropped or zero padded, transform values unchanged.

    Nyquist coefficients are dropped. Density per voxel scales by ``(box / new_box) ** 3``.
    """
    box = volume.shape[-1]
    low = (min(box, new_box) - 1) // 2
    index = torch.arange(-low, low + 1, device=volume.device)
    transform = volume_to_fourier(volume)
    out = transform.new_zeros(new_box, new_box, new_box // 2 + 1)
    source = transform[(index % box)[:, None], (index % box)[None, :], : low + 1]
    out[(index % new_box)[:, None], (index % new_box)[None, :], : low + 1] = source
    return fourier_to_volume(out, new_box)


def full_transform(values: Float[Tensor, "d d h"]) -> Float[Tensor, "d d d"]:
    """Real, even values on the rfft half of a transform as a centred cube: zero frequency at ``D // 2``, axes zyx."""
    box = values.shape[0]
    k = torch.arange(box, device=values.device) - box // 2
    kz, ky, kx = torch.meshgrid(k, k, k, indexing="ij")
    sign = torch.where(kx < 0, -1, 1)
    return values[(sign * kz) % box, (sign * ky) % box, kx.abs()]


def frequencies(box: int, device: torch.device | str = "cpu") -> Int[Tensor, " d"]:
    """Integer frequencies along an axis of a transform in FFT order: 0, 1, ..., -1; of an even box Nyquist counts as -D / 2."""
    axis = torch.arange(box, device=device)
    return torch.where(2 * axis < box, axis, axis - box)


def shell_index(box: int, device: torch.device | str = "cpu") -> Int[Tensor, "d d h"]:
    """Spectral shell (``|k|`` rounded) of every voxel of a 3-D rfft of side ``box``."""
    full = frequencies(box, device).float()
    half = torch.arange(box // 2 + 1, device=device, dtype=full.dtype)
    norm2 = full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2
    return norm2.sqrt().round().to(torch.int64)


def friedel_weight(box: int, like: Tensor) -> Float[Tensor, " h"]:
    """How many voxels of the whole transform each column of its rfft half stands for: 1 or 2; type and device of ``like`` (real)."""
    out = torch.full((box // 2 + 1,), 2.0, dtype=like.dtype, device=like.device)
    out[0] = 1.0
    if box % 2 == 0:
        out[-1] = 1.0
    return out


def signal_to_fourier(signal: Float[Tensor, "*b n"]) -> Complex[Tensor, "*b n"]:
    """Unitary transform of periodic signals (papers/003 section 4.1, ``F* F = 1``), k in FFT order, phase origin at sample 0.

    White noise of variance s^2 has ``E|F(k)|^2 = s^2``.
    """
    return torch.fft.fft(signal, norm="ortho")


def fourier_to_signal(transform: Complex[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """Inverse of :func:`signal_to_fourier`; an imaginary part, which no real signal has, is dropped."""
    return torch.fft.ifft(transform, norm="ortho").real


def circular_correlation(
    a: Float[Tensor, "*b n"], b: Float[Tensor, "*b n"], oversample: int = 1
) -> Float[Tensor, "*b m"]:
    """``c[j] = sum_x b(x) a(x - j / oversample)`` over j = 0 .. n * oversample - 1, signals taken as trigonometric polynomials."""
    n = a.shape[-1]
    product = torch.fft.rfft(b) * torch.fft.rfft(a).conj()
    if n % 2 == 0 and oversample > 1:  # the stored Nyquist coefficient is a sum of two
        product = torch.cat([product[..., :-1], 0.5 * product[..., -1:]], dim=-1)
    return torch.fft.irfft(product, n=n * oversample) * oversample


def outer_to_fourier(products: Float[Tensor, "*b n n"]) -> Complex[Tensor, "*b n n"]:
    """``F A F*`` of real matrices A with the unitary F of :func:`signal_to_fourier`: from ``v v^T`` to ``v^ v^*``."""
    return torch.fft.ifft(torch.fft.fft(products, dim=-2, norm="ortho"), dim=-1, norm="ortho")


def fourier_to_outer(transform: Complex[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """``F* M F``, the inverse of :func:`outer_to_fourier`."""
    return torch.fft.fft(torch.fft.ifft(transform, dim=-2, norm="ortho"), dim=-1, norm="ortho").real
