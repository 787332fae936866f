"""What every volume of ``volumes/registry.py`` keeps: Friedel symmetry, centre, equivariance, adjoint, gradients."""

import math

import pytest
import torch
from contract_cases import blob_3d, quarter_turns, rotate_map
from torch import Tensor, nn
from torch.autograd import gradcheck

from cryorbit.groups.so3 import exp, random_rotations
from cryorbit.physics.fourier import FourierDisk, fourier_disk, images_to_disk
from cryorbit.volumes.registry import VOLUMES

LINEAR = ["voxel"]  # whose one parameter is the map


@pytest.fixture(params=sorted(VOLUMES))
def kind(request: pytest.FixtureRequest) -> type[nn.Module]:
    return VOLUMES[request.param]


@pytest.fixture(params=[12, 13])
def box(request: pytest.FixtureRequest) -> int:
    return request.param


def friedel_error(volume: nn.Module, rotations: Tensor, disk: FourierDisk) -> float:
    """Relative violation of ``F(-k) = conj F(k)`` of a real map, read by half a turn of each view in its plane."""
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=rotations.dtype))
    here, there = (volume(r, disk).detach() for r in (rotations, half_turn @ rotations))
    return float((there - here.conj()).abs().max() / here.abs().max())


def test_friedel(kind: type[nn.Module], box: int, generator: torch.Generator) -> None:
    rotations = random_rotations(10, generator).double()
    assert friedel_error(kind.from_map(blob_3d(box)), rotations, fourier_disk(box)) < 1e-12


def test_friedel_check_can_fail(generator: torch.Generator) -> None:
    class Lopsided(nn.Module):
        def forward(self, rotations: Tensor, disk: FourierDisk) -> Tensor:
            return (1j + rotations[:, :1, 0] * disk.kx).to(torch.complex128)

    assert friedel_error(Lopsided(), random_rotations(3, generator).double(), fourier_disk(8)) > 0.1


def test_point_at_the_centre_has_constant_slices(kind: type[nn.Module], box: int, generator: torch.Generator) -> None:
    data = torch.zeros(box, box, box, dtype=torch.float64)
    data[box // 2, box // 2, box // 2] = 1
    slices = kind.from_map(data)(random_rotations(10, generator).double(), fourier_disk(box)).detach()
    torch.testing.assert_close(slices, torch.ones_like(slices), atol=1e-10, rtol=0)


def test_slice_at_identity_is_the_transform_of_the_sum_along_z(kind: type[nn.Module], box: int) -> None:
    data, disk = blob_3d(box), fourier_disk(box)
    found = kind.from_map(data)(torch.eye(3, dtype=torch.float64)[None], disk)[0].detach()
    expected = images_to_disk(data.sum(0), disk)
    assert (
        float((found - expected).norm() / expected.norm()) < 0.04
    )  # the correction for interpolation, unneeded at grid points


def test_equivariant_at_lattice_rotations(kind: type[nn.Module], box: int) -> None:
    disk, turns, data = fourier_disk(box), quarter_turns(), blob_3d(box)
    for h in turns:
        turned = kind.from_map(rotate_map(h, data))(turns, disk)
        direct = kind.from_map(data)(turns @ h, disk)
        assert float(((turned - direct).abs().max() / direct.abs().max()).detach()) < 1e-10


def test_zero_frequency_is_the_total(kind: type[nn.Module], box: int, generator: torch.Generator) -> None:
    """The mean density does not depend on the view, up to the correction for interpolation (largest at the corners)."""
    disk = fourier_disk(box)
    origin = int(((disk.kx == 0) & (disk.ky == 0)).nonzero())
    found = kind.from_map(blob_3d(box))(random_rotations(5, generator).double(), disk)[:, origin].detach()
    torch.testing.assert_close(found, found[:1].expand_as(found), atol=1e-12, rtol=1e-12)
    assert float(found[0].real) == pytest.approx(float(blob_3d(box).sum()), rel=0.06)


@pytest.mark.parametrize("kind", LINEAR, indirect=True)
def test_backward_is_the_adjoint(kind: type[nn.Module], box: int, generator: torch.Generator) -> None:
    """``Re <S v, u> = <v, S* u>`` with S* from autograd, v and u random: the volume is linear in its map."""
    disk, rotations = fourier_disk(box), random_rotations(4, generator).double()
    v, w = (torch.randn(box, box, box, generator=generator, dtype=torch.float64) for _ in range(2))
    u = torch.randn(4, len(disk), 2, generator=generator, dtype=torch.float64)
    volume = kind.from_map(w)
    inner = (torch.view_as_real(volume(rotations, disk)) * u).sum()
    (adjoint,) = torch.autograd.grad(inner, list(volume.parameters()))
    left = float((torch.view_as_real(kind.from_map(v)(rotations, disk)) * u).sum().detach())
    assert left == pytest.approx(float((adjoint * v).sum()), rel=1e-9)


def test_gradient_in_the_parameters(kind: type[nn.Module], box: int, generator: torch.Generator) -> None:
    """Along random directions, against central differences of a random linear function of the slices."""
    disk, rotations = fourier_disk(box), random_rotations(2, generator).double()
    u = torch.randn(2, len(disk), 2, generator=generator, dtype=torch.float64)
    volume = kind.from_map(blob_3d(box))

    def moved(direction: list[Tensor], by: float) -> None:
        with torch.no_grad():
            for parameter, d in zip(volume.parameters(), direction, strict=True):
                parameter.add_(by * d)

    def value() -> Tensor:
        return (torch.view_as_real(volume(rotations, disk)) * u).sum()

    def random_direction() -> list[Tensor]:
        return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in volume.parameters()]

    moved(random_direction(), 0.1)  # away from an empty network, most of whose gradients are zero
    gradient, step = torch.autograd.grad(value(), list(volume.parameters())), 1e-6
    for direction in (random_direction() for _ in range(3)):
        slope = float(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)))
        moved(direction, step)
        ahead = float(value().detach())
        moved(direction, -2 * step)
        behind = float(value().detach())
        moved(direction, step)
        assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_gradcheck_in_rotation(kind: type[nn.Module], box: int, generator: torch.Generator) -> None:
    """Along the group: a small turn in front of a generic rotation (reads have kinks at lattice rotations)."""
    volume, disk = kind.from_map(blob_3d(box)), fourier_disk(box, 2.0)
    rotation = random_rotations(1, generator).double()
    turn = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: torch.view_as_real(volume(exp(t) @ rotation, disk)), (turn,))


def test_new_volume_is_empty_and_trainable(kind: type[nn.Module]) -> None:
    volume, disk = kind(8), fourier_disk(8)
    rotations = torch.eye(3)[None]
    assert float(volume(rotations, disk).detach().abs().max()) == 0
    optimiser = torch.optim.SGD(volume.parameters(), lr=1e-4)
    target = torch.ones(1, len(disk), dtype=torch.complex64)
    losses = []
    for _ in range(5):
        loss = (volume(rotations, disk) - target).abs().square().sum()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(math.isfinite(value) for value in losses)
    assert losses[-1] < losses[0]


def test_map_is_copied(kind: type[nn.Module]) -> None:
    data = blob_3d(8)
    volume = kind.from_map(data)
    with torch.no_grad():
        for parameter in volume.parameters():
            parameter.zero_()
    torch.testing.assert_close(data, blob_3d(8), atol=0, rtol=0)
