"""The 2-D engine on pictures whose angles are known, and what it says of images that show none."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cryorbit.groups.so2 import SO2
from cryorbit.methods.align2d import Align2D, Align2DConfig, invariant_features
from cryorbit.methods.class_averages import ClassAverages, ClassAveragesConfig
from cryorbit.metrics.fsc import frc, resolution
from cryorbit.physics.fourier import disk_to_images, fourier_disk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.turning import planes_of, turned
from cryorbit.poses.planar import refine_planar
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run

BOX, APIX, DIAMETER, COUNT = 32, 3.0, 80.0, 300
CONFIG = Align2DConfig(classes=2, batch=150, march_steps=12, settle_steps=3, radius_end=9.0)


def pictures() -> Tensor:
    """Two asymmetric molecules."""
    axis = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def blob(x0: float, y0: float, s: float) -> Tensor:
        return torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * s**2))

    first = blob(5, 0, 2.0) + blob(-4, 3, 1.5) + 0.8 * blob(-1, -5, 1.2) + 0.5 * blob(2, 6, 1.0)
    second = blob(0, 0, 2.5) + blob(7, 0, 1.3) + 0.9 * blob(-3, 6, 1.3)
    return torch.stack([first, second])


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    """Turned, shifted copies at an SNR of 0.3, the last tenth being noise alone."""
    g = torch.Generator().manual_seed(1)
    disk = fourier_disk(BOX)
    which = torch.arange(COUNT) % 2
    angles, shifts = SO2().random(COUNT, g), torch.randn(COUNT, 2, generator=g)
    clean = turned(planes_of(pictures(), disk.radius), angles, disk, which) * phase_ramp(shifts, disk)
    images = disk_to_images(clean, disk)
    images[-COUNT // 10 :] = 0.0
    images = images + float(images[: COUNT // 2].std()) / math.sqrt(0.3) * torch.randn(images.shape, generator=g)
    return {"images": images, "which": which, "angles": angles, "shifts": shifts}


def stack_of(images: Tensor) -> FourierStack:
    return FourierStack(ArrayParticles(images.numpy(), APIX), BOX / 2, mask_diameter=DIAMETER)


def relative_error(found: Tensor, truth: Tensor, which: Tensor, own: Tensor) -> Tensor:
    """Degrees between estimated and true angles of pairs of particles that share the class and the molecule."""
    errors = []
    for k in which.unique():
        for molecule in (0, 1):
            members = torch.nonzero((which == k) & (own == molecule))[:, 0]
            if len(members) < 2:
                continue
            i, j = torch.triu_indices(len(members), len(members), 1)
            apart = found[members][i] - found[members][j]
            errors.append(SO2().distance(apart, truth[members][i] - truth[members][j]))
    return torch.rad2deg(torch.cat(errors))


@pytest.fixture(scope="module")
def engine(data) -> Align2D:
    made = Align2D(stack_of(data["images"]), CONFIG, mask_diameter=DIAMETER, seed=0)
    run(made)
    return made


def test_turned_copies_are_aligned_and_sorted(data, engine):
    real = torch.arange(COUNT) < COUNT - COUNT // 10
    found = engine.assign(torch.arange(COUNT))
    right = (found.which == data["which"])[real].float().mean()
    assert max(right, 1 - right) > 0.97
    half = torch.arange(COUNT) // 2 % 2 + 1
    final = ClassAverages(
        engine.stack,
        ClassAveragesConfig(),
        classes=2,
        which=found.which,
        angles=found.angles,
        shifts_px=found.shifts,
        half_set=half,
        mask_diameter=DIAMETER,
    )
    run(final)
    error = relative_error(final.angles[real], data["angles"][real], final.which[real], data["which"][real])
    assert float(error.median()) < 3.0
    coarse = relative_error(found.angles[real], data["angles"][real], found.which[real], data["which"][real])
    assert float(error.median()) < float(coarse.median())  # continuous poses are better than the grid's
    reached = [resolution(curve, 0.143, BOX, APIX) for curve in final.correlation]
    assert max(reached) < 15.0


def test_noise_is_told_from_particles(data, engine):
    junk = engine.assign(torch.arange(COUNT)).junk
    real = torch.arange(COUNT) < COUNT - COUNT // 10
    assert float((junk[real][:, None] < junk[~real]).float().mean()) > 0.98


def test_features_are_of_the_view_not_of_pose_or_strength(data):
    """Six pictures between two molecules as references; those in between, turned, shifted, stronger, keep their place in the order."""
    disk, share = fourier_disk(BOX), torch.linspace(0, 1, 6)[:, None, None]
    six = (1 - share) * pictures()[0] + share * pictures()[1]
    config = replace(CONFIG, classes=6)
    still = Align2D(stack_of(data["images"]), config, mask_diameter=DIAMETER, seed=0)
    still.step(0)
    still.pictures, still.march, still.noise = six, torch.tensor(1.0), torch.ones_like(still.noise)
    between = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(8)
    angles, shifts = torch.linspace(0, 6, 24), torch.linspace(-2, 2, 24)
    mixed = six[0] + between[:, None, None] * (six[5] - six[0])
    shown = turned(planes_of(mixed, disk.radius), angles, disk, torch.arange(24))
    strength = 1 + torch.arange(24) % 3
    shown = shown * phase_ramp(torch.stack([shifts, -shifts.flip(0)], dim=1), disk) * strength[:, None]
    still.stack = stack_of(disk_to_images(shown, disk))
    features = still.assign(torch.arange(24)).features
    torch.testing.assert_close(features.norm(dim=1), torch.ones(24))
    torch.testing.assert_close(features.sum(dim=1), torch.zeros(24), atol=1e-5, rtol=0)
    own = features.view(3, 8, 6)
    within = (own - own.mean(dim=1, keepdim=True)).norm(dim=2).max()
    apart = torch.cdist(own.mean(dim=1), own.mean(dim=1)) + 9 * torch.eye(3)
    assert float(within) < 0.3 * float(apart.min())


def test_features_of_classes_that_all_match_alike_are_zero():
    assert not invariant_features(torch.full((2, 50), 1234.667)).any()
    assert not invariant_features(torch.rand(3, 1)).any()
    found = invariant_features(torch.tensor([[1.0, 2.0, 6.0]]))
    torch.testing.assert_close(found, torch.tensor([[-2.0, -1.0, 3.0]]) / math.sqrt(14))
    torch.testing.assert_close(invariant_features(torch.tensor([[2.0, 4.0, 12.0]])), found)


def test_an_image_of_nothing_is_junk(data, engine):
    shown = data["images"].clone()
    shown[:100] = 0.0
    half_blank = Align2D(stack_of(shown), CONFIG, mask_diameter=DIAMETER, seed=0)
    run(half_blank)
    assert float(half_blank.assign(torch.arange(100)).junk.min()) > 0


def test_half_averages_of_noise_do_not_agree():
    g = torch.Generator().manual_seed(4)
    stack = stack_of(torch.randn(400, BOX, BOX, generator=g))
    engine = Align2D(stack, CONFIG, mask_diameter=DIAMETER, seed=0)
    run(engine)
    found = engine.assign(torch.arange(400))
    final = ClassAverages(
        stack,
        ClassAveragesConfig(),
        classes=2,
        which=found.which,
        angles=found.angles,
        shifts_px=found.shifts,
        half_set=torch.arange(400) % 2 + 1,
        mask_diameter=DIAMETER,
    )
    run(final)
    # the halves' poses started from one reference, which may leave its mark up to its radius of 9 and nowhere else
    assert abs(float(final.correlation[:, 12:].mean())) < 0.1
    assert min(resolution(curve, 0.143, BOX, APIX) for curve in final.correlation) > DIAMETER / CONFIG.radius_end


def test_a_starved_class_takes_half_of_the_largest(data):
    engine = Align2D(stack_of(data["images"]), CONFIG, mask_diameter=DIAMETER, seed=0)
    for index in range(4):
        engine.step(index)
    engine.numerator.data[1] *= 1e-3
    engine.weight.data[1] *= 1e-3
    assert float(engine.shares()[1]) < 0.01
    engine._revive(engine.radius(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(engine.shares(), torch.full((2,), 0.5), atol=0.01, rtol=0)
    first, second = engine.pictures
    assert not torch.equal(first, second)
    assert float(frc(first, second)[1:4].min()) > 0.5


def test_continuous_poses_are_found_from_nearby(data):
    disk = fourier_disk(BOX, 12.0)
    planes = planes_of(pictures(), disk.radius)
    n = 40
    which, angles, shifts = data["which"][:n], data["angles"][:n], data["shifts"][:n]
    ctf = torch.ones(n, len(disk))
    images = turned(planes, angles, disk, which) * phase_ramp(shifts, disk)
    start = (angles + 0.1, shifts + torch.tensor([0.7, -0.5]))
    angle, shift = refine_planar(planes, which, images, ctf, disk.weight, *start, disk, iterations=8)
    assert float(torch.rad2deg(SO2().distance(angle, angles)).max()) < 0.1
    assert float((shift - shifts).abs().max()) < 0.02


def test_a_class_number_that_follows_the_particles():
    stack = stack_of(torch.randn(250, BOX, BOX, generator=torch.Generator().manual_seed(0)))
    assert Align2D(stack, Align2DConfig(), mask_diameter=DIAMETER, seed=0).classes == 2
