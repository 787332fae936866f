"""Every kernel backend against the reference, float32 and float64, any walk of the grid."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from cryorbit.groups import so3
from cryorbit.physics.fourier import FourierDisk, fourier_disk
from cryorbit.physics.kernels import backend_names, cpu_walk
from cryorbit.physics.posing import pose_losses, pose_normal_equations
from cryorbit.physics.slicing import SlicingGrid, insert_slices, slice_grid, slicing_grid

FAST = [name for name in backend_names("cpu") if name != "reference"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

pytestmark = [
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"]),
    pytest.mark.parametrize(("box", "radius"), [(12, 6.0), (17, 5.3)]),
]


@pytest.fixture(autouse=True)
def _several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As grids of real size have."""
    monkeypatch.setattr(cpu_walk, "SLAB_BYTES", 4096)


@pytest.fixture(params=FAST)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _setting(box: int, radius: float, dtype: torch.dtype, n: int = 7) -> tuple[SlicingGrid, torch.Tensor, FourierDisk]:
    generator = torch.Generator().manual_seed(box)
    volume = torch.randn(box, box, box, generator=generator, dtype=dtype)
    rotations = so3.random_rotations(n, generator).to(dtype)
    rotations[0] = torch.eye(3)  # lattice rotations put every pixel on the lattice
    rotations[1] = torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    return slicing_grid(volume, radius), rotations, fourier_disk(box, radius)


def _values(disk: FourierDisk, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(n, len(disk), generator=generator, dtype=dtype.to_complex())
    return values, torch.rand(n, len(disk), generator=generator, dtype=dtype)


def _close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]


def test_slices_agree(backend: str, box: int, radius: float, dtype: torch.dtype) -> None:
    grid, rotations, disk = _setting(box, radius, dtype)
    expected = slice_grid(grid, rotations, disk, backend="reference")
    _close(slice_grid(grid, rotations, disk, backend=backend), expected, dtype)


def test_a_disk_in_any_order_gives_the_same_pixels(backend: str, box: int, radius: float, dtype: torch.dtype) -> None:
    grid, rotations, disk = _setting(box, radius, dtype)
    order = torch.randperm(len(disk), generator=torch.Generator().manual_seed(2))
    mixed = FourierDisk(disk.box, disk.radius, disk.kx[order], disk.ky[order], disk.weight[order])
    expected = slice_grid(grid, rotations, disk, backend=backend)[:, order]
    assert torch.equal(slice_grid(grid, rotations, mixed, backend=backend), expected)


def test_insertions_agree(backend: str, box: int, radius: float, dtype: torch.dtype) -> None:
    _, rotations, disk = _setting(box, radius, dtype)
    values, weights = _values(disk, 7, dtype)
    found, expected = (insert_slices(values, weights, rotations, disk, backend=b) for b in (backend, "reference"))
    _close(found.numerator, expected.numerator, dtype)
    _close(found.weight, expected.weight, dtype)


def test_gradients_agree(backend: str, box: int, radius: float, dtype: torch.dtype) -> None:
    grid, rotations, disk = _setting(box, radius, dtype)
    values, _ = _values(disk, 7, dtype)
    results = []
    for name in (backend, "reference"):
        data, turns = grid.data.clone().requires_grad_(), rotations.clone().requires_grad_()
        moving = SlicingGrid(data, grid.box, grid.oversampling, grid.radius)
        slice_grid(moving, turns, disk, backend=name).backward(values)
        results.append((data.grad, turns.grad))
    _close(results[0][0], results[1][0], dtype)
    _close(results[0][1], results[1][1], dtype)


@pytest.mark.parametrize("per_image", [False, True])
def test_normal_equations_agree(backend: str, per_image: bool, box: int, radius: float, dtype: torch.dtype) -> None:
    grid, rotations, disk = _setting(box, radius, dtype)
    values, weights = _values(disk, 7, dtype)
    shifts = torch.randn(7, 2, generator=torch.Generator().manual_seed(9)).to(dtype)
    precision = weights if per_image else weights[0]
    arguments = (grid, 40 * values, weights - 0.5, precision, rotations, shifts, disk)
    for found, expected in zip(
        pose_normal_equations(*arguments, backend=backend),
        pose_normal_equations(*arguments, backend="reference"),
        strict=True,
    ):
        assert found.dtype == torch.float64
        _close(found, expected, dtype)


def test_losses_agree_and_are_those_of_the_normal_equations(
    backend: str, box: int, radius: float, dtype: torch.dtype
) -> None:
    grid, rotations, disk = _setting(box, radius, dtype)
    values, weights = _values(disk, 7, dtype)
    generator = torch.Generator().manual_seed(9)
    shifts = torch.randn(7, 3, 2, generator=generator).to(dtype)
    poses = so3.random_rotations(21, generator).to(dtype).view(7, 3, 3, 3)
    poses[:, 0] = rotations
    common = (grid, 40 * values, weights - 0.5, weights)
    found, expected = (pose_losses(*common, poses, shifts, disk, backend=b) for b in (backend, "reference"))
    assert found.dtype == torch.float64
    _close(found, expected, dtype)
    for k in range(3):
        loss, _, _ = pose_normal_equations(*common, poses[:, k], shifts[:, k], disk, backend="reference")
        _close(found[:, k], loss, dtype)


def test_insertion_does_not_depend_on_threads(
    backend: str, threads: None, box: int, radius: float, dtype: torch.dtype
) -> None:
    _, rotations, disk = _setting(box, radius, dtype, n=40)
    values, weights = _values(disk, 40, dtype)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(insert_slices(values, weights, rotations, disk, backend=backend))
    assert torch.equal(results[0].numerator, results[1].numerator)
    assert torch.equal(results[0].weight, results[1].weight)


def test_every_pixel_is_walked_once(box: int, radius: float, dtype: torch.dtype) -> None:
    _, rotations, disk = _setting(box, radius, dtype, n=30)
    kind = np.dtype(str(dtype).removeprefix("torch.")).type
    rows = cpu_walk.rows_of(disk.kx.numpy(), disk.ky.numpy())
    c = int(np.ceil(2 * radius)) + 1
    edges = cpu_walk.slab_edges((2 * c + 1, 2 * c + 1, c + 2), 8)
    assert edges[0] == 0
    assert edges[-1] == 2 * c + 1
    for matrix in rotations.numpy():
        a, d = kind(2) * matrix[0], kind(2) * matrix[1]
        seen = np.zeros(len(disk), int)
        for lo, hi in pairwise(edges):
            for at, k0, k1, ky in rows:
                p0, p1, m0, m1 = cpu_walk.windows(
                    a[0], d[0] * kind(ky), a[2], d[2] * kind(ky), kind(c - 0.5), k0, k1, kind(lo), kind(hi)
                )
                seen[at + p0 - k0 : at + p1 - k0] += 1
                seen[at + m0 - k0 : at + m1 - k0] += 1
        assert np.array_equal(seen, np.ones(len(disk), int))


@pytest.mark.gpu
def test_reference_on_cuda_agrees_with_the_cpu(box: int, radius: float, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    grid, rotations, disk = _setting(box, radius, dtype)
    values, weights = _values(disk, 7, dtype)
    there = SlicingGrid(grid.data.cuda(), grid.box, grid.oversampling, grid.radius)
    _close(slice_grid(there, rotations.cuda(), disk).cpu(), slice_grid(grid, rotations, disk), dtype)
    found = insert_slices(values.cuda(), weights.cuda(), rotations.cuda(), disk)
    _close(found.numerator.cpu(), insert_slices(values, weights, rotations, disk).numerator, dtype)
