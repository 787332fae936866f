"""The ball basis: its functions, their transforms, and slices against projections of the map itself."""

import numpy as np
import pytest
import torch
from scipy.special import spherical_jn

from cryorbit.groups import so3
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.slicing import project
from cryorbit.volumes.ball import BallBasis, BallSlices, bessel_zeros, real_harmonics

BASIS = BallBasis(25, 11.0, 6, 6)


@pytest.mark.parametrize("degree", [0, 1, 5])
def test_zeros_are_all_zeros(degree):
    zeros = bessel_zeros(degree, 30.0)
    assert np.abs(spherical_jn(degree, zeros)).max() < 1e-10
    x = np.linspace(0.5, 30.0, 4000)
    assert (np.diff(np.sign(spherical_jn(degree, x))) != 0).sum() == len(zeros)


def test_harmonics_are_orthonormal():
    nodes, weights = np.polynomial.legendre.leggauss(12)
    azimuth = 2 * np.pi * np.arange(24) / 24
    z, phi = (x.ravel() for x in np.meshgrid(nodes, azimuth, indexing="ij"))
    points = np.stack([np.sqrt(1 - z**2) * np.cos(phi), np.sqrt(1 - z**2) * np.sin(phi), z], axis=1)
    values = real_harmonics(5, points)
    weight = np.repeat(weights, 24) * 2 * np.pi / 24
    np.testing.assert_allclose(values.T @ (weight[:, None] * values), np.eye(36), atol=1e-12)


def test_slices_are_those_of_the_map(generator):
    coefficients = torch.randn(len(BASIS), generator=generator, dtype=torch.float64)
    coefficients *= torch.exp(-0.2 * BASIS.layout[:, 0] ** 2)
    rotations = so3.exp(2 * torch.randn(5, 3, generator=generator, dtype=torch.float64))
    polar = PolarBasis(25, 6, 12.0)
    slices = BallSlices(BASIS, rotations, 6, polar.orders)(coefficients.float())
    measured = polar.coefficients(project(BASIS.volume(coefficients).float(), rotations.float(), 3))
    assert float((slices - measured).norm() / measured.norm()) < 0.02


def test_functions_have_unit_energy_and_end_with_the_ball():
    volume = BASIS.volume(torch.nn.functional.one_hot(torch.tensor(7), len(BASIS)).double())
    assert float(volume.square().sum()) == pytest.approx(1.0, abs=0.05)
    axis = torch.arange(25) - 12
    outside = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) >= 121
    assert float(volume[outside].abs().max()) == 0.0
