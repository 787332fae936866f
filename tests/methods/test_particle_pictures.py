"""Particles' own pictures, learnt from turned, shifted, noisy particles with CTF and nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.groups.so2 import SO2
from cryorbit.methods.particle_pictures import ParticlePictures, ParticlePicturesConfig
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import (
    crop_fourier,
    disk_to_images,
    fourier_disk,
    fourier_to_image,
    image_to_fourier,
    images_to_disk,
)
from cryorbit.physics.planar import rotate_images
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.turning import planes_of, turned
from cryorbit.simulate.settings import CTFSettings
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run

BOX, APIX, DIAMETER, COUNT, NOISE = 24, 4.0, 72.0, 200, 0.3
CONFIG = ParticlePicturesConfig(latent=4, periods=6.0, steps=150, batch=20, rate=1e-3)


def molecules() -> Tensor:
    """Two asymmetric ones."""
    axis = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def blob(x0: float, y0: float, s: float) -> Tensor:
        return torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * s**2))

    first = blob(4, 0, 1.8) + blob(-3, 2, 1.5) + 0.8 * blob(-1, -4, 1.4)
    second = blob(0, 0, 2.0) + blob(5, 0, 1.5) + 0.9 * blob(-2, 5, 1.5)
    return torch.stack([first, second])


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    """Copies at any angle, shifts of 1 px, CTFs, and noise of 0.3 where a molecule's pixels have a root mean square of 0.3."""
    g = torch.Generator().manual_seed(1)
    disk, which = fourier_disk(BOX), torch.arange(COUNT) % 2
    angles, shifts = SO2().random(COUNT, g), torch.randn(COUNT, 2, generator=g)
    params = CTFSettings().sample(COUNT, g)
    clean = turned(planes_of(molecules(), disk.radius), angles, disk, which) * phase_ramp(shifts, disk)
    images = disk_to_images(clean * ctf_on_disk(params, disk, APIX).float(), disk)
    images = images + NOISE * torch.randn(images.shape, generator=g)
    ctf = {name: value.double() for name, value in vars(params).items()}
    return {"images": images, "which": which, "angles": angles, "shifts": shifts} | ctf


def stack_of(data: dict[str, Tensor]) -> FourierStack:
    ctf = {k: v.numpy() for k, v in data.items() if k not in ("images", "which", "angles", "shifts")}
    return FourierStack(ArrayParticles(data["images"].numpy(), APIX, ctf), 8.0, mask_diameter=DIAMETER)


@pytest.fixture(scope="module")
def trained(data) -> ParticlePictures:
    method = ParticlePictures(stack_of(data), CONFIG, mask_diameter=DIAMETER)
    run(method)
    return method


def test_pictures_their_poses_and_the_noise(data, trained):
    seen = trained.canonical(torch.arange(COUNT))
    box, radius = trained.stack.box, trained.radius
    for molecule in (0, 1):
        rows = data["which"] == molecule
        turn = seen.angles[rows] - data["angles"][rows]
        offset = torch.atan2(turn.sin().sum(), turn.cos().sum())
        assert math.degrees(SO2().distance(turn, offset.expand_as(turn)).median()) < 10
        shift = seen.shifts[rows] * (trained.stack.pixel_size / APIX) - data["shifts"][rows]
        assert shift.norm(dim=1).median() < 0.85  # 1.18 at 0
        whole = image_to_fourier(rotate_images(molecules()[molecule][None], -offset[None]))
        truth = fourier_to_image(crop_fourier(whole, BOX, box), box)
        disk = fourier_disk(box, float(radius))
        one, two = (images_to_disk(x, disk)[0, 1:] for x in (truth, seen.pictures[rows].mean(0, keepdim=True)))
        assert float((one.conj() * two).real.sum() / (one.norm() * two.norm())) > 0.9
    away = torch.cdist(seen.features, seen.features).fill_diagonal_(math.inf)
    assert float((data["which"][away.argmin(1)] == data["which"]).double().mean()) > 0.85
    planted = (trained.stack.scale * BOX * NOISE) ** 2
    assert float(trained.noise[1 : radius + 1].mean()) == pytest.approx(planted, rel=0.1)
    assert float(seen.gain.mean()) > 10


def test_features_and_gain_do_not_change_with_the_turn(data, trained):
    """A quarter turn of an image and of its CTF's astigmatism axis."""
    turned_over = data | {
        "images": rotate_images(data["images"], torch.full((COUNT,), math.pi / 2)),
        "defocus_angle": data["defocus_angle"] + 90.0,
    }
    method = ParticlePictures(stack_of(turned_over), CONFIG, mask_diameter=DIAMETER)
    method.load_state(trained.state())
    some = torch.arange(20)
    before, after = trained.canonical(some), method.canonical(some)
    torch.testing.assert_close(after.gain, before.gain, atol=3.0, rtol=0)
    moved, apart = (after.features - before.features).norm(dim=1), torch.cdist(before.features, before.features)
    assert float(moved.median()) < 0.25 * float(apart[apart > 0].median())
    turn = after.angles - before.angles
    assert float(SO2().distance(turn, torch.full_like(turn, math.pi / 2)).median()) < 0.15


@pytest.mark.parametrize(
    "settings",
    [{"latent": 0}, {"periods": -1.0}, {"steps": 0}, {"rate": math.nan}, {"shift_range": 0.5}],
)
def test_settings_that_cannot_work_are_refused(data, settings):
    with pytest.raises(ConfigError, match=r"CONF43[56]"):
        ParticlePictures(stack_of(data), replace(CONFIG, **settings), mask_diameter=DIAMETER)


@pytest.mark.parametrize("diameter", [0.0, -5.0, math.nan, math.inf, 200.0])
def test_a_mask_that_is_no_particle_is_refused(data, diameter):
    stack = stack_of(data)
    with pytest.raises(ConfigError, match=r"CONF437.*expected .* to 96"):
        ParticlePictures(stack, CONFIG, mask_diameter=diameter)


@pytest.mark.parametrize("radius", [7.58, 8.53, 9.85])
def test_the_radius_stays_within_that_of_the_stack(data, radius):
    stack = FourierStack(ArrayParticles(data["images"].numpy(), APIX), radius, mask_diameter=DIAMETER)
    method = ParticlePictures(stack, replace(CONFIG, periods=radius * DIAMETER / (BOX * APIX)), mask_diameter=DIAMETER)
    assert method.radius == int(radius)
    method.step(0)
