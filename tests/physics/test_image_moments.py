"""Polar coefficients, and moments of images: what rotations, noise and CTF do to them."""

import math
from dataclasses import replace

import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups import so3
from cryorbit.physics.cryoem import form_images
from cryorbit.physics.ctf import ctf, ctf_on_disk
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.image_moments import (
    Blur,
    ImageMoments,
    ImageMomentSums,
    moments_of_slices,
    relative_errors,
)
from cryorbit.physics.noise import coloured_spectrum, radial_noise
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.slicing import project
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings

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
    known = replace(seen, shift_sigma_px=sigma)
    before, after = relative_errors(seen, still), relative_errors(known.centred(), still)
    assert all(float(b) > 0.03 for b in before)
    assert all(float(a) < 0.1 * float(b) for a, b in zip(after, before, strict=True))
    assert all(float(u) < 1e-6 for u in relative_errors(still.centred(), still))
    blur = Blur(basis, sigma, outer=basis.orders)
    forward = relative_errors(ImageMoments(*blur(still.first, still.second), basis), seen)
    assert all(float(f) < 0.1 * float(b) for f, b in zip(forward, before, strict=True))


def test_blur_is_a_product_over_angles(generator):
    """Beside the moments as a function of two points of Fourier space, multiplied by what shifts leave there."""
    basis, sigma = PolarBasis(24, 3, 10.0), 1.5
    orders = basis.orders
    first = torch.randn(4, dtype=torch.complex128, generator=generator)
    c = torch.randn(6, orders + 1, 4, dtype=torch.complex128, generator=generator)
    by_order = c.permute(1, 2, 0)
    second = by_order @ by_order.mH
    second[0] = second[0].real.to(second)  # as of real images: order -m is the conjugate of order m
    blur = Blur(basis, sigma, outer=orders + 9)
    found_first, found = blur(first, second)

    def at(blocks, theta):
        m = torch.arange(1, len(blocks)).double()
        return (blocks[0] + 2 * torch.einsum("mkl,m->kl", blocks[1:], torch.exp(1j * m * theta))).real

    k = torch.arange(4).double()
    steep = 2 * (math.pi * sigma / 24) ** 2
    for theta in (0.0, 0.7, 2.9):
        apart = k[:, None] ** 2 + k**2 - 2 * k[:, None] * k * math.cos(theta)
        torch.testing.assert_close(
            at(found, theta), at(second, theta) * torch.exp(-steep * apart), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(found_first, first * torch.exp(-steep * k**2))


@pytest.mark.parametrize("with_ctf", [False, True])
def test_variance_is_the_spread_of_estimates_over_data_sets(volume, with_ctf, generator):
    """Of data sets that draw images, CTFs, noise and its strength anew; on average, and on the rings where CTFs differ most."""
    clean, disk, spectrum = simulated(volume, generator, 300), fourier_disk(24), coloured_spectrum(24, 4.0)
    sd, found = 1.5 * float(clean.std()), []
    for _ in range(200):
        images, rings = clean[torch.randint(300, (300,), generator=generator)], None
        if with_ctf:
            params = CTFSettings((1e4, 3e4)).sample(300, generator)
            moved = form_images(images_to_disk(images, disk), torch.zeros(300, 2), disk, ctf_on_disk(params, disk, 4.0))
            radius = torch.arange(BASIS.rings + 1) / (24 * 4.0)
            images, rings = disk_to_images(moved, disk), ctf(params, torch.stack([radius, 0 * radius], dim=1))
        strength = sd**2 * (0.5 + torch.rand(300, generator=generator))
        noise = radial_noise(300, 24, spectrum, generator) * strength.sqrt()[:, None, None]
        found.append(ImageMomentSums.of(BASIS, images + noise, strength, rings, errors=True).debiased(spectrum))
    for which, name in enumerate(("first", "second")):
        estimates = torch.stack([getattr(one, name) for one in found])
        spread = (estimates - estimates.mean(dim=0)).abs().square().mean(dim=0)
        said = torch.stack([one.variance[which] for one in found]).mean(dim=0)
        seen = spread > 1e-9 * spread.max()  # others hold rounding, or nothing
        ratio = (said / spread)[seen]
        assert 0.85 < float(ratio.median()) < 1.15
        assert 0.55 < float(ratio.min()) < float(ratio.max()) < 1.7
        assert float(said[~seen].sum()) < 1e-6 * float(said.max())


def test_variances_of_parts_add_up_and_go_with_their_rings(volume, generator):
    images = simulated(volume, generator, 80)
    rings = torch.rand(80, BASIS.rings + 1, generator=generator) - 0.3
    strength = torch.rand(80, generator=generator)
    parts = [
        ImageMomentSums.of(BASIS, images[i], strength[i], rings[i], errors=True) for i in (slice(0, 30), slice(30, 80))
    ]
    whole = ImageMomentSums.of(BASIS, images, strength, rings, errors=True).debiased(torch.ones(1))
    added = (parts[0] + parts[1]).debiased(torch.ones(1))
    for a, b in zip(whole.variance, added.variance, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.max()))
    without = ImageMomentSums.of(BASIS, images[:30], strength[:30], rings[:30])
    assert (parts[1] + without).debiased(torch.ones(1)).variance is None
    inner = whole.within(4)
    assert torch.equal(inner.variance[0], whole.variance[0][:5])
    assert torch.equal(inner.variance[1], whole.variance[1][: len(inner.second), :5, :5])


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
    rings = 1.2 * torch.rand(len(clean), BASIS.rings + 1, generator=generator) - 0.2
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
    met = coefficients * rings[:, None] + noisy
    by_order = (met * rings[:, None]).permute(1, 2, 0)
    square = rings.square().double()
    sums = ImageMomentSums(
        BASIS,
        (rings * met[:, 0]).sum(dim=0).to(torch.complex128),
        (by_order @ by_order.mH).to(torch.complex128),
        square.sum(dim=0),
        square.mT @ square,
        (rings * (strength * sd**2)[:, None]).double().mT @ rings.double(),
        None,
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
