"""Image likelihood at given poses: loss, gradient and Gauss-Newton matrix on so(3) x R^2, and the loss alone at many poses of an image."""

from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics import kernels
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import SlicingGrid, checked_disk, checked_rotations


def pose_normal_equations(
    grid: SlicingGrid,
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    precision: Float[Tensor, "#b p"] | Float[Tensor, " p"],
    rotations: Float[Tensor, "b 3 3"],
    shifts_px: Float[Tensor, "b 2"],
    disk: FourierDisk,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b 5"], Float[Tensor, "b 5 5"]]:
    """Loss of each image at its pose with its gradient and Gauss-Newton matrix on so(3) x R^2.

    ``loss = 1/2 sum_p precision |image - ctf * exp(-2 pi i k.s / D) * slice|^2``; parameters (omega_x, omega_y,
    omega_z, s_x, s_y) with ``R <- exp(omega) R``, in radian and pixels. The Gauss-Newton step is ``-H^-1 g``.

    Parameters
    ----------
    grid
        From :func:`slicing_grid`.
    images, ctf
        (B, P) image transforms and CTF on the disk.
    precision
        (P,) or (B, P) weight over noise variance of a Fourier pixel.
    rotations, shifts_px
        Current poses, (B, 3, 3) and (B, 2) in pixels.
    disk
        Fourier pixels of the columns.
    backend
        Kernel to use instead of the device's own (tests).

    Returns
    -------
    loss (B,), gradient (B, 5), hessian (B, 5, 5), float64.
    """
    prepared = _prepared(grid, images, ctf, precision, rotations, shifts_px, disk)
    return kernels.select(grid.data.device, backend).normal_equations(*prepared)


def pose_losses(
    grid: SlicingGrid,
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    precision: Float[Tensor, "#b p"] | Float[Tensor, " p"],
    rotations: Float[Tensor, "b k 3 3"],
    shifts_px: Float[Tensor, "b k 2"],
    disk: FourierDisk,
    *,
    backend: str | None = None,
) -> Float[Tensor, "b k"]:
    """The loss of :func:`pose_normal_equations` alone, at ``K`` poses of every image.

    Parameters
    ----------
    grid, images, ctf, precision, disk, backend
        As for :func:`pose_normal_equations`.
    rotations, shifts_px
        (B, K, 3, 3) and (B, K, 2) in pixels.

    Returns
    -------
    (B, K), float64.
    """
    prepared = _prepared(grid, images, ctf, precision, rotations, shifts_px, disk)
    return kernels.select(grid.data.device, backend).losses(*prepared)


def _prepared(
    grid: SlicingGrid,
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    precision: Float[Tensor, "#b p"] | Float[Tensor, " p"],
    rotations: Float[Tensor, "b *k 3 3"],
    shifts_px: Float[Tensor, "b *k 2"],
    disk: FourierDisk,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """The arguments as the kernels take them: detached, contiguous, of the grid's precision, rotations checked."""
    disk, real = checked_disk(disk, grid), grid.data.dtype.to_real()
    flat = checked_rotations(rotations.detach().reshape(-1, 3, 3), grid.radius, grid.oversampling, grid.data)
    return (
        grid.data.detach().contiguous(),
        images.detach().to(grid.data.dtype).resolve_conj().contiguous(),
        ctf.detach().to(real).contiguous(),
        precision.detach().to(real).expand(ctf.shape),
        flat.view(rotations.shape),
        shifts_px.detach().to(real).contiguous(),
        disk.kx,
        disk.ky,
        grid.oversampling,
        grid.box,
    )
