"""Slicing, its adjoint and reconstruction: the mathematics, on the default kernels."""

import math
from itertools import permutations, product

import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups import so3
from cryorbit.physics.fourier import fourier_disk, images_to_disk
from cryorbit.physics.posing import pose_normal_equations
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import (
    SlicingGrid,
    completed,
    insert_slices,
    project,
    slice_grid,
    slicing_grid,
    volume_from_accumulator,
)
from cryorbit.physics.spectrum import mean_weight, power_spectrum, resized

BOXES = pytest.mark.parametrize("box", [8, 9])


def _map(box: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(box, box, box, generator=generator, dtype=dtype)


def _rotations(n: int, generator: torch.Generator) -> torch.Tensor:
    return so3.random_rotations(n, generator).double()


def _smooth_map(box: int, generator: torch.Generator) -> torch.Tensor:
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    centres = 0.08 * box * torch.randn(25, 3, generator=generator, dtype=torch.float64)
    z, y, x = (torch.exp(-((axis - centres[:, i : i + 1]) ** 2) / 4.5) for i in range(3))
    return torch.einsum("nz,ny,nx->zyx", z, y, x)


def _lattice_rotations() -> list[torch.Tensor]:
    found = []
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        matrix = torch.zeros(3, 3, dtype=torch.float64)
        for row, (column, sign) in enumerate(zip(order, signs, strict=True)):
            matrix[row, column] = sign
        if torch.linalg.det(matrix) > 0:
            found.append(matrix)
    return found


def _turn(volume: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(R.v)(x) = v(R^T x) on an odd box, by indexing."""
    half = volume.shape[0] // 2
    axis = torch.arange(-half, half + 1, dtype=torch.float64)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    source = (torch.stack([x, y, z], -1) @ matrix).long() + half
    return volume[source[..., 2], source[..., 1], source[..., 0]]


@BOXES
@pytest.mark.parametrize("oversampling", [1, 2, 3])
def test_adjoint(box: int, oversampling: int, generator: torch.Generator) -> None:
    disk = fourier_disk(box)
    grid = slicing_grid(_map(box, generator), box / 2, oversampling)
    rotations = _rotations(4, generator)
    u = torch.randn(4, len(disk), dtype=torch.complex128, generator=generator)
    forward = (slice_grid(grid, rotations, disk).conj() * u).real.sum()
    inserted = insert_slices(u, torch.ones(4, len(disk), dtype=torch.float64), rotations, disk, oversampling)
    backward = (grid.data.conj() * inserted.numerator).real.sum()
    assert float(abs(forward - backward) / abs(forward)) < 1e-10
    assert float(inserted.weight.sum()) == pytest.approx(4 * len(disk), rel=1e-12)


@BOXES
def test_gradcheck_in_map_and_rotations(box: int, generator: torch.Generator) -> None:
    disk = fourier_disk(box, 2.5)
    volume = _map(box, generator).requires_grad_()
    rotations = _rotations(2, generator).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, r: slice_grid(slicing_grid(v, disk.radius), r, disk), (volume, rotations), fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda r: slice_grid(slicing_grid(volume.detach(), disk.radius), r, disk), (rotations,)
    )


def test_equivariance_under_lattice_rotations(generator: torch.Generator) -> None:
    box = 9
    volume, disk = _map(box, generator), fourier_disk(box)
    rotations = _rotations(3, generator)
    for matrix in _lattice_rotations():
        turned = slice_grid(slicing_grid(_turn(volume, matrix), box / 2), rotations, disk)
        composed = slice_grid(slicing_grid(volume, box / 2), rotations @ matrix, disk)
        assert float((turned - composed).abs().max() / turned.abs().max()) < 1e-12


@BOXES
def test_central_slice_at_the_identity(box: int, generator: torch.Generator) -> None:
    volume, disk = _map(box, generator), fourier_disk(box)
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    u = axis / (2 * box)
    window = torch.sinc(u) ** 3 / (
        0.75 + 0.25 * torch.cos(2 * math.pi * u)
    )  # on the lattice the kernel reads 1/8, 3/4, 1/8
    expected = images_to_disk((volume / (window[:, None, None] * window[:, None] * window)).sum(0), disk)
    found = slice_grid(slicing_grid(volume, box / 2), torch.eye(3, dtype=torch.float64)[None], disk)[0]
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


@BOXES
def test_friedel(box: int, generator: torch.Generator) -> None:
    disk = fourier_disk(box)
    grid = slicing_grid(_map(box, generator), box / 2)
    rotations = _rotations(5, generator)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    a, b = slice_grid(grid, rotations, disk), slice_grid(grid, half_turn @ rotations, disk)
    assert float((a - b.conj()).abs().max() / a.abs().max()) < 1e-12


@BOXES
def test_centre_voxel_stays_at_the_centre(box: int, generator: torch.Generator) -> None:
    volume = torch.zeros(box, box, box, dtype=torch.float64)
    volume[box // 2, box // 2, box // 2] = 1.0
    disk = fourier_disk(box)
    rotations = _rotations(50, generator)
    slices = slice_grid(slicing_grid(volume, box / 2), rotations, disk)
    assert float((slices - 1).abs().max()) < 1e-12
    peak = project(volume, rotations).flatten(1).argmax(1)
    assert torch.equal(peak, torch.full_like(peak, (box // 2) * box + box // 2))


def test_an_atom_lands_at_the_first_rows_of_r(generator: torch.Generator) -> None:
    box, sigma = 32, 2.0
    atom = torch.tensor([5.0, -3.0, 6.0], dtype=torch.float64)
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    x, y, z = (torch.exp(-((axis - a) ** 2) / (2 * sigma**2)) for a in atom)
    rotations = _rotations(10, generator)
    images = project(torch.einsum("z,y,x->zyx", z, y, x), rotations)
    peak = images.flatten(1).argmax(1)
    found = torch.stack([peak % box, peak // box], -1) - box // 2
    assert float((found - (rotations @ atom)[:, :2]).abs().max()) < 0.75


def test_inputs_are_left_alone_and_leaves_get_gradients(generator: torch.Generator) -> None:
    box = 8
    volume = _map(box, generator, torch.float32).requires_grad_()
    rotations = so3.random_rotations(3, generator).requires_grad_()
    before = volume.detach().clone(), rotations.detach().clone()
    project(volume, rotations).square().sum().backward()
    assert torch.equal(volume.detach(), before[0])
    assert torch.equal(rotations.detach(), before[1])
    assert volume.grad is not None
    assert rotations.grad is not None
    assert float(volume.grad.abs().min()) > 0
    assert float(rotations.grad[:, 2].abs().max()) == 0.0  # k_z = 0: the third row does not matter


def test_sums_are_added_to_in_place(generator: torch.Generator) -> None:
    disk = fourier_disk(9, 3.0)
    rotations = _rotations(6, generator)
    values = torch.randn(6, len(disk), dtype=torch.complex128, generator=generator)
    weights = torch.rand(6, len(disk), dtype=torch.float64, generator=generator)
    first = insert_slices(values[:2], weights[:2], rotations[:2], disk)
    place = first.numerator.data_ptr()
    both = insert_slices(values[2:], weights[2:], rotations[2:], disk, out=first)
    once = insert_slices(values, weights, rotations, disk)
    assert both.numerator.data_ptr() == place
    assert float((both.numerator - once.numerator).abs().max()) < 1e-13
    assert float((both.weight - once.weight).abs().max()) < 1e-13


@pytest.mark.parametrize("box", [24, 25])
def test_reconstruction_from_its_own_slices(box: int, generator: torch.Generator) -> None:
    volume, disk = _smooth_map(box, generator), fourier_disk(box)
    rotations = _rotations(600, generator)
    slices = slice_grid(slicing_grid(volume, box / 2, 3), rotations, disk)
    acc = insert_slices(slices, torch.ones(600, len(disk), dtype=torch.float64), rotations, disk)
    found = volume_from_accumulator(acc)
    assert found.shape == volume.shape
    assert float((found - volume).norm() / volume.norm()) < 0.045
    assert float((found * volume).sum() / volume.square().sum()) == pytest.approx(1.0, abs=0.04)
    shells = torch.full((box,), 1e9, dtype=torch.float64)
    assert float(volume_from_accumulator(acc, shells).norm() / volume.norm()) < 1e-3


def test_completion_makes_the_map_independent_of_the_half_kept(generator: torch.Generator) -> None:
    """A slice and its mate (image turned by 180 degrees, R by the same) must give the same map."""
    disk = fourier_disk(9)
    rotations = _rotations(20, generator)
    values = torch.randn(20, len(disk), dtype=torch.complex128, generator=generator)
    values[:, (disk.kx == 0) & (disk.ky == 0)] = 1.0
    ones = torch.ones(20, len(disk), dtype=torch.float64)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    a = volume_from_accumulator(insert_slices(values, ones, rotations, disk), 0.1)
    b = volume_from_accumulator(insert_slices(values.conj(), ones, half_turn @ rotations, disk), 0.1)
    assert float((a - b).abs().max() / a.abs().max()) < 1e-10


@pytest.mark.parametrize("oversampling", [1, 2])
@BOXES
def test_columns_next_to_the_origin_are_mates(box: int, oversampling: int, generator: torch.Generator) -> None:
    data = slicing_grid(_map(box, generator), box / 2, oversampling).data
    assert data.shape[0] == data.shape[1] == 2 * data.shape[2] - 3
    largest = data.abs().max()
    assert float((data[..., 0] - data[..., 2].flip(0, 1).conj()).abs().max() / largest) < 1e-14
    assert float((data[..., 1] - data[..., 1].flip(0, 1).conj()).abs().max() / largest) < 1e-14


def test_slope_is_continuous_across_grid_points(generator: torch.Generator) -> None:
    """Lattice rotations put every pixel on grid points, among them ``x = 0`` where reads are mirrored."""
    disk, box = fourier_disk(9), 9
    grid = slicing_grid(_map(box, generator), box / 2)
    pull = torch.randn(1, len(disk), dtype=torch.complex128, generator=generator)
    slopes = []
    for side in (-1e-9, 1e-9):
        omega = torch.full((1, 3), side, dtype=torch.float64, requires_grad=True)
        slice_grid(grid, so3.exp(omega), disk).backward(pull)
        assert omega.grad is not None
        slopes.append(omega.grad)
    assert float((slopes[0] - slopes[1]).norm() / slopes[0].norm()) < 1e-6


def test_completed_weights_and_radial_means(generator: torch.Generator) -> None:
    disk, n = fourier_disk(9, 3.0), 300
    rotations, ones = _rotations(n, generator), torch.ones(n, len(disk), dtype=torch.float64)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    acc = insert_slices(ones + 0j, ones, rotations, disk)
    mates = insert_slices(ones + 0j, ones, half_turn @ rotations, disk)
    whole = completed(acc.weight)
    assert float(whole[..., 0].sum() + 2 * whole[..., 1:].sum()) == pytest.approx(2 * float(ones.sum()), rel=1e-12)
    torch.testing.assert_close(completed(acc.numerator).real, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(completed(mates.weight), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean_weight(acc, 5), mean_weight(mates, 5), rtol=1e-10, atol=0)
    larger = resized(acc, 4.0)
    wide = fourier_disk(9, 4.0)
    zeros = torch.zeros(1, len(wide), dtype=torch.float64)
    assert torch.equal((larger + insert_slices(zeros + 0j, zeros, rotations[:1], wide)).weight, larger.weight)
    assert float(larger.weight.sum()) == pytest.approx(float(acc.weight.sum()))
    assert torch.equal(resized(larger, 3.0).numerator, acc.numerator)
    flat = torch.zeros(9, 9, 9, dtype=torch.float64)
    flat[4, 4, 4] = 2.0
    torch.testing.assert_close(power_spectrum(slicing_grid(flat, 3.0), 4), torch.full((4,), 4.0, dtype=torch.float64))


@BOXES
def test_pose_derivatives_against_autograd(box: int, generator: torch.Generator) -> None:
    disk = fourier_disk(box)
    grid = slicing_grid(_map(box, generator), box / 2)
    rotations, n = _rotations(3, generator), 3
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    ctf = torch.randn(n, len(disk), generator=generator, dtype=torch.float64)
    precision = torch.rand(len(disk), generator=generator, dtype=torch.float64)
    images = 10 * torch.randn(n, len(disk), generator=generator, dtype=torch.complex128)

    def model(pose: torch.Tensor) -> torch.Tensor:
        return ctf * phase_ramp(pose[:, 3:], disk) * slice_grid(grid, so3.exp(pose[:, :3]) @ rotations, disk)

    pose = torch.cat([torch.zeros(n, 3, dtype=torch.float64), shifts], 1).requires_grad_()
    value = 0.5 * (precision * (images - model(pose)).abs() ** 2).sum(1)
    (slope,) = torch.autograd.grad(value.sum(), pose)
    loss, gradient, hessian = pose_normal_equations(grid, images, ctf, precision, rotations, shifts, disk)
    torch.testing.assert_close(loss, value.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-8 * float(slope.abs().max()))
    step = 1e-6
    columns = []
    for i in range(5):
        move = step * torch.eye(5, dtype=torch.float64)[i]
        with torch.no_grad():
            columns.append((model(pose + move) - model(pose - move)) / (2 * step))
    jacobian = torch.stack(columns, -1)
    expected = torch.einsum("p,bpi,bpj->bij", precision.to(torch.complex128), jacobian.conj(), jacobian).real
    torch.testing.assert_close(hessian, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_gauss_newton_finds_the_pose(generator: torch.Generator) -> None:
    box = 24
    disk = fourier_disk(box, 8.0)
    grid = slicing_grid(_smooth_map(box, generator), disk.radius)
    truth, shift = _rotations(8, generator), 0.7 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    images = slice_grid(grid, truth, disk) * phase_ramp(shift, disk)
    offset = torch.nn.functional.normalize(torch.randn(8, 3, generator=generator, dtype=torch.float64), dim=1)
    rotations, shifts = so3.exp(math.radians(4) * offset) @ truth, torch.zeros_like(shift)
    ones = torch.ones(8, len(disk), dtype=torch.float64)
    for _ in range(8):
        _, gradient, hessian = pose_normal_equations(grid, images, ones, disk.weight, rotations, shifts, disk)
        step = -torch.linalg.solve(hessian, gradient)
        rotations, shifts = so3.exp(step[:, :3]) @ rotations, shifts + step[:, 3:]
    assert float(so3.distance(rotations, truth).max()) < math.radians(0.05)
    assert float((shifts - shift).abs().max()) < 0.01


def test_what_cannot_be_sliced_is_refused(generator: torch.Generator) -> None:
    grid = slicing_grid(_map(8, generator), 3.0)
    disk = fourier_disk(8, 3.0)
    eye = torch.eye(3, dtype=torch.float64)[None]
    with pytest.raises(ConfigError, match="CONF105"):
        slice_grid(grid, eye, fourier_disk(8, 3.5))
    with pytest.raises(ConfigError, match="CONF105"):
        slice_grid(grid, eye, fourier_disk(10, 3.0))
    with pytest.raises(DataError, match="DATA101"):
        slice_grid(grid, 2 * eye, disk)
    with pytest.raises(DataError, match="DATA101"):
        slice_grid(grid, math.nan * eye, disk)
    with pytest.raises(ConfigError, match="CONF103"):
        slicing_grid(_map(8, generator), 3.0, oversampling=0)
    with pytest.raises(ConfigError, match="CONF104"):
        slicing_grid(_map(8, generator), 0.0)
    with pytest.raises(ConfigError, match="CONF101"):
        slice_grid(grid, eye, disk, backend="metal")
    one = torch.ones(1, len(disk), dtype=torch.float64)
    small = insert_slices(slice_grid(grid, eye, disk), one, eye, disk)
    with pytest.raises(ConfigError, match="CONF102"):
        insert_slices(slice_grid(grid, eye, disk), one, eye, disk, oversampling=1, out=small)
    with pytest.raises(ConfigError, match="CONF118"):
        small + insert_slices(slice_grid(grid, eye, disk), one, eye, disk, oversampling=1)
    assert slice_grid(grid, eye[:0], disk).shape == (0, len(disk))
    assert isinstance(grid.detach(), SlicingGrid)
