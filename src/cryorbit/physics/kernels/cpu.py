"""Fast kernels for the CPU (numba), float32 and float64. Same functions as ``reference``, as many threads as torch."""

import numba
import numpy as np
import torch
from torch import Tensor

from cryorbit.physics.kernels import cpu_pose, cpu_posterior, cpu_slices
from cryorbit.physics.kernels.cpu_walk import rows_of, slab_edges
from cryorbit.physics.kernels.interface import NormalEquations, Posterior

_TASKS_PER_THREAD = 8
_SLABS_PER_THREAD = 2  # where there are several, and a slab belongs to one
_NEGLIGIBLE = 1e-5  # weight of a pose that may be left out of the sums
_ENOUGH = 0.999  # of an image's mass must be in the sums
_SPARSE = 0.05  # share of the poses below which the sums visit them one by one
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _launched() -> int:
    """Numba's threads. Launching them tells OpenMP, and so torch, to use as many: what the user said (OMP_NUM_THREADS) is said again."""
    wanted = torch.get_num_threads()
    launched: int = numba.get_num_threads()
    torch.set_num_threads(wanted)
    return launched


_LAUNCHED = _launched()


def _use_torch_threads() -> int:
    threads = max(1, min(torch.get_num_threads(), _LAUNCHED))
    numba.set_num_threads(threads)
    return threads


def _plan(rotations: Tensor, kx: Tensor, ky: Tensor, oversampling: int) -> tuple[np.ndarray, np.ndarray, np.floating]:
    """Rotations, rows and scale as the kernels take them."""
    rot = rotations.detach().numpy()
    return rot, rows_of(kx.numpy(), ky.numpy()), rot.dtype.type(oversampling)


def _owned(shape: tuple[int, int, int], item_bytes: int, threads: int) -> np.ndarray:
    """Edges of slabs enough for ``threads`` that each own some; sums do not depend on how many there are."""
    return slab_edges(shape, item_bytes, 1 if threads == 1 else _SLABS_PER_THREAD * threads)


