"""Defocus at a given pose: the short Fourier sum against the likelihood computed offset by offset."""

import math
from dataclasses import replace

import pytest
import torch

from cryorbit.physics.ctf import ctf_on_disk, ctf_phase, frequencies_of, wavelength
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.noise import log_likelihood
from cryorbit.poses.defocus import defocus_posterior
from cryorbit.types import CTFParams

BOX, PIXEL, RADIUS, REACH, SIGMA, NOISE = 48, 2.0, 20.0, 1500.0, 600.0, 3.0
TRUE = torch.tensor([-700.0, -120.0, 0.0, 250.0, 900.0], dtype=torch.float64)


@pytest.fixture
def posed(generator):
    """Astigmatic images at two voltages, whose defocus is off by ``TRUE``."""
    one = torch.ones(len(TRUE), dtype=torch.float64)
    voltage = torch.tensor([300.0, 200, 300, 200, 300], dtype=torch.float64)
    params = CTFParams(1.2e4 * one, 1e4 * one, 0.7 * one, 0.1 * one, voltage, 2.7 * one, 0.1 * one, 20 * one, 0.9 * one)
    disk = fourier_disk(BOX, RADIUS)

    def normal() -> torch.Tensor:
        return torch.view_as_complex(torch.randn(len(TRUE), len(disk), 2, generator=generator, dtype=torch.float64))

    model = normal()
    off = replace(params, defocus_u=params.defocus_u + TRUE, defocus_v=params.defocus_v + TRUE)
    return params, disk, model, ctf_on_disk(off, disk, PIXEL) * model + NOISE * normal()


def found(posed, **changed):
    params, disk, model, images = posed
    gamma, gain = ctf_phase(params, frequencies_of(disk, PIXEL, params.defocus_u))
    rate = math.pi * wavelength(params.voltage) / (BOX * PIXEL) ** 2
    precision = disk.weight.double() / (2 * NOISE**2)
    settings = {"reach": REACH, "sigma": SIGMA} | changed
    return defocus_posterior(images, model, gamma, gain, precision, rate, disk, **settings)


def test_posterior_is_that_of_the_likelihood(posed):
    params, disk, model, images = posed
    offsets = torch.linspace(-REACH, REACH, 3001, dtype=torch.float64)
    score = torch.stack(
        [
            log_likelihood(
                images,
                model
                * ctf_on_disk(
                    replace(params, defocus_u=params.defocus_u + d, defocus_v=params.defocus_v + d), disk, PIXEL
                ),
                2 * NOISE**2 / BOX**2,
                disk,
            )
            - 0.5 * (d / SIGMA) ** 2
            for d in offsets
        ],
        dim=1,
    )
    weight = score.softmax(dim=1)
    mean = weight @ offsets
    sd = (weight @ offsets.square() - mean.square()).sqrt()
    posterior = found(posed)
    torch.testing.assert_close(posterior.best, offsets[score.argmax(dim=1)], atol=3.0, rtol=0)
    torch.testing.assert_close(posterior.mean, mean, atol=2.0, rtol=0)
    torch.testing.assert_close(posterior.sd, sd, atol=2.0, rtol=0.05)
    assert float(((posterior.best - TRUE) / sd).abs().max()) < 4
    assert float(sd.max()) < 0.2 * SIGMA  # the images do decide


def test_prior_decides_where_images_do_not(posed):
    params, disk, model, images = posed
    blind = found((params, disk, 1e-6 * model, images))
    assert float(blind.mean.abs().max()) < 1
    torch.testing.assert_close(blind.sd, torch.full_like(blind.sd, SIGMA), rtol=0.05, atol=0)
    narrow = found(posed, sigma=5.0)
    assert float(narrow.best.abs().max()) < float(found(posed).best.abs().max())


def test_beyond_the_range_is_its_edge(posed):
    assert float(found(posed, reach=300.0).best.max()) == pytest.approx(300.0)
