"""The likelihood of 'something with a particle's power': against a closed form and against its own samples."""

import torch

from cryorbit.metrics.junk import _STRENGTHS, incoherent_evidence, separation
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.noise import log_likelihood


def test_is_the_gaussian_likelihood_ratio(generator):
    disk = fourier_disk(8)
    n = len(disk)
    images = torch.randn(5, n, generator=generator, dtype=torch.complex64)
    ctf = torch.rand(5, n, generator=generator)
    noise, signal = torch.rand(n, generator=generator) + 0.5, torch.rand(n, generator=generator)
    zero = torch.zeros_like(images)

    def log_p(strength: float) -> torch.Tensor:
        variance = noise + strength * ctf.square() * signal
        return log_likelihood(images, zero, variance / disk.box**2, disk)

    expected = torch.logsumexp(torch.stack([log_p(g) - log_p(0.0) for g in _STRENGTHS]), 0) - torch.log(
        torch.tensor(float(len(_STRENGTHS)))
    )
    torch.testing.assert_close(incoherent_evidence(images, ctf, noise, signal, disk), expected, atol=1e-3, rtol=1e-4)


def test_power_beyond_the_noise_is_evidence(generator):
    disk = fourier_disk(32)
    noise, signal = torch.ones(len(disk)), torch.full((len(disk),), 0.5)
    image = torch.randn(50, len(disk), generator=generator, dtype=torch.complex64)
    ones = torch.ones(50, len(disk))
    quiet = incoherent_evidence(image, ones, noise, signal, disk)
    loud = incoherent_evidence(image * 1.5**0.5, ones, noise, signal, disk)
    assert float(quiet.max()) < 1.0
    assert float(loud.min()) > 1.0


def test_separation_counts_pairs():
    junk, good = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 2.0])
    # 3 beats both, 1 ties with one, 0 beats none
    assert separation(junk, good) == (2 + 0.5) / 6
