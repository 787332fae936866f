"""The dense posterior against a brute-force loop over every image, rotation and shift."""

import math

import pytest
import torch

from cryorbit.groups.so3 import distance, half_grid, half_turn, healpix_grid, random_rotations
from cryorbit.physics import kernels
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.poses import grid as module
from cryorbit.poses.grid import distinct_modes, expectation, shift_grid, with_half_turns


@pytest.fixture
def case(generator):
    disk = fourier_disk(16, 4.0)
    p, g, b = len(disk), 36, 5
    complex_randn = lambda *s: torch.complex(torch.randn(*s, generator=generator), torch.randn(*s, generator=generator))  # noqa: E731
    slices = complex_randn(g, p)
    images = complex_randn(b, p) + slices[:b]
    ctf = torch.rand(b, p, generator=generator) + 0.2
    precision = disk.weight / (1.0 + torch.rand(p, generator=generator))
    return images, ctf, slices, precision, shift_grid(2.0, 1.0, 1.5), disk


def brute(images, ctf, slices, precision, shifts, disk):
    every = torch.cat([slices, slices.conj()])
    logp = torch.zeros(len(images), len(shifts.points), len(every), dtype=torch.float64)
    for i in range(len(images)):
        for s, point in enumerate(shifts.points):
            model = every * phase_ramp(point, disk) * ctf[i]
            logp[i, s] = -0.5 * (precision * (images[i] - model).abs() ** 2).sum(-1).double() + shifts.log_prior[s]
    return torch.softmax(logp.flatten(1), 1).view_as(logp), logp


