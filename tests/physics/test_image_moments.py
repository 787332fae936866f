"""Polar coefficients, and moments of images: what rotations, noise and CTF do to them."""

import math

import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups import so3
from cryorbit.physics.cryoem import form_images
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.image_moments import ImageMoments, ImageMomentSums, moments_of_slices, relative_errors
from cryorbit.physics.noise import coloured_spectrum, radial_noise
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.slicing import project
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom

BASIS = PolarBasis(24, 6, 11.0)


@pytest.fixture(scope="module")
def volume():
    return make_projector(phantom(), 24, 4.0).volume().data


def test_coefficients_are_those_of_the_transform_on_rings(volume):
    image = project(volume, torch.eye(3)[None])
    c = BASIS.coefficients(image)[0]
    axis = torch.arange(24).double() - 12
    for k, m in ((1, 0), (3, 2), (6, 5)):
        phi = 2 * math.pi * torch.arange(64).double() / 64
        wave = torch.exp(
            -2j * math.pi * k / 24 * (phi.cos()[:, None, None] * axis + phi.sin()[:, None, None] * axis[:, None])
        )
        inside = torch.hypot(axis[:, None], axis) <= 11
        ring = (wave * (image[0].double() * inside)).sum(dim=(1, 2))
        expected = (ring * torch.exp(-1j * m * phi)).mean()
        torch.testing.assert_close(
            c[m, k].to(torch.complex128), expected, rtol=1e-3, atol=1e-3 * float(ring.abs().max())
        )


def test_an_in_plane_turn_is_a_phase(volume, generator):
    rotation = so3.exp(torch.randn(1, 3, generator=generator))
    turn = so3.exp(torch.tensor([[0.0, 0.0, 0.8]]))
    before, after = (BASIS.coefficients(project(volume, r, 3))[0] for r in (rotation, turn @ rotation))
    m = torch.arange(BASIS.orders + 1)[:, None]
    off = [float((after - before * torch.exp(sign * 0.8j * m)).norm() / before.norm()) for sign in (1, -1)]
    assert min(off) < 0.01 < 0.1 < max(off)


@pytest.mark.parametrize("coloured", [False, True])
def test_noise_is_what_it_says(coloured, generator):
    spectrum = coloured_spectrum(24, 4.0) if coloured else torch.tensor([1.7])
    drawn = radial_noise(6000, 24, spectrum, generator)
    c = BASIS.coefficients(drawn).permute(1, 2, 0)
    found, expected = (c @ c.mH).to(torch.complex128) / 6000, BASIS.noise(spectrum)
    assert float((found - expected).norm() / expected.norm()) < 0.06


def test_moments_of_shifted_images_are_those_of_centred_ones_once_blur_is_undone(volume, generator):
    disk, sigma, directions = fourier_disk(24), 1.2, 30
    turns = 2 * math.pi * torch.rand(directions, 200, generator=generator)
    spin = torch.zeros(directions * 200, 3)
    spin[:, 2] = turns.flatten()
    library = so3.exp(torch.randn(directions, 3, generator=generator))
    images = project(volume, so3.exp(spin) @ library.repeat_interleave(200, dim=0))
    moves = sigma * torch.randn(len(images), 2, generator=generator)
    moved = disk_to_images(form_images(images_to_disk(images, disk), moves, disk, None), disk)
    basis = PolarBasis(24, 5, 12.0)
    still, seen = (ImageMomentSums.of(basis, x, 0.0).debiased(torch.ones(1)) for x in (images, moved))
    before, after = relative_errors(seen, still), relative_errors(seen.centred(sigma), still)
    assert all(float(b) > 0.03 for b in before)
    assert all(float(a) < 0.1 * float(b) for a, b in zip(after, before, strict=True))
    unchanged = relative_errors(still.centred(0.0), still)
    assert all(float(u) < 1e-6 for u in unchanged)


def simulated(volume, generator, count=4000):
    """Views from random directions around one axis, turned in plane at random."""
    tilt = 0.6 * torch.randn(count, 3, generator=generator)
    tilt[:, 2] = 2 * math.pi * torch.rand(count, generator=generator)
    spin = torch.zeros(count, 3)
    spin[:, 2] = 2 * math.pi * torch.rand(count, generator=generator)
    return project(volume, so3.exp(spin) @ so3.exp(tilt))


def test_moments_of_noisy_images_with_ctf_are_those_of_clean_ones_without(volume, generator):
    clean = simulated(volume, generator)
    coefficients = BASIS.coefficients(clean)
    exact = moments_of_slices(coefficients, torch.full((len(clean),), 1 / len(clean)), BASIS)
    exact = ImageMoments(exact.first.to(torch.complex128), exact.second.to(torch.complex128), BASIS)
    sd = 0.7 * float(clean.std())
    ctf = 1.2 * torch.rand(len(clean), BASIS.rings + 1, generator=generator) - 0.2
    strength = 0.5 + torch.rand(len(clean), generator=generator)
    noise = radial_noise(len(clean), 24, coloured_spectrum(24, 4.0), generator) * strength.sqrt()[:, None, None] * sd
    plain = ImageMomentSums.of(BASIS, clean + noise, strength * sd**2)
    assert max(map(float, relative_errors(plain.debiased(coloured_spectrum(24, 4.0)), exact))) < 0.05
    biased = plain.debiased(torch.zeros(1))
    assert float(relative_errors(biased, exact)[1]) > 2 * float(
        relative_errors(plain.debiased(coloured_spectrum(24, 4.0)), exact)[1]
    )

    # a CTF that is one number per ring acts on the coefficients themselves
    noisy = BASIS.coefficients(noise)
    met = coefficients * ctf[:, None] + noisy
    by_order = (met * ctf[:, None]).permute(1, 2, 0)
    square = ctf.square().double()
    sums = ImageMomentSums(
        BASIS,
        (ctf * met[:, 0]).sum(dim=0).to(torch.complex128),
        (by_order @ by_order.mH).to(torch.complex128),
        square.sum(dim=0),
        square.mT @ square,
        (ctf * (strength * sd**2)[:, None]).double().mT @ ctf.double(),
        len(clean),
    )
    assert max(map(float, relative_errors(sums.debiased(coloured_spectrum(24, 4.0)), exact))) < 0.08


def test_parts_add_up_and_unlike_ones_do_not(volume, generator):
    images = simulated(volume, generator, 60)
    whole = ImageMomentSums.of(BASIS, images, 0.0).debiased(torch.zeros(1))
    parts = ImageMomentSums.of(BASIS, images[:17], 0.0) + ImageMomentSums.of(BASIS, images[17:], 0.0)
    assert max(map(float, relative_errors(parts.debiased(torch.zeros(1)), whole))) < 1e-5
    with pytest.raises(DataError, match="DATA406"):
        parts + ImageMomentSums.of(PolarBasis(24, 5, 11.0), images, 0.0)
    blind = ImageMomentSums.of(BASIS, images, 0.0, torch.zeros(60, BASIS.rings + 1))
    with pytest.raises(DataError, match="DATA407"):
        blind.debiased(torch.zeros(1))


@pytest.mark.parametrize(("rings", "radius"), [(0, 11.0), (12, 11.0), (6, 13.0)])
def test_rings_and_circle_must_fit(rings, radius):
    with pytest.raises(ConfigError, match="CONF114"):
        PolarBasis(24, rings, radius)
