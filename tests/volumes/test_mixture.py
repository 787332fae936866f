"""Sums of Gaussians: their slices are those of their map, gradients are right."""

import torch

from cryorbit.groups import so3
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.slicing import project
from cryorbit.volumes.mixture import MixtureSlices, mixture_volume

POLAR = PolarBasis(32, 6, 15.0)


def some(generator, count=3):
    centres = 3.0 * torch.randn(3 * count, generator=generator, dtype=torch.float64)
    logarithms = 0.2 * torch.randn(2 * count, generator=generator, dtype=torch.float64)
    return torch.cat([centres.clamp(-5, 5), logarithms + torch.tensor([0.0, 0.6]).double().repeat_interleave(count)])


def test_slices_are_those_of_the_map(generator):
    parameters = some(generator)
    rotations = so3.random_rotations(20, generator).double()
    found = MixtureSlices(32, rotations, POLAR.rings, POLAR.orders)(parameters)
    images = project(mixture_volume(parameters, 32).float(), rotations.float(), 3)
    expected = POLAR.coefficients(images)
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-3


def test_gradient(generator):
    slices = MixtureSlices(32, so3.random_rotations(2, generator).double(), 3, 4)
    parameters = some(generator, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: torch.view_as_real(slices(p)), (parameters,))


def test_a_gaussian_has_the_integral_of_its_formula():
    parameters = torch.tensor([1.0, -2.0, 0.5, 0.3, 0.5], dtype=torch.float64)
    expected = torch.exp(parameters[3]) * (2 * torch.pi) ** 1.5 * torch.exp(3 * parameters[4])
    torch.testing.assert_close(mixture_volume(parameters, 32).sum(), expected)
    z, y, x = torch.nonzero(mixture_volume(parameters, 32) == mixture_volume(parameters, 32).max())[0].tolist()
    assert (x - 16, y - 16) == (1, -2)
    assert z - 16 in (0, 1)