BACKENDS = kernels.backend_names()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharpness", [0.02, 1.0, 4.0], ids=["broad", "usual", "sharp"])
@pytest.mark.parametrize("block", [1, 2**30])
def test_posterior_and_statistics_equal_brute_force(case, backend, sharpness, block, monkeypatch):
    monkeypatch.setitem(module._BLOCK, "cpu", block)
    images, ctf, slices, precision, shifts, disk = case
    precision = precision * sharpness
    case = (images, ctf, slices, precision, shifts, disk)
    posterior, logp = brute(*case)
    result = expectation(*case, modes=3, backend=backend)
    back = images[:, None] * ctf[:, None] * phase_ramp(shifts.points, disk).conj()
    half = len(slices)
    every = torch.einsum("isg,isp->gp", posterior.to(torch.complex64), back)
    numerator = every[:half] + every[half:].conj()
    torch.testing.assert_close(result.numerator, numerator, atol=2e-4, rtol=1e-4)
    weight = torch.einsum("isg,ip->gp", posterior.float(), ctf**2)
    torch.testing.assert_close(result.weight, weight[:half] + weight[half:], atol=2e-4, rtol=1e-4)
    residual = torch.zeros(len(disk), dtype=torch.float64)
    cross, energy = torch.zeros(2, len(images), dtype=torch.float64)
    for i in range(len(images)):
        for s, point in enumerate(shifts.points):
            model = torch.cat([slices, slices.conj()]) * phase_ramp(point, disk) * ctf[i]
            residual += (posterior[i, s][:, None] * (images[i] - model).abs().double() ** 2).sum(0)
            cross[i] += (posterior[i, s] * (precision * (model.conj() * images[i]).real).sum(1)).sum()
            energy[i] += (posterior[i, s] * (precision * model.abs() ** 2).sum(1)).sum()
    torch.testing.assert_close(result.power.double(), residual, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(result.intensity.double(), torch.stack([cross, energy]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(result.best[:, 0], posterior.amax(1).argmax(1))
    effective = 1 / posterior.flatten(1).square().sum(1)
    torch.testing.assert_close(result.effective.double(), effective, atol=1e-3, rtol=1e-3)
    constant = -0.5 * (precision * images.abs() ** 2).sum(1).double() + math.log(2 * half)
    evidence = logp.flatten(1).logsumexp(1)
    torch.testing.assert_close(result.log_evidence.double() + constant, evidence, atol=1e-3, rtol=1e-5)
    moment = (posterior.sum(2) * shifts.points.square().sum(-1)).sum() * 0.5 / len(images)
    assert result.shift_variance == pytest.approx(float(moment), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("block", [1, 2**30])
def test_best_match_with_each_group_equals_brute_force(case, block, monkeypatch):
    monkeypatch.setitem(module._BLOCK, "cpu", block)
    images, ctf, slices, precision, shifts, disk = case
    found = expectation(*case, groups=4).matches
    for i in range(len(images)):
        models = torch.cat([slices, slices.conj()]) * phase_ramp(shifts.points, disk)[:, None] * ctf[i]
        product = (precision * (models.conj() * images[i]).real).sum(-1) / (precision * models.abs() ** 2).sum(
            -1
        ).sqrt()
        best = product.amax(0).view(2, 4, 9).amax(dim=(0, 2))
        torch.testing.assert_close(found[i], best, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(expectation(3 * images, *case[1:], groups=4).matches, 3 * found, atol=1e-3, rtol=1e-4)


def test_best_shift_belongs_to_best_rotation(case):
    posterior, _ = brute(*case)
    for modes in (1, 4):
        result = expectation(*case, modes=modes)
        for i in range(len(case[0])):
            assert int(result.best_shift[i, 0]) == int(posterior[i, :, int(result.best[i, 0])].argmax())


def test_half_turn_of_a_pose_conjugates_its_slice(generator):
    disk = fourier_disk(16, 6.0)
    grid = slicing_grid(torch.randn(16, 16, 16, generator=generator), 6.0)
    rotations = random_rotations(5, generator)
    slices = slice_grid(grid, rotations, disk)
    torch.testing.assert_close(slice_grid(grid, half_turn(rotations), disk), slices.conj(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_half_grid_and_its_half_turns_are_the_grid(order):
    both, whole = with_half_turns(half_grid(order)), healpix_grid(order)
    assert len(both) == len(whole)
    nearest = torch.cdist(both.flatten(1), whole.flatten(1)).min(dim=0).values
    assert float(nearest.max()) < 1e-3


def test_distinct_modes_lie_apart_and_start_with_the_best(case):
    images, ctf, _, precision, shifts, disk = case
    rotations = with_half_turns(half_grid(1))
    generator = torch.Generator().manual_seed(3)
    many = torch.complex(
        torch.randn(288, len(disk), generator=generator), torch.randn(288, len(disk), generator=generator)
    )
    result = expectation(images, ctf, many, precision, shifts, disk, modes=60)
    best, shift = distinct_modes(result, rotations, 4, 0.6)
    assert best.shape == shift.shape == (len(images), 4)
    torch.testing.assert_close(best[:, 0], result.best[:, 0])
    for row in best:
        gaps = distance(rotations[row][:, None].expand(4, 4, 3, 3), rotations[row][None].expand(4, 4, 3, 3))
        assert float((gaps + 9 * torch.eye(4)).min()) >= 0.6


def test_shift_grid_is_a_normalised_prior_within_its_limit():
    grid = shift_grid(4.0, 1.0, 1.5)
    assert float(grid.log_prior.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(grid.points.norm(dim=1).max()) <= 4.0
    assert len(grid.points) == 49
    one, zero = grid.points.tolist().index([1.0, 0.0]), grid.points.tolist().index([0.0, 0.0])
    assert float(grid.log_prior[zero] - grid.log_prior[one]) == pytest.approx(0.5 / 1.5**2, rel=1e-5)
    assert len(shift_grid(0.0, 1.0, 1.0).points) == 1


def test_engine_grid_spacing_is_as_documented():
    # each rotation's nearest neighbour in the order-2 grid is one in-plane step of 15 degrees or closer
    grid = healpix_grid(2)
    relative = torch.einsum("aij,bij->ab", grid[:50], grid)
    angle = torch.rad2deg(torch.arccos(((relative - 1) / 2).clamp(-1, 1)))
    nearest = angle.topk(2, largest=False).values[:, 1]
    assert float(nearest.max()) == pytest.approx(15.0, abs=1.5)


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0], ids=["broad", "usual", "sharp"])
def test_backends_agree_on_a_grid_of_many_rotations(sharpness, generator):
    """150 rotations: two whole runs of the CPU kernel and part of one."""
    even, odd = (sharpness * torch.randn(2, 7, 9, 150, generator=generator)).unbind()
    power, prior = (
        sharpness * torch.rand(7, 150, generator=generator),
        torch.randn(9, generator=generator).log_softmax(0),
    )
    real, imag = torch.randn(2, 63, 11, generator=generator).unbind()
    ctf2 = torch.rand(7, 11, generator=generator)
    found = []
    for backend in BACKENDS:
        out = tuple(torch.zeros(150, 11) for _ in range(3))
        scores = even.clone(), odd.clone(), power, prior, real, imag, ctf2
        found.append((*kernels.select(even.device, backend).posterior(*scores, out, 4), *out))
    for other in found[1:]:
        for mine, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, theirs, atol=3e-3, rtol=1e-3)
