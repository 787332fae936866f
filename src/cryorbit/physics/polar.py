"""Images and their noise in a basis where an in-plane rotation is a phase: angular Fourier coefficients on rings of Fourier space.

``c_m(k) = mean over phi of F(k cos phi, k sin phi) exp(-i m phi)`` with the centred, unnormalised transform F of an image; an image turned
by t about the beam has ``c_m(k) exp(-i m t)``. Over real pixels inside a circle this is exactly (Jacobi-Anger)
``sum_x I(x) (-i)^m J_m(2 pi k |x| / D) exp(-i m theta_x)``. Real images have ``c_-m = (-1)^m c_m*``, so m >= 0 says all.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy.special import jv
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.physics.fourier import fourier_to_image, image_to_fourier
from cryorbit.physics.noise import shell_of_pixel


@dataclass(frozen=True)
class PolarBasis:
    """Rings ``k = 0 .. K`` (Fourier pixels) and orders ``m = 0 .. M`` of images of side D.

    Attributes
    ----------
    box
        Side D in pixels.
    rings
        K, below D / 2.
    radius
        Of the circle of pixels that count, in pixels; at most D / 2.
    orders
        M: the order beyond which nothing inside the circle reaches the last ring.
    """

    box: int
    rings: int
    radius: float

    def __post_init__(self) -> None:
        if not (1 <= self.rings < self.box / 2 and 1 <= self.radius <= self.box / 2):
            raise ConfigError(
                "CONF114",
                f"{self.rings} rings and a circle of {self.radius:g} pixels do not fit images of {self.box} pixels",
                "expected 1 to fewer than half as many rings, and at most the inscribed circle",
            )

    @property
    def orders(self) -> int:
        """J_m(x) is below 1e-4 for m > x + 2.5 x^(1/3) + 2."""
        x = 2 * math.pi * self.rings * self.radius / self.box
        return math.ceil(x + 2.5 * x ** (1 / 3) + 2)

    def matrix(self) -> Complex[Tensor, "x mk"]:
        """(D^2, (M + 1) (K + 1)): ``images.flatten(1) @ matrix`` are the coefficients, order by order."""
        return _matrix(self)

    def coefficients(self, images: Float[Tensor, "b d d"]) -> Complex[Tensor, "b m k"]:
        """``c_m(k)`` of images, (B, M + 1, K + 1)."""
        matrix = self.matrix().to(images.device)
        flat = images.flatten(1).to(torch.float32)
        values = torch.complex(flat @ matrix.real.contiguous(), flat @ matrix.imag.contiguous())
        return values.view(len(images), self.orders + 1, self.rings + 1)

    def noise(
        self, spectrum: Float[Tensor, " s"], background: Float[Tensor, "d d"] | None = None
    ) -> Complex[Tensor, "m k k"]:
        """``E c_m(k) c_m(k')*`` of noise of a radial ``spectrum`` (``physics/noise.py``), (M + 1, K + 1, K + 1), complex128.

        Where the mean under a window ``background`` (D, D) was taken off each image, its noise went into every pixel: reckoned with.
        """
        gain = spectrum.double()[shell_of_pixel(self.box).clamp(max=len(spectrum) - 1)].sqrt()
        rows = self.matrix().to(torch.complex128).mT.reshape(-1, self.box, self.box)
        if background is not None:
            rows = rows - rows.sum(dim=(1, 2), keepdim=True) * (background / background.sum())
        parts = (fourier_to_image(image_to_fourier(x.contiguous()) * gain, self.box) for x in (rows.real, rows.imag))
        b = torch.complex(*parts).view(self.orders + 1, self.rings + 1, -1)
        return b @ b.mH


@lru_cache(maxsize=4)
def _matrix(basis: PolarBasis) -> Complex[Tensor, "x mk"]:
    box = basis.box
    axis = np.arange(box) - box // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius, angle = np.hypot(x, y).ravel(), np.arctan2(y, x).ravel()
    m, k = np.arange(basis.orders + 1)[None, :, None], np.arange(basis.rings + 1)[None, None]
    inside = radius <= basis.radius
    value = np.zeros((box * box, basis.orders + 1, basis.rings + 1), dtype=np.complex64)
    bessel = jv(m, 2 * np.pi / box * k * radius[inside, None, None])
    value[inside] = (-1j) ** m * bessel * np.exp(-1j * m * angle[inside, None, None])
    return torch.from_numpy(value.reshape(box * box, -1))
