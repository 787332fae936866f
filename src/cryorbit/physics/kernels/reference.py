"""Slicing kernels in plain torch operations: any device, float32 and float64. The definition the fast kernels are
tested against.

A grid holds the transform of a real map at ``z, y = -c .. c`` and ``x = -1 .. c`` (oversampled Fourier pixels), shape
(2c+1, 2c+1, c+2). A slice reads it at ``q = oversampling * R^T (kx, ky, 0)``; where ``q_x < 0`` it reads ``-q`` and
conjugates (Friedel). Interpolation is by quadratic B-splines without prefilter: with n the grid point nearest to q and
``t = q - n`` in [-1/2, 1/2], the points n - 1, n, n + 1 weigh ``(1/2 - t)^2 / 2``, ``3/4 - t^2``, ``(1/2 + t)^2 / 2``
along each axis. Gradients of complex tensors follow torch: ``dL/dRe + i dL/dIm``.
"""

import itertools
import math

import torch
from torch import Tensor

from cryorbit.physics.kernels.interface import NormalEquations, Posterior

_POINTS = list(itertools.product(range(3), repeat=3))
"""(z, y, x) of the 27 points read, from the lowest."""


class _Cells:
    """Where each pixel falls: flat index of its lowest point, weights and slopes of the points along each axis, and
    whether it was flipped."""

    def __init__(
        self, shape: tuple[int, int, int], rotations: Tensor, kx: Tensor, ky: Tensor, oversampling: int
    ) -> None:
        self.shape = shape
        c = (shape[0] - 1) // 2
        self.kx = kx.to(rotations.dtype) * oversampling
        self.ky = ky.to(rotations.dtype) * oversampling
        q = self.kx[:, None] * rotations[:, None, 0, :] + self.ky[:, None] * rotations[:, None, 1, :]
        self.flip = q[..., 0] < 0
        q = torch.where(self.flip[..., None], -q, q)
        nearest = (q + 0.5).floor()
        t = q - nearest
        self.weights = [0.5 * (0.5 - t) ** 2, 0.75 - t**2, 0.5 * (0.5 + t) ** 2]
        self.slopes = [t - 0.5, -2 * t, t + 0.5]
        ix, iy, iz = nearest.to(torch.int64).unbind(-1)
        self.index = ((iz + c - 1) * shape[1] + iy + c - 1) * shape[2] + ix

    def point(self, z: int, y: int, x: int) -> Tensor:
        return self.index + (z * self.shape[1] + y) * self.shape[2] + x

    def factors(self, z: int, y: int, x: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weight of a point along x, y, z."""
        return self.weights[x][..., 0], self.weights[y][..., 1], self.weights[z][..., 2]

    def steps(self, z: int, y: int, x: int) -> tuple[Tensor, Tensor, Tensor]:
        """Derivative of the factors."""
        return self.slopes[x][..., 0], self.slopes[y][..., 1], self.slopes[z][..., 2]

    def unflip(self, values: Tensor) -> Tensor:
        """Conjugate where the pixel was flipped."""
        return torch.where(self.flip, values.conj().resolve_conj(), values)


def _read(data: Tensor, cells: _Cells) -> Tensor:
    flat = data.reshape(-1)
    total = torch.zeros_like(cells.flip, dtype=data.dtype)
    for point in _POINTS:
        wx, wy, wz = cells.factors(*point)
        total = total + flat[cells.point(*point)] * (wx * wy * wz)
    return cells.unflip(total)


def _read_gradient(data: Tensor, cells: _Cells) -> Tensor:
    """(B, P, 3) complex derivative of the slice with respect to q (x, y, z)."""
    flat = data.reshape(-1)
    total = torch.zeros(*cells.flip.shape, 3, dtype=data.dtype, device=data.device)
    for point in _POINTS:
        wx, wy, wz = cells.factors(*point)
        sx, sy, sz = cells.steps(*point)
        total = total + flat[cells.point(*point)][..., None] * torch.stack(
            [sx * wy * wz, sy * wx * wz, sz * wx * wy], dim=-1
        )
    return torch.where(cells.flip[..., None], -total.conj().resolve_conj(), total)


def slice_forward(data: Tensor, rotations: Tensor, kx: Tensor, ky: Tensor, oversampling: int) -> Tensor:
    """(B, P) slices of a grid."""
    return _read(data, _Cells(_shape(data), rotations, kx, ky, oversampling))


def slice_backward(
    gradient: Tensor,
    data: Tensor,
    rotations: Tensor,
    kx: Tensor,
    ky: Tensor,
    oversampling: int,
    need_data: bool,
    need_rotations: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to grid and rotations of ``slice_forward``, those that are needed."""
    cells = _Cells(_shape(data), rotations, kx, ky, oversampling)
    to_data = torch.zeros_like(data) if need_data else None
    if to_data is not None:
        _scatter(cells.unflip(gradient), cells, to_data)
    to_rotations = None
    if need_rotations:
        slope = (gradient.conj()[..., None] * _read_gradient(data, cells)).real
        rows = [(slope * cells.kx[:, None]).sum(1), (slope * cells.ky[:, None]).sum(1)]
        to_rotations = torch.stack([*rows, torch.zeros_like(rows[0])], dim=1)
    return to_data, to_rotations


def _scatter(values: Tensor, cells: _Cells, out: Tensor) -> None:
    flat = out.view(-1)
    for point in _POINTS:
        wx, wy, wz = cells.factors(*point)
        flat.index_add_(0, cells.point(*point).reshape(-1), (values * (wx * wy * wz)).reshape(-1))


def insert(
    values: Tensor,
    weights: Tensor,
    rotations: Tensor,
    kx: Tensor,
    ky: Tensor,
    oversampling: int,
    numerator: Tensor,
    weight: Tensor,
) -> None:
    """Adjoint of ``slice_forward`` on (B, P) values added to ``numerator``, and on real weights without the conjugation to ``weight``."""
    cells = _Cells(_shape(numerator), rotations, kx, ky, oversampling)
    _scatter(cells.unflip(values), cells, numerator)
    _scatter(weights, cells, weight)


def normal_equations(
    data: Tensor,
    images: Tensor,
    ctf: Tensor,
    precision: Tensor,
    rotations: Tensor,
    shifts_px: Tensor,
    kx: Tensor,
    ky: Tensor,
    oversampling: int,
    box: int,
) -> NormalEquations:
    """Loss, gradient and Gauss-Newton matrix of each image's pose; float64 results."""
    cells = _Cells(_shape(data), rotations, kx, ky, oversampling)
    value = _read(data, cells)
    slope = oversampling * torch.einsum("bij,bpj->bpi", rotations.to(data.dtype), _read_gradient(data, cells))
    fx, fy = kx.to(rotations.dtype), ky.to(rotations.dtype)
    angle = (2 * math.pi / box) * (shifts_px[:, :1] * fx + shifts_px[:, 1:] * fy)
    residual = images * torch.polar(torch.ones_like(angle), angle) - ctf * value
    ramp = -2j * math.pi / box * value
    jacobian = ctf[..., None] * torch.stack(
        [-fy * slope[..., 2], fx * slope[..., 2], fy * slope[..., 0] - fx * slope[..., 1], ramp * fx, ramp * fy], dim=-1
    )
    wide_residual, wide_jacobian = residual.to(torch.complex128), jacobian.to(torch.complex128)
    weight = precision.expand_as(ctf).to(torch.float64)
    loss = 0.5 * (weight * wide_residual.abs() ** 2).sum(1)
    gradient = -torch.einsum("bp,bp,bpi->bi", weight.to(torch.complex128), wide_residual.conj(), wide_jacobian).real
    hessian = torch.einsum("bp,bpi,bpj->bij", weight.to(torch.complex128), wide_jacobian.conj(), wide_jacobian).real
    return loss, gradient, hessian


def losses(
    data: Tensor,
    images: Tensor,
    ctf: Tensor,
    precision: Tensor,
    rotations: Tensor,
    shifts_px: Tensor,
    kx: Tensor,
    ky: Tensor,
    oversampling: int,
    box: int,
) -> Tensor:
    """Loss of each image at each of its (B, K) poses; float64."""
    out = torch.empty(rotations.shape[:2], dtype=torch.float64, device=data.device)
    weight = precision.expand_as(ctf).to(torch.float64)
    for k in range(rotations.shape[1]):
        value = slice_forward(data, rotations[:, k], kx, ky, oversampling)
        angle = (2 * math.pi / box) * (shifts_px[:, k, :1] * kx + shifts_px[:, k, 1:] * ky)
        residual = (images * torch.polar(torch.ones_like(angle), angle) - ctf * value).to(torch.complex128)
        out[:, k] = 0.5 * (weight * residual.abs().square()).sum(1)
    return out


def _shape(data: Tensor) -> tuple[int, int, int]:
    nz, ny, nx = data.shape
    return nz, ny, nx


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of (M, K) and (N, K); on CUDA factors in float32 may be rounded to TF32 (``benchmarks/rounding.py``)."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        return left @ right.T
    finally:
        settings.fp32_precision = before


def posterior(
    even: Tensor,
    odd: Tensor,
    power: Tensor,
    log_prior: Tensor,
    real: Tensor,
    imag: Tensor,
    ctf2: Tensor,
    out: tuple[Tensor, Tensor, Tensor] | None,
    modes: int,
) -> Posterior:
    """Posteriors of N images over S shifts x 2 H rotations, and their weighted sums, added to ``out``.

    ``even``, ``odd`` (N, S, H): the score of rotation h is ``even + odd - power + log_prior``, of its half turn (index h + H)
    ``even - odd - power + log_prior``; both may be overwritten. ``real``, ``imag`` (N S, P): shifted images; ``ctf2`` (N, P);
    ``out``: (H, P) sums of real parts, imaginary parts and CTF^2. Returns the log of the summed likelihood (N,), the effective number
    of poses (N,), shift probabilities (N, S), posterior means of the cross term and of twice ``power`` (N,), and the ``modes`` best
    rotations (N, M) with the shift of each.
    """
    halves = even.shape[2]
    base = even - power[:, None, :] + log_prior[None, :, None]
    score = torch.cat([base + odd, base - odd], dim=2)
    peak, peak_shift = score.max(dim=1)
    best = peak.topk(modes, dim=1).indices
    evidence = score.flatten(1).logsumexp(dim=1)
    weight = (score - evidence[:, None, None]).exp()
    plus = weight[:, :, :halves] + weight[:, :, halves:]
    minus = weight[:, :, :halves] - weight[:, :, halves:]
    cross = (plus * even + minus * odd).sum(dim=(1, 2))
    energy = 2 * (plus.sum(dim=1) * power).sum(dim=1)
    if out is not None:
        out[0].addmm_(plus.reshape(-1, halves).T, real)
        out[1].addmm_(minus.reshape(-1, halves).T, imag)
        out[2].addmm_(plus.sum(dim=1).T, ctf2)
    return (
        evidence,
        1 / weight.square().sum(dim=(1, 2)),
        weight.sum(dim=2),
        cross,
        energy,
        best,
        peak_shift.gather(1, best),
    )
