"""Noise of optics groups made equal: how equal, what stays as it was, and what a map gains."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from cryorbit.metrics.fsc import crossing, fsc
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.fourier import FourierDisk, disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.noise import estimate_spectrum, radial_noise
from cryorbit.physics.slicing import insert_slices, volume_from_accumulator
from cryorbit.simulate.particles import CTFSettings, SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.equalise import background_window, pooled_groups

APIX, BOX, DIAMETER = 3.0, 32, 66.0
COUNT = 600


@pytest.fixture(scope="module")
def clean() -> SimulatedParticles:
    return simulate_particles(
        phantom(), count=COUNT, box=BOX, pixel_size=APIX, snr_db=None, ctf=CTFSettings(), fast=True, seed=3
    )


def two_spectra() -> Tensor:
    """(2, shells) variance per pixel: red and nearly white, equal nowhere."""
    shell = torch.arange(BOX)
    return torch.stack([0.5 + 4.0 / (1 + (shell / 4.0) ** 2), 0.3 + 0.02 * shell])


def noisy(clean: SimulatedParticles, group: Tensor, spectra: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty_like(clean.images)
    for number in range(len(spectra)):
        chosen = group == number
        noise[chosen] = radial_noise(int(chosen.sum()), BOX, spectra[number], generator)
    return clean.images + noise, noise


def make(
    images: Tensor, clean: SimulatedParticles, group: Tensor | None, diameter: float = DIAMETER, **options: object
) -> FourierStack:
    ctf = {f.name: getattr(clean.ctf, f.name).double().numpy() for f in fields(clean.ctf)}
    optics = None if group is None else group.numpy()
    particles = ArrayParticles(images.numpy(), APIX, ctf, optics)
    return FourierStack(particles, BOX / 2, mask_diameter=diameter, **options)


def spectrum_ratio(values: Tensor, group: Tensor, disk: FourierDisk) -> Tensor:
    """Noise of group 1 over group 0 in the shells an engine uses."""
    first, second = (estimate_spectrum(values[group == g], disk) for g in (0, 1))
    return (second / first)[1 : BOX // 2]


@pytest.mark.parametrize(("snr_db", "largest", "mean"), [(-20.0, 0.15, 0.04), (-10.0, 0.22, 0.06), (0.0, 0.65, 0.2)])
def test_noise_of_two_groups_becomes_equal_within_a_few_percent(
    clean: SimulatedParticles, snr_db: float, largest: float, mean: float
) -> None:
    """What signal the CTF spreads beyond the particle is taken for noise: that shows in the first shells at high SNR."""
    group = torch.arange(COUNT) % 3 // 2  # 400 and 200
    _, noise = noisy(clean, group, two_spectra())
    gain = (10 ** (snr_db / 10) * noise.var() / clean.images.var()).sqrt()
    stack = make(gain * clean.images + noise, clean, group)
    everyone = torch.arange(COUNT)
    transforms = images_to_disk(noise, stack.disk)
    before = spectrum_ratio(transforms, group, stack.disk)
    after = spectrum_ratio(transforms * stack.equalisation(everyone), group, stack.disk)
    assert float(before.min()) < 0.09
    assert float((after - 1).abs().max()) < largest
    assert float((after - 1).abs().mean()) < mean
    assert float((after[7:] - 1).abs().max()) < 0.06
    squared = stack.equalisation(everyone).square().mean(dim=0)
    torch.testing.assert_close(squared, torch.ones_like(squared), atol=1e-4, rtol=0)


def test_window_leaves_out_the_particle_but_never_the_corners() -> None:
    window = background_window(BOX, 11.0)
    assert float(window[BOX // 2, BOX // 2 + 11]) == 0.0
    assert float(window[BOX // 2, 0]) == 1.0
    assert float(window[BOX // 2, BOX // 2 + 12]) == pytest.approx(0.5 - 0.5 * np.cos(np.pi / 3.2), abs=1e-6)
    assert float(background_window(BOX, 1e6).square().mean()) > 0.1


def test_masked_images_are_measured_whole(clean: SimulatedParticles) -> None:
    group = torch.arange(COUNT) % 2
    _, noise = noisy(clean, group, two_spectra())
    axis = torch.arange(BOX) - BOX // 2
    masked = noise * (torch.hypot(axis[:, None].float(), axis.float()) < 11)
    stacks = make(noise, clean, group), make(masked, clean, group)
    of_noise, of_masked = (stack.equalisation(torch.arange(2)) for stack in stacks)
    keep = stacks[0].disk.shell > 0
    torch.testing.assert_close(of_masked[:, keep], of_noise[:, keep], atol=0, rtol=0.15)


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_one_group_is_left_bit_for_bit(clean: SimulatedParticles, memory_gib: float) -> None:
    chosen = torch.tensor([5, 0, 31])
    plain = make(clean.images, clean, None, memory_gib=memory_gib)
    for group in (torch.full((COUNT,), 7), torch.arange(COUNT) // 20):  # one group; many, each too small to measure
        stack = make(clean.images, clean, group, memory_gib=memory_gib)
        assert torch.equal(stack.images(chosen), plain.images(chosen))
        assert torch.equal(stack.ctf(chosen), plain.ctf(chosen))
        assert bool((stack.equalisation(chosen) == 1).all())


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_images_and_ctf_carry_the_same_factor(clean: SimulatedParticles, memory_gib: float) -> None:
    group = torch.arange(COUNT) % 2
    images, _ = noisy(clean, group, two_spectra())
    plain = make(images, clean, group, memory_gib=memory_gib, equalise=False)
    stack = make(images, clean, group, memory_gib=memory_gib)
    chosen = torch.tensor([9, 2, 599, 300])
    factor = stack.equalisation(chosen)
    assert float((factor - 1).abs().max()) > 0.3
    assert stack.scale == plain.scale
    torch.testing.assert_close(stack.images(chosen), plain.images(chosen) * factor)
    torch.testing.assert_close(stack.ctf(chosen), plain.ctf(chosen) * factor)


def test_particles_without_ctf_get_their_factor_as_ctf(clean: SimulatedParticles) -> None:
    group = torch.arange(COUNT) % 2
    images, _ = noisy(clean, group, two_spectra())
    stack = FourierStack(ArrayParticles(images.numpy(), APIX, None, group.numpy()), 10.0, mask_diameter=DIAMETER)
    assert stack.box < BOX
    chosen = torch.tensor([1, 4])
    assert torch.equal(stack.ctf(chosen), stack.equalisation(chosen))
    assert stack.ctf(chosen).shape == stack.images(chosen).shape


@pytest.mark.parametrize("radius", [8.0, BOX / 2])
def test_way_back_to_pixels(clean: SimulatedParticles, radius: float) -> None:
    """Images from a stack's Fourier pixels, cropped or not, are those on disk less background and what lies beyond the radius."""
    particles, some = ArrayParticles(clean.images.numpy(), APIX), torch.arange(3, 8)
    stack = FourierStack(particles, radius, mask_diameter=DIAMETER)
    raw = stack.raw(some)
    assert torch.equal(raw, clean.images[some])
    level = raw[:, stack.background].mean(dim=1)[:, None, None]
    disk = fourier_disk(BOX, radius)
    expected = disk_to_images(images_to_disk(raw - level, disk), disk)
    torch.testing.assert_close(stack.to_raw(stack.images(some)), expected, atol=1e-5, rtol=0)
    assert not stack.is_equalised


