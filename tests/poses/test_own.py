"""The posterior of images that are compared with pictures of their own: that of the shared grid, image by image."""

import math

import pytest
import torch
from torch import Tensor

from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.turning import planes_of, turned
from cryorbit.poses.grid import expectation, shift_grid
from cryorbit.poses.own import own_posterior

BOX, RADIUS = 16, 5.0


@pytest.fixture
def compared(generator) -> tuple[Tensor, ...]:
    """Images, CTFs, slices of a picture for each image, and a precision."""
    disk = fourier_disk(BOX, RADIUS)
    pictures = torch.randn(3, BOX, BOX, generator=generator)
    slices = turned(planes_of(pictures, RADIUS), torch.arange(8) * (math.pi / 8), disk)
    images = torch.complex(*(torch.randn(2, 3, len(disk), generator=generator)))
    ctf = torch.rand(3, len(disk), generator=generator) * 2 - 1
    return images, ctf, slices, disk.weight / (0.5 + torch.rand(len(disk), generator=generator))


def test_is_the_posterior_of_the_grid_for_each_image(compared):
    images, ctf, slices, precision = compared
    disk, shifts = fourier_disk(BOX, RADIUS), shift_grid(2.0, 1.0, 1.5)
    found = own_posterior(images, ctf, slices, precision, shifts, disk)
    power = torch.zeros(len(disk))
    for i in range(3):
        one = slice(i, i + 1)
        single = expectation(images[one], ctf[one], slices[i], precision, shifts, disk)
        torch.testing.assert_close(found.log_evidence[one], single.log_evidence, atol=1e-4, rtol=1e-4)
        shift, turn = divmod(int(found.scores[i].argmax()), 16)
        assert (turn, shift) == (int(single.best[0, 0]), int(single.best_shift[0, 0]))
        power += single.power
    torch.testing.assert_close(found.residual(images, ctf), power, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.chances().sum(dim=(1, 2)), torch.ones(3))


def test_evidence_is_differentiable_in_the_slices(compared):
    images, ctf, slices, precision = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in compared)
    disk, shifts = fourier_disk(BOX, RADIUS), shift_grid(1.0, 1.0, 1.0)
    own = slices[:, ::4].clone().requires_grad_()

    def evidence(s: Tensor) -> Tensor:
        return own_posterior(images, ctf, s, precision, shifts, disk).log_evidence

    assert torch.autograd.gradcheck(evidence, (own,), fast_mode=True)
