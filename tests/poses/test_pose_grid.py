"""The dense posterior against a brute-force loop over every image, rotation and shift."""

import pytest
import torch

from cryorbit.groups.so3 import healpix_grid
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.shift import phase_ramp
from cryorbit.poses import grid as module
from cryorbit.poses.grid import expectation, shift_grid


@pytest.fixture
def case(generator):
    disk = fourier_disk(16, 4.0)
    p, g, b = len(disk), 72, 5
    complex_randn = lambda *s: torch.complex(torch.randn(*s, generator=generator), torch.randn(*s, generator=generator))  # noqa: E731
    slices = complex_randn(g, p)
    images = complex_randn(b, p) + slices[:b]
    ctf = torch.rand(b, p, generator=generator) + 0.2
    precision = disk.weight / (1.0 + torch.rand(p, generator=generator))
    return images, ctf, slices, precision, shift_grid(2.0, 1.0, 1.5), disk


def brute(images, ctf, slices, precision, shifts, disk):
    logp = torch.zeros(len(images), len(shifts.points), len(slices), dtype=torch.float64)
    for i in range(len(images)):
        for s, point in enumerate(shifts.points):
            model = slices * phase_ramp(point, disk) * ctf[i]
            logp[i, s] = -0.5 * (precision * (images[i] - model).abs() ** 2).sum(-1).double() + shifts.log_prior[s]
    return torch.softmax(logp.flatten(1), 1).view_as(logp), logp


@pytest.mark.parametrize("block", [1, 10**9])
def test_posterior_and_statistics_equal_brute_force(case, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(module, "_NEGLIGIBLE", 0.0)
    images, ctf, slices, precision, shifts, disk = case
    posterior, logp = brute(*case)
    result = expectation(*case, modes=3)
    back = images[:, None] * ctf[:, None] * phase_ramp(shifts.points, disk).conj()
    numerator = torch.einsum("isg,isp->gp", posterior.to(torch.complex64), back)
    torch.testing.assert_close(result.numerator, numerator, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        result.weight, torch.einsum("isg,ip->gp", posterior.float(), ctf**2), atol=1e-4, rtol=1e-4
    )
    residual = torch.zeros(len(disk), dtype=torch.float64)
    for i in range(len(images)):
        for s, point in enumerate(shifts.points):
            model = slices * phase_ramp(point, disk) * ctf[i]
            residual += (posterior[i, s][:, None] * (images[i] - model).abs().double() ** 2).sum(0)
    torch.testing.assert_close(result.power.double(), residual, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(result.best[:, 0], posterior.amax(1).argmax(1))
    effective = 1 / posterior.flatten(1).square().sum(1)
    torch.testing.assert_close(result.effective.double(), effective, atol=1e-3, rtol=1e-4)
    constant = -0.5 * (precision * images.abs() ** 2).sum(1).double()
    torch.testing.assert_close(
        result.log_evidence.double() + constant, logp.flatten(1).logsumexp(1), atol=1e-3, rtol=1e-5
    )
    moment = (posterior.sum(2) * shifts.points.square().sum(-1)).sum() * 0.5 / len(images)
    assert result.shift_variance == pytest.approx(float(moment), rel=1e-4)


def test_best_shift_belongs_to_best_rotation(case):
    posterior, _ = brute(*case)
    result = expectation(*case)
    for i in range(len(case[0])):
        assert int(result.best_shift[i, 0]) == int(posterior[i, :, int(result.best[i, 0])].argmax())


def test_dropping_negligible_lines_changes_little(case, monkeypatch):
    full = expectation(*case).numerator
    monkeypatch.setattr(module, "_NEGLIGIBLE", 0.0)
    exact = expectation(*case).numerator
    assert float((full - exact).abs().max()) < 2e-3 * float(exact.abs().max())


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
