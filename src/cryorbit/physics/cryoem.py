"""The cryo-EM measurement ``CTF * shift * projection of (R . volume)`` in Fourier space: the one forward model.

papers/001 eq. 1, papers/002 eq. 13: by the Fourier slice theorem the transform of a projection is the central slice
``v^(R^T (kx, ky, 0))`` of the map's transform; a shift is a phase ramp and the CTF a factor.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.groups.so3 import SO3
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import SlicingGrid, slice_grid

Slicer = Callable[[Tensor, FourierDisk], Tensor]
"""A volume: ``(rotations (B, 3, 3), disk) -> (B, P)`` central slices. Every module in ``volumes`` is one."""


def form_images(
    slices: Complex[Tensor, "b p"],
    shifts_px: Float[Tensor, "b 2"] | None,
    disk: FourierDisk,
    ctf: Float[Tensor, "b p"] | None,
) -> Complex[Tensor, "b p"]:
    """Noise-free particle images from central slices: phase ramp, then CTF; ``None`` leaves a factor out."""
    out = slices
    if shifts_px is not None:
        out = out * phase_ramp(shifts_px, disk)
    if ctf is not None:
        out = out * ctf
    return out


def forward(
    grid: SlicingGrid,
    rotations: Float[Tensor, "b 3 3"],
    shifts_px: Float[Tensor, "b 2"] | None,
    disk: FourierDisk,
    ctf: Float[Tensor, "b p"] | None,
) -> Complex[Tensor, "b p"]:
    """Noise-free particle images in Fourier space (papers/001 eq. 1).

    Parameters
    ----------
    grid
        The map, prepared by :func:`cryorbit.physics.slicing.slicing_grid`.
    rotations
        (B, 3, 3) matrices A: an atom at r lands at ``(A r)[:2]``.
    shifts_px
        (B, 2) shift (x, y) of the particle in pixels, or ``None``.
    disk
        Fourier pixels to predict.
    ctf
        (B, P) contrast transfer at these pixels, or ``None``.

    Returns
    -------
    (B, P) complex values, differentiable in the grid, rotations, shifts and CTF.
    """
    return form_images(slice_grid(grid, rotations, disk), shifts_px, disk, ctf)


@dataclass(frozen=True)
class CryoEM:
    """Orbit model of ideal cryo-EM, no CTF and no shift: central slices of a volume (papers/003 section 3.2).

    Attributes
    ----------
    disk
        Fourier pixels that are measured.
    group
        SO(3).
    """

    disk: FourierDisk
    group: SO3 = SO3()  # noqa: RUF009 (it has no state)

    def observe(self, signal: Slicer, g: Float[Tensor, "b 3 3"]) -> Complex[Tensor, "b p"]:
        """Central slices of the volume ``signal`` at rotations ``g``."""
        return signal(g, self.disk)
