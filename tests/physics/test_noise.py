"""Noise drawn with the stated variance and spectrum, measured back; its log-likelihood against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from cryorbit.physics.fourier import fourier_disk, images_to_disk
from cryorbit.physics.noise import (
    coloured_spectrum,
    estimate_spectrum,
    log_likelihood,
    pixel_variance,
    radial_noise,
    shell_of_pixel,
    spectrum_on_disk,
    white_noise,
)


@pytest.mark.parametrize("box", [32, 33])
def test_white_noise_is_flat(generator: torch.Generator, box: int) -> None:
    images = white_noise(300, box, 2.5, generator)
    assert float(images.var()) == pytest.approx(2.5, rel=0.01)
    disk = fourier_disk(box)
    spectrum = estimate_spectrum(images_to_disk(images, disk), disk)
    torch.testing.assert_close(spectrum[1:], torch.full_like(spectrum[1:], 2.5), rtol=0.15, atol=0)
    assert float(spectrum[6:].mean()) == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("box", [32, 33])
def test_radial_noise_has_its_spectrum(generator: torch.Generator, box: int) -> None:
    spectrum = coloured_spectrum(box, 3.0)
    images = radial_noise(400, box, spectrum, generator)
    assert float(images.var()) == pytest.approx(1.0, rel=0.02)
    disk = fourier_disk(box)
    found = estimate_spectrum(images_to_disk(images, disk), disk)
    torch.testing.assert_close(found[1:], spectrum[1 : len(found)], rtol=0.15, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 40), st.floats(0.5, 5.0), st.floats(1.0, 80.0), st.floats(0.0, 3.0))
def test_coloured_spectrum_falls_and_has_unit_pixel_variance(box, pixel_size, corner, floor) -> None:
    spectrum = coloured_spectrum(box, pixel_size, corner, floor)
    assert bool((spectrum[1:] <= spectrum[:-1]).all())
    assert float(pixel_variance(spectrum, box)) == pytest.approx(1.0, rel=1e-5)
    assert len(spectrum) == int(shell_of_pixel(box).max()) + 1


def test_a_short_spectrum_goes_on_with_its_last_entry() -> None:
    disk = fourier_disk(16)
    on_disk = spectrum_on_disk(torch.tensor([3.0, 2.0]), disk)
    assert on_disk[disk.shell == 0].tolist() == [3.0]
    assert on_disk[disk.shell > 0].unique().tolist() == [2.0]


def test_a_generator_fixes_the_noise() -> None:
    draws = [white_noise(2, 8, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_log_likelihood_is_that_of_independent_normals(generator: torch.Generator) -> None:
    """Orthonormal coordinates: real and imaginary parts times sqrt(2) / D, the origin times 1 / D."""
    disk = fourier_disk(12)
    images, predicted = torch.randn(2, 4, len(disk), dtype=torch.complex128, generator=generator) * 10
    images[:, disk.weight == 1] = images[:, disk.weight == 1].real + 0j
    predicted[:, disk.weight == 1] = predicted[:, disk.weight == 1].real + 0j
    spectrum = torch.linspace(3.0, 1.0, 7, dtype=torch.float64)
    sigma = spectrum_on_disk(spectrum, disk).sqrt()
    residual = (images - predicted) * (disk.weight.double().sqrt() / 12)
    pair = disk.weight == 2
    expected = Normal(0.0, sigma).log_prob(residual.real).sum(-1)
    expected = expected + Normal(0.0, sigma[pair]).log_prob(residual.imag[:, pair]).sum(-1)
    found = log_likelihood(images, predicted, spectrum_on_disk(spectrum, disk), disk)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_log_likelihood_over_an_odd_box_nearly_counts_pixels(generator: torch.Generator) -> None:
    """White noise: the mean log-density per real coordinate is -(1 + log(2 pi v)) / 2."""
    disk = fourier_disk(31)
    images = images_to_disk(white_noise(200, 31, 1.7, generator), disk)
    found = log_likelihood(images, torch.zeros_like(images), 1.7, disk).mean() / disk.weight.sum()
    assert float(found) == pytest.approx(-0.5 * (1 + math.log(2 * math.pi * 1.7)), abs=0.01)


def test_likelihood_peaks_at_the_estimated_spectrum(generator: torch.Generator) -> None:
    disk = fourier_disk(16)
    images = images_to_disk(radial_noise(30, 16, coloured_spectrum(16, 4.0), generator).double(), disk)
    estimate = estimate_spectrum(images, disk)
    log_spectrum = estimate.log().requires_grad_()
    log_likelihood(images, torch.zeros_like(images), spectrum_on_disk(log_spectrum.exp(), disk), disk).sum().backward()
    assert float(log_spectrum.grad.abs().max()) < 1e-8


def test_gradients(generator: torch.Generator) -> None:
    disk = fourier_disk(6)

    def draw() -> torch.Tensor:
        return torch.randn(2, len(disk), dtype=torch.complex128, generator=generator).requires_grad_()

    images, predicted = draw(), draw()
    spectrum = torch.rand(3, dtype=torch.float64, generator=generator).add(0.5).requires_grad_()

    def likelihood(i: torch.Tensor, p: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return log_likelihood(i, p, spectrum_on_disk(s, disk), disk)

    assert torch.autograd.gradcheck(likelihood, (images, predicted, spectrum))
    assert torch.autograd.gradcheck(lambda x: estimate_spectrum(x, disk), images)
    assert torch.autograd.gradcheck(lambda s: pixel_variance(s, 8), spectrum)


def test_inputs_stay_as_they_are(generator: torch.Generator) -> None:
    disk = fourier_disk(8)
    images = torch.randn(2, len(disk), dtype=torch.complex64, generator=generator)
    before = images.clone()
    log_likelihood(images, torch.zeros_like(images), 1.0, disk)
    estimate_spectrum(images, disk)
    assert torch.equal(images, before)
