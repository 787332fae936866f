"""Images turned in Fourier space: against a closed form, exact adjoint, gradients, and back again."""

import math

import pytest
import torch
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk, disk_to_images, fourier_disk
from cryorbit.physics.planar import rotate_images
from cryorbit.physics.turning import (
    Planes,
    averages,
    empty_planes,
    insert_turned,
    plane_power,
    planes_of,
    resized_planes,
    turned,
)


def blobs(box: int, angle: float = 0.0) -> Tensor:
    """Two Gaussians, turned by ``angle`` (radian, x towards y)."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    c, s = math.cos(angle), math.sin(angle)
    x, y = c * x + s * y, -s * x + c * y
    return torch.exp(-((x - 5) ** 2 + (y + 3) ** 2) / 12) + 0.7 * torch.exp(-((x + 4) ** 2 + (y - 6) ** 2) / 20)


@pytest.fixture(params=[32, 33], ids=["even", "odd"])
def disk(request: pytest.FixtureRequest) -> FourierDisk:
    return fourier_disk(request.param)


@pytest.mark.parametrize("angle", [0.0, 0.7, -2.5])
def test_turned_images_are_the_turned_picture(disk, angle):
    planes = planes_of(blobs(disk.box)[None], disk.radius)
    found = disk_to_images(turned(planes, torch.tensor([angle], dtype=torch.float64), disk), disk)[0, 0]
    expected = blobs(disk.box, angle)
    assert float((found - expected).norm() / expected.norm()) < 6e-3
    other = rotate_images(blobs(disk.box)[None], torch.tensor([angle], dtype=torch.float64))[0]
    assert float((found - other).norm() / expected.norm()) < 2e-2


def test_a_turn_the_other_way_is_seen(disk):
    planes = planes_of(blobs(disk.box)[None], disk.radius)
    found = disk_to_images(turned(planes, torch.tensor([-0.7], dtype=torch.float64), disk), disk)[0, 0]
    expected = blobs(disk.box, 0.7)
    assert float((found - expected).norm() / expected.norm()) > 0.5


def test_half_a_turn_conjugates(disk):
    planes = planes_of(blobs(disk.box)[None], disk.radius)
    there, back = turned(planes, torch.tensor([0.4, 0.4 + math.pi], dtype=torch.float64), disk)[0]
    torch.testing.assert_close(back, there.conj().resolve_conj(), atol=1e-9, rtol=0)


def test_insertion_is_the_exact_adjoint(generator):
    disk, box = fourier_disk(16, 6.0), 16
    angles, which = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64), torch.tensor([1, 0, 1])
    like = torch.zeros((), dtype=torch.complex128)
    planes = Planes(torch.randn(2, empty_planes(1, box, 6.0, like).data.shape[1], dtype=like.dtype), box, 6.0)
    values = torch.randn(3, len(disk), dtype=like.dtype)
    read = turned(planes, angles, disk, which)
    put = insert_turned(empty_planes(2, box, 6.0, like), values, angles, which, disk)
    left, right = (read.conj() * values).sum(), (planes.data.conj() * put.data).sum()
    torch.testing.assert_close(left, right)


def test_gradients(generator):
    disk = fourier_disk(8, 3.0)
    picture = torch.randn(1, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    angle = torch.tensor([0.37, -1.2], dtype=torch.float64, requires_grad=True)

    def f(v: Tensor, a: Tensor) -> Tensor:
        return torch.view_as_real(turned(planes_of(v, 3.0), a, disk))

    assert torch.autograd.gradcheck(f, (picture, angle))


def test_arguments_are_left_alone(disk):
    like = torch.zeros((), dtype=torch.float64)
    sums = empty_planes(1, disk.box, disk.radius, like)
    insert_turned(sums, torch.ones(1, len(disk), dtype=torch.float64), torch.zeros(1), torch.zeros(1, dtype=int), disk)
    assert not sums.data.any()


def test_average_of_all_turns_is_the_picture(disk):
    picture = blobs(disk.box)
    angles = torch.arange(40, dtype=torch.float64) * math.pi / 40
    values = turned(planes_of(picture[None], disk.radius), angles, disk)[0]
    which = torch.zeros(40, dtype=torch.int64)
    numerator = insert_turned(empty_planes(1, disk.box, disk.radius, values), values, angles, which, disk)
    ones = torch.ones_like(values.real)
    weight = insert_turned(empty_planes(1, disk.box, disk.radius, ones), ones, angles, which, disk)
    found = averages(numerator, weight, torch.full((1, 1), 1e-3, dtype=torch.float64))[0]
    assert float((found - picture).norm() / picture.norm()) < 0.04
    smaller = resized_planes(resized_planes(numerator, 5.0), disk.radius)
    assert float((smaller.data - numerator.data).abs().max()) > 0
    torch.testing.assert_close(resized_planes(numerator, 5.0).data, resized_planes(smaller, 5.0).data)


def test_power_of_white_noise_is_flat(generator):
    noise = torch.randn(40, 32, 32, generator=generator)
    power = plane_power(planes_of(noise, 12.0), 12).mean(0)
    assert float((power[2:] / power[2:].mean() - 1).abs().max()) < 0.15
    assert 1.0 < float(power[2:].mean()) / 32**2 < 1.8  # pixels are divided by the kernel's window