def _chunks(slabs: int, images: int, threads: int) -> int:
    """Into how many runs of images to cut each slab so that every thread has enough tasks."""
    return max(1, min(images, -(-_TASKS_PER_THREAD * threads // max(slabs, 1))))


def _floats(values: Tensor) -> np.ndarray:
    return torch.view_as_real(values.detach()).numpy()


def _shape(data: Tensor) -> tuple[int, int, int]:
    nz, ny, nx = data.shape
    return nz, ny, nx


def slice_forward(data: Tensor, rotations: Tensor, kx: Tensor, ky: Tensor, oversampling: int) -> Tensor:
    """(B, P) slices of a grid."""
    threads = _use_torch_threads()
    out = torch.empty(len(rotations), len(kx), dtype=data.dtype)
    rot, rows, scale = _plan(rotations, kx, ky, oversampling)
    edges = slab_edges(_shape(data), data.element_size())
    cpu_slices.read(_floats(data), rot, rows, edges, scale, _chunks(len(edges) - 1, len(rot), threads), _floats(out))
    return out


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
    threads = _use_torch_threads()
    rot, rows, scale = _plan(rotations, kx, ky, oversampling)
    shape, item_bytes = _shape(data), data.element_size()
    to_data = to_rotations = None
    if need_data:
        to_data = torch.zeros_like(data)
        nothing = torch.zeros(1, 1, dtype=rotations.dtype).numpy()
        edges = _owned(shape, item_bytes, threads)
        cpu_slices.add(_floats(gradient), nothing, False, rot, rows, edges, scale, _floats(to_data), nothing[None])
    if need_rotations:
        edges = slab_edges(shape, item_bytes)  # sums over slabs: their number may not depend on the threads
        slabs = len(edges) - 1
        shares = np.zeros((slabs, len(rot), 2, 3))
        chunks = _chunks(slabs, len(rot), threads)
        cpu_slices.slope(_floats(gradient), _floats(data), rot, rows, edges, scale, chunks, shares)
        top = torch.from_numpy(shares.sum(0) * oversampling).to(rotations.dtype)
        to_rotations = torch.cat([top, torch.zeros_like(top[:, :1])], dim=1)
    return to_data, to_rotations


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
    """Adjoint of ``slice_forward`` on (B, P) values, added to ``numerator``, and on real weights, to ``weight``, in one pass."""
    threads = _use_torch_threads()
    size = numerator.element_size() + weight.element_size()
    rot, rows, scale = _plan(rotations, kx, ky, oversampling)
    edges = _owned(_shape(numerator), size, threads)
    sums = _floats(numerator), weight.numpy()
    cpu_slices.add(_floats(values), weights.numpy(), True, rot, rows, edges, scale, *sums)


def _posed(
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
) -> tuple[np.ndarray | np.floating | float, ...]:
    """What the kernels of ``cpu_pose`` read, as they take it."""
    rot, rows, scale = _plan(rotations, kx, ky, oversampling)
    images_, shifts = _floats(images), shifts_px.numpy().astype(np.float64)
    return _floats(data), images_, ctf.numpy(), precision.numpy(), rot, shifts, rows, scale, 2 * np.pi / box


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
    _use_torch_threads()
    count = len(rotations)
    loss, gradient, hessian = np.zeros(count), np.zeros((count, 5)), np.zeros((count, 5, 5))
    arguments = _posed(data, images, ctf, precision, rotations, shifts_px, kx, ky, oversampling, box)
    cpu_pose.normal_equations(*arguments, loss, gradient, hessian)
    return torch.from_numpy(loss), torch.from_numpy(gradient), torch.from_numpy(hessian)


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
    _use_torch_threads()
    out = np.zeros(rotations.shape[:2])
    arguments = _posed(data, images, ctf, precision, rotations, shifts_px, kx, ky, oversampling, box)
    cpu_pose.losses(*arguments, out)
    return torch.from_numpy(out)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` by oneDNN in float32: MKL, which torch would take, runs at half that rate on processors it does not know."""
    if left.dtype != torch.float32 or not _ONEDNN:
        return left @ right.T
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


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
    """Posteriors and their weighted sums; poses that hold less than 1e-5 of an image each are left out of the sums."""
    threads = _use_torch_threads()
    count, shifts, halves = even.shape
    scores = tuple(t.numpy() for t in (even, odd, power, log_prior))
    top, total, squares, cross, energy, mass = torch.empty(6, count, dtype=torch.float64).unbind()
    by_shift = torch.empty(count, shifts)
    best, best_shift, kept = (torch.empty(count, dtype=torch.int64) for _ in range(3))
    summary = tuple(t.numpy() for t in (top, total, squares, cross, energy, by_shift, best, best_shift, kept, mass))
    cpu_posterior.summarise(*scores, _NEGLIGIBLE, *summary)
    modal, modal_shift = best[:, None], best_shift[:, None]
    if modes > 1:
        peak, shift = torch.empty(count, 2 * halves), torch.empty(count, 2 * halves, dtype=torch.int64)
        cpu_posterior.peaks(*scores, peak.numpy(), shift.numpy())
        modal = peak.topk(modes, dim=1).indices
        modal_shift = shift.gather(1, modal)
    if out is not None:
        entries = int(kept.sum())
        if entries < _SPARSE * even.numel() and float(mass.min()) > _ENOUGH:
            rows, where = torch.zeros(2, entries, dtype=torch.int64).unbind()
            sums, differences = torch.zeros(2, entries).unbind()
            listed = tuple(t.numpy() for t in (rows, where, sums, differences))
            end = kept.cumsum(0).numpy()
            cpu_posterior.list_weights(*scores, _NEGLIGIBLE, top.numpy(), total.numpy(), end, *listed)
            pixels = tuple(t.numpy() for t in (real, imag, ctf2, *out))
            cpu_posterior.add_listed(*listed, shifts, *pixels, threads)
        else:
            cpu_posterior.dense_weights(*scores, top.numpy(), total.numpy())
            weights = even.view(-1, halves), odd.view(-1, halves), even.sum(dim=1)
            for total_, weight, pixel in zip(out, weights, (real, imag, ctf2), strict=True):
                total_ += product(weight.T, pixel.T)
    evidence = (top + total.log()).float()
    effective = (total.square() / squares).float()
    return evidence, effective, by_shift, cross.float(), energy.float(), modal, modal_shift