def test_small_groups_are_pooled() -> None:
    labels = torch.tensor([3] * 100 + [8] * 30 + [1] * 200 + [5] * 40)
    assert np.bincount(pooled_groups(labels).numpy()).tolist() == [200, 100, 70]
    labels = torch.tensor([3] * 100 + [8] * 30 + [1] * 200)
    assert np.bincount(pooled_groups(labels).numpy()).tolist() == [230, 100]
    assert pooled_groups(torch.arange(60)).tolist() == [0] * 60


def test_an_empty_group_is_not_taken_for_a_perfect_one(clean: SimulatedParticles) -> None:
    group = torch.arange(COUNT) % 2
    images, _ = noisy(clean, group, two_spectra())
    images[group == 1] = 0.0
    factor = make(images, clean, group).equalisation(torch.arange(2))
    assert bool(torch.isfinite(factor).all())
    assert float(factor[1].max() / factor[0].min()) < 31


def reconstruct(stack: FourierStack, clean: SimulatedParticles) -> Tensor:
    everyone = torch.arange(len(stack))
    images, ctf = stack.images(everyone) / stack.scale, stack.ctf(everyone)
    sums = insert_slices(images * ctf, ctf.square(), clean.poses.rotations, stack.disk)
    return volume_from_accumulator(sums, 0.02 * float(sums.weight.mean()))


def test_map_from_a_good_and_a_bad_group_is_better(clean: SimulatedParticles) -> None:
    group = torch.arange(COUNT) % 2
    images, _ = noisy(clean, group, 4.0 * torch.tensor([1.0, 9.0])[:, None].expand(2, BOX))
    mask = soft_sphere(BOX, 0.5 * DIAMETER / APIX)
    curves = [
        fsc(reconstruct(stack, clean) * mask, clean.volume.data * mask)
        for stack in (make(images, clean, group, equalise=False), make(images, clean, group))
    ]
    half = [crossing(curve, 0.5) for curve in curves]
    snr = [float((c.square() / (1 - c.square()))[4:9].mean()) for c in curves]
    assert half[1] > half[0] + 0.4
    assert snr[1] / snr[0] > 2.0  # 2.78 where white noise is all that is wrong


@pytest.mark.parametrize("grouped", [False, True])
def test_background_power_is_that_of_the_noise(clean: SimulatedParticles, grouped: bool) -> None:
    """In the units of ``images``, groups equalised; a faint signal leaves it as it is."""
    group = torch.arange(COUNT) % 2 if grouped else torch.zeros(COUNT, dtype=torch.int64)
    _, noise = noisy(clean, group, two_spectra()[: 1 + grouped])
    faint = (0.01 * noise.var() / clean.images.var()).sqrt()
    stack = make(faint * clean.images + noise, clean, group if grouped else None, diameter=50.0)
    alone = make(noise, clean, group if grouped else None, diameter=50.0)
    found = stack.background_power
    assert found is not None
    true = alone.power * (stack.scale / alone.scale) ** 2
    assert float((found / true - 1)[2:].abs().max()) < 0.15
    assert float((found / true - 1)[2:].mean().abs()) < 0.04
    assert float((stack.power / true)[2:5].mean()) > 1.03  # the signal is in the images


def test_masked_images_have_no_background(clean: SimulatedParticles) -> None:
    images = (clean.images + torch.randn_like(clean.images)) * soft_sphere(BOX, 0.5 * DIAMETER / APIX, 1.0)[BOX // 2]
    assert make(images, clean, None, diameter=60.0).background_power is None
