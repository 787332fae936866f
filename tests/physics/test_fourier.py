"""Centred transforms, the Fourier disk, and cropping."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cryorbit.physics import fourier as f
from cryorbit.physics.shift import phase_ramp

BOXES = [1, 2, 7, 8, 15, 16]


def _images(n: int, box: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, box, box, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _low_passed(box: int, seed: int = 0) -> torch.Tensor:
    """Real images that hold nothing outside the disk."""
    disk = f.fourier_disk(box)
    return f.disk_to_images(f.images_to_disk(_images(3, box, seed), disk), disk)


@pytest.mark.parametrize("box", BOXES)
def test_transform_is_the_centred_sum(box: int) -> None:
    """``F(k) = sum f(x) exp(-2 pi i k.(x - D // 2) / D)``, written as a sum."""
    image = _images(1, box)[0]
    x = torch.arange(box, dtype=torch.float64) - box // 2
    k = torch.cat([torch.arange(0, (box + 1) // 2), torch.arange(-(box // 2), 0)]).double()
    kernel = torch.exp(-2j * math.pi / box * k[:, None] * x)
    expected = (kernel @ image.to(torch.complex128) @ kernel.T)[:, : box // 2 + 1]
    torch.testing.assert_close(f.image_to_fourier(image), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("box", BOXES)
def test_round_trips(box: int) -> None:
    image, volume = _images(2, box), _images(box, box)
    torch.testing.assert_close(f.fourier_to_image(f.image_to_fourier(image), box), image, atol=1e-12, rtol=0)
    torch.testing.assert_close(f.fourier_to_volume(f.volume_to_fourier(volume), box), volume, atol=1e-12, rtol=0)


@pytest.mark.parametrize("box", [7, 8, 33])
@pytest.mark.parametrize("radius", [None, 2.5, 1000.0])
def test_disk_holds_one_of_each_friedel_pair(box: int, radius: float | None) -> None:
    disk = f.fourier_disk(box, radius)
    held = set(zip(disk.kx.tolist(), disk.ky.tolist(), strict=True))
    limit = min(box / 2, radius or box / 2)
    for ky in range(-box, box + 1):
        for kx in range(-box, box + 1):
            inside = kx**2 + ky**2 <= limit**2 and 4 * (kx**2 + ky**2) < box**2
            copies = ((kx, ky) in held) + ((-kx, -ky) in held)
            assert copies == ((2 if kx == ky == 0 else 1) if inside else 0)
    norms = [x * x + y * y for x in range(-box, box) for y in range(-box, box)]
    whole = sum(4 * norm < box**2 and norm <= limit**2 for norm in norms)
    assert float(disk.weight.sum()) == whole


@pytest.mark.parametrize("box", [7, 8])
def test_disk_round_trip_and_parseval(box: int) -> None:
    disk, images = f.fourier_disk(box), _low_passed(box)
    values = f.images_to_disk(images, disk)
    torch.testing.assert_close(f.disk_to_images(values, disk), images, atol=1e-12, rtol=0)
    power = (disk.weight * values.abs() ** 2).sum(-1) / box**2
    torch.testing.assert_close(power, images.square().sum(dim=(-2, -1)))


def test_white_noise_power_is_box_squared_times_variance() -> None:
    box, variance = 16, 2.5
    disk = f.fourier_disk(box)
    noise = math.sqrt(variance) * _images(4000, box, seed=3)
    power = f.images_to_disk(noise, disk).abs().square().mean(0)
    torch.testing.assert_close(power.mean(), torch.tensor(box**2 * variance, dtype=torch.float64), rtol=0.005, atol=0)
    assert float((power / (box**2 * variance) - 1).abs().max()) < 0.15


@pytest.mark.parametrize("box", [9, 10])
def test_subset_picks_the_inner_pixels(box: int) -> None:
    outer, inner = f.fourier_disk(box), f.fourier_disk(box, 2.5)
    index = f.disk_subset(outer, inner)
    torch.testing.assert_close(outer.kx[index], inner.kx)
    torch.testing.assert_close(outer.ky[index], inner.ky)


@pytest.mark.parametrize(("box", "new_box"), [(12, 8), (12, 7), (13, 8), (13, 7), (12, 12)])
def test_cropping_keeps_low_frequencies(box: int, new_box: int) -> None:
    image = _images(1, box)
    small = f.crop_fourier(f.image_to_fourier(image), box, new_box)
    assert small.shape == (1, new_box, new_box // 2 + 1)
    disk = f.fourier_disk(new_box)
    same = f.FourierDisk(box, disk.radius, disk.kx, disk.ky, disk.weight)
    torch.testing.assert_close(f.rfft_to_disk(small, disk), f.images_to_disk(image, same))


@pytest.mark.parametrize("box", [8, 9])
def test_shell_index_counts_every_voxel_once(box: int) -> None:
    shell = f.shell_index(box)
    assert shell.shape == (box, box, box // 2 + 1)
    assert int(shell[0, 0, 0]) == 0
    assert int(shell[1, 0, 0]) == int(shell[-1, 0, 0]) == int(shell[0, 0, 1]) == 1
    assert int(shell.max()) == round(math.sqrt(3) * (box // 2))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([7, 8]), st.tuples(*[st.floats(-6, 6)] * 4))
def test_shifts_add_and_undo(box: int, values: tuple[float, float, float, float]) -> None:
    disk = f.fourier_disk(box)
    a, b = torch.tensor(values, dtype=torch.float64).reshape(2, 1, 2)
    torch.testing.assert_close(phase_ramp(a, disk) * phase_ramp(b, disk), phase_ramp(a + b, disk), atol=1e-12, rtol=0)
    there_and_back = phase_ramp(a, disk) * phase_ramp(-a, disk)
    torch.testing.assert_close(there_and_back, torch.ones_like(there_and_back), atol=1e-12, rtol=0)


@pytest.mark.parametrize("box", [7, 8])
def test_whole_pixel_shift_is_a_roll(box: int) -> None:
    disk, images = f.fourier_disk(box), _low_passed(box)
    ramp = phase_ramp(torch.tensor([[2.0, -3.0]], dtype=torch.float64), disk)
    moved = f.disk_to_images(f.images_to_disk(images, disk) * ramp, disk)
    torch.testing.assert_close(moved, images.roll((-3, 2), dims=(-2, -1)), atol=1e-12, rtol=0)


def test_gradients() -> None:
    disk = f.fourier_disk(5)
    image = _images(1, 5).requires_grad_()
    shift = torch.tensor([[0.3, -0.7]], dtype=torch.float64, requires_grad=True)

    def through(i: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return f.disk_to_images(f.images_to_disk(i, disk) * phase_ramp(s, disk), disk)

    assert gradcheck(through, (image, shift))


def test_arguments_are_not_written_to() -> None:
    disk, image = f.fourier_disk(8), _images(1, 8)
    values = f.images_to_disk(image, disk)
    before = values.clone()
    f.disk_to_images(values, disk)
    torch.testing.assert_close(values, before, atol=0, rtol=0)
    torch.testing.assert_close(image, _images(1, 8), atol=0, rtol=0)
