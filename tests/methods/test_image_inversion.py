"""From images to a map without poses: moments measured, inverted, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups.so3 import random_rotations
from cryorbit.io.particles import open_particles
from cryorbit.methods.moment_fit import MomentFit, MomentsConfig, view_directions
from cryorbit.methods.moments import invert_from, invert_moments, march, marched, marched_rings
from cryorbit.methods.particle_moments import ParticleMoments
from cryorbit.metrics.map_search import align_volumes
from cryorbit.physics.fourier import fourier_to_volume, volume_to_fourier
from cryorbit.physics.image_moments import Blur, ImageMoments, ImageMomentSums, moments_of_slices, relative_errors
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.slicing import project
from cryorbit.physics.third_moments import Seen, ThirdFilters, ThirdSums
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.checkpoint import load_checkpoint, save_checkpoint
from cryorbit.training.dataset import ArrayParticles
from cryorbit.types import Volume
from cryorbit.volumes.ball import BallBasis
from cryorbit.volumes.mixture import MixtureSlices, mixture_volume

POLAR = PolarBasis(24, 5, 10.0)
QUICK = MomentsConfig(degree=6, starts=3, kept=1, iterations=60)


@pytest.fixture(scope="module")
def volume():
    return Volume(make_projector(phantom(), 24, 4.0).volume(), 4.0)


@pytest.fixture(scope="module")
def exact(volume):
    rotations = view_directions(2)
    weight = torch.softmax(2 * rotations[:, 2, 0] + rotations[:, 2, 1], dim=0)
    slices = POLAR.coefficients(project(volume.data, rotations.float(), 3))
    found = moments_of_slices(slices, weight.float(), POLAR)
    return ImageMoments(found.first.to(torch.complex128), found.second.to(torch.complex128), POLAR)


def test_a_map_comes_back_from_its_moments(exact, volume):
    longer = replace(QUICK, iterations=200)
    found = invert_moments(exact, longer, torch.Generator().manual_seed(0))
    assert max(found.errors) < 0.05
    assert float(found.density.sum()) == pytest.approx(1.0, abs=1e-5)
    aligned = align_volumes(Volume(found.volume.float(), 4.0), volume)
    # Two moments leave a valley: seeds end at 0.62 to 0.75, elsewhere on another processor. Noise of the same power stays far below.
    noise = volume_to_fourier(torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(1)))
    same_power = fourier_to_volume(volume_to_fourier(volume.data).abs() * noise / noise.abs(), 24)
    assert aligned.correlation > align_volumes(Volume(same_power, 4.0), volume).correlation + 0.2
    assert aligned.correlation > 0.55
    again = invert_moments(exact, longer, torch.Generator().manual_seed(0))
    assert torch.equal(found.volume, again.volume)


def test_objective_is_about_one_for_an_empty_map_and_has_the_right_gradient(exact, generator):
    fit = MomentFit(exact, QUICK, 4)
    a, logits = fit.maps.start(generator) * 0.1, fit.uniform
    assert float(fit.objective(0 * a, logits)) == pytest.approx(1.0, rel=1e-3)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(fit.objective(a, logits), a)
    step = torch.randn(len(a), generator=generator)
    step *= 1e-3 / step.norm()
    up, down = (fit.objective((a + s * step).detach(), logits) for s in (1, -1))
    assert float(gradient @ step) == pytest.approx(float(up - down) / 2, rel=0.05)


def test_particles_with_ctf_and_noise_have_the_moments_of_the_molecule(tmp_path, volume):
    settings = SimulationSettings(count=2000, seed=3, snr_db=0.0, ctf=CTFSettings((1e4, 3e4)))
    write_simulation(tmp_path / "set", make_projector(phantom(), 24, 4.0), settings)
    found = (
        ParticleMoments(open_particles(tmp_path / "set" / "particles.star"), 5, mask_diameter=80.0)
        .summed()
        .image_moments()
    )
    rotations = torch.from_numpy(open_particles(tmp_path / "set" / "truth.star").rotations)
    slices = POLAR.coefficients(project(volume.data, rotations.float(), 3))
    clean = moments_of_slices(slices, torch.full((2000,), 1 / 2000), POLAR)

    def in_one_unit(moments):
        """Without the origin, which the background's mean moves, and whatever the images' grey scale."""
        second = moments.second[: POLAR.orders + 1, 1:, 1:].to(torch.complex128)
        return ImageMoments(moments.first[1:].to(torch.complex128), second / second.norm(), POLAR)

    assert float(relative_errors(in_one_unit(found), in_one_unit(clean))[1]) < 0.15
    assert np.isfinite(found.power.numpy()).all()


def test_particles_shifted_by_a_known_sigma_have_the_moments_of_centred_ones(tmp_path):
    for sigma in (0.0, 1.0):
        settings = SimulationSettings(count=3000, seed=3, snr_db=20.0, shift_sigma_px=sigma)
        write_simulation(tmp_path / str(sigma), make_projector(phantom(), 24, 4.0), settings)
    still, moved = (open_particles(tmp_path / name / "particles.star") for name in ("0.0", "1.0"))
    found = ParticleMoments(still, 5, mask_diameter=64.0).summed().image_moments()

    def off(moments):
        """Of the second moment, each entry over the power of its rings."""
        scale = (found.power[1:, None] * found.power[1:]).sqrt()
        wrong = (moments.second - found.second)[:, 1:, 1:] / scale
        return float(wrong.norm() / (found.second[:, 1:, 1:] / scale).norm())

    blurred, restored = (
        ParticleMoments(moved, 5, mask_diameter=64.0, shift_sigma=s).summed().image_moments() for s in (0.0, 4.0)
    )
    assert restored.basis.radius > found.basis.radius  # shifted particles reach further
    assert restored.centred().basis == found.basis
    assert off(restored.centred()) < 0.5 * off(blurred)
    shifts = open_particles(tmp_path / "1.0" / "truth.star").shifts
    centred = ParticleMoments(moved, 5, mask_diameter=64.0, shifts=shifts).summed().image_moments()
    assert off(centred) < 0.1 * off(blurred)
    for wrong in (shifts[:9], shifts * math.nan):
        with pytest.raises(DataError, match="DATA429"):
            ParticleMoments(moved, 5, mask_diameter=64.0, shifts=wrong).summed().image_moments()
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="DATA416"):
            ParticleMoments(moved, 5, mask_diameter=64.0, shift_sigma=wrong).summed().image_moments()
        with pytest.raises(DataError, match="DATA416"):
            invert_moments(replace(restored, shift_sigma_px=wrong), QUICK, torch.Generator())
    with pytest.raises(DataError, match="DATA416"):
        replace(restored, shift_sigma_px=3.9).centred()  # of 5 rings little is left


@pytest.mark.parametrize("wrong", ["none", "not finite"])
def test_particles_without_moments_are_refused(wrong):
    images = torch.randn(4, 24, 24, generator=torch.Generator().manual_seed(0)).numpy()
    images[2, 3, 3] = np.nan
    particles = ArrayParticles(images[:0] if wrong == "none" else images, 4.0)
    with pytest.raises(DataError, match="DATA423" if wrong == "none" else "DATA419: image 3"):
        ParticleMoments(particles, 5, mask_diameter=64.0).summed().image_moments()


@pytest.mark.parametrize("wrong", ["first", "second", "variance", "power", "setting"])
def test_moments_that_are_not_finite_or_too_large_are_refused(exact, wrong):
    first, second = exact.first.clone(), exact.second.clone()
    variance = [torch.ones_like(x.real) for x in (first, second)]
    if wrong == "power":
        first, second = first * 1e9, second * 1e18
    elif wrong != "setting":
        {"first": first, "second": second[2, 1], "variance": variance[0]}[wrong][2] = math.nan
    config = replace(QUICK, tolerance=math.nan if wrong == "setting" else 0.01)
    error = ConfigError if wrong == "setting" else DataError
    with pytest.raises(error, match="CONF115" if wrong == "setting" else "DATA409"):
        invert_moments(ImageMoments(first, second, POLAR, tuple(variance)), config, torch.Generator())
    with pytest.raises(DataError, match="DATA422"):
        exact.within(7)


def test_a_fit_blurs_what_a_map_predicts_as_shifts_do(exact):
    """The true map's moments match those of shifted images where the fit knows of the shifts, and their circle."""
    wide = PolarBasis(24, 5, 12.0)
    blur = Blur(POLAR, 1.2, outer=wide.orders)
    shifted = ImageMoments(*blur(exact.first, exact.second), wide, shift_sigma_px=1.2, particle_radius_px=10.0)
    still, moved = (MomentFit(m, QUICK, 5) for m in (exact, shifted))
    found = still.minimised(still.scaled(still.maps.start(torch.Generator().manual_seed(0))), still.uniform, 100)
    assert moved.maps.polar == still.maps.polar
    errors = [max(fit.as_map(found).errors) for fit in (still, moved)]
    assert errors[1] < 1.2 * errors[0] < 0.1


def third_of(images, count, orders):
    """Of images with a little noise, without CTF; there is none where they all but vanish."""
    generator = torch.Generator().manual_seed(0)
    sigma = 0.3 * float(images.std())
    noisy = images + sigma * torch.randn(images.shape, generator=generator)
    filters = ThirdFilters.random(POLAR, count, orders, generator, noisy)
    return ThirdSums.of(filters, noisy, sigma**2).debiased(torch.ones(1))


def test_third_moments_on_other_rings_are_refused(exact):
    third = third_of(torch.randn(20, 24, 24, generator=torch.Generator().manual_seed(0)), 2, 3)
    start = MomentFit(exact, QUICK, 5).maps.start(torch.Generator().manual_seed(0))
    for moments in (exact.within(4), replace(exact, basis=PolarBasis(24, 5, 11.0))):
        with pytest.raises(DataError, match="DATA418"):
            invert_from(moments, QUICK, start, third)
    with pytest.raises(DataError, match="DATA418"):
        invert_moments(exact, replace(QUICK, rings=4), torch.Generator(), third)
    for wrong in ({"values": third.values * math.nan}, {"spread": 0 * third.spread}):
        with pytest.raises(DataError, match="DATA425"):
            invert_moments(exact, QUICK, torch.Generator(), replace(third, **wrong))


def test_entries_of_large_variance_count_less(exact, generator):
    """Every other ring's cross terms are noise: a fit that knows is nearer to the moments without noise than one that does not."""
    first, second = (torch.zeros_like(x.real) for x in (exact.first, exact.second))
    ring = torch.arange(6)
    crossed = (ring[:, None] - ring).abs() % 2 == 1
    second[:, crossed] = 4.0 * (exact.power[:, None] * exact.power)[crossed]
    noise = second.sqrt() * torch.randn(second.shape, generator=generator).tril()
    noisy = ImageMoments(exact.first, exact.second + noise + noise.mT, POLAR, (first, second))
    still, plain, weighed = (
        MomentFit(m, replace(QUICK, tolerance=t, positivity=0.0), 5)
        for m, t in ((exact, 0.0), (noisy, 0.0), (noisy, 0.01))
    )
    start = still.scaled(still.maps.start(torch.Generator().manual_seed(0)))
    found = [fit.minimised(start, fit.uniform, 150)[:2] for fit in (plain, weighed)]
    errors = [float(still.objective(*x)) for x in found]
    assert errors[1] < 0.1 * errors[0]
    with pytest.raises(DataError, match="DATA417"):
        MomentFit(exact, replace(QUICK, tolerance=0.01), 5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rings": 6},
        {"tolerance": -1.0},
        {"rings": 1},
        {"kept": 4},
        {"degree": 0},
        {"gaussians": -1},
        {"view_degree": -1},
        {"margin": 8},
        {"order": 6},
    ],
)
def test_settings_that_cannot_work_are_refused(exact, wrong):
    config = MomentsConfig(**({"starts": 3, "kept": 1} | wrong))
    with pytest.raises(ConfigError, match="CONF115"):
        invert_moments(exact, config, torch.Generator())


@pytest.mark.parametrize("gain", [0.0, float("nan"), -1.0])
def test_moments_without_a_signal_are_refused(exact, gain):
    with pytest.raises(DataError, match="DATA409"):
        invert_moments(ImageMoments(gain * exact.first, gain * exact.second, POLAR), QUICK, torch.Generator())


def test_third_moments_tell_maps_apart_that_two_moments_do_not(volume):
    rotations, config = view_directions(2), replace(QUICK, degree=6, margin=2, positivity=0.0, third=1.0)
    basis = BallBasis(24, 10.0, 7, 6)
    truth = basis.volume(basis.nearest(volume.data)).float()
    weight = torch.softmax(2 * rotations[:, 2, 0] + rotations[:, 2, 1], dim=0).float()
    images = project(truth, rotations.float(), 3)
    moments = moments_of_slices(POLAR.coefficients(images), weight, POLAR)
    third = third_of(images.repeat_interleave((20_000 * weight).round().int(), dim=0), 16, 8)
    fit, fewer = MomentFit(moments, config, 5, third), MomentFit(moments, config, 5)
    mirrored = torch.flip(truth, (0, 1, 2)).roll((1, 1, 1), (0, 1, 2))

    def scores(map_, views):
        a = basis.nearest(map_).float()
        two, three = (float(x.objective(a, views)) for x in (fewer, fit))
        return two, three - two

    right, other, negative = (scores(x, weight.log()) for x in (truth, mirrored, -truth))
    assert right == pytest.approx(other, rel=1e-3)  # no moment tells the hand when views are mirrored too
    longer = replace(config, starts=2, iterations=150)
    plain, found = (invert_moments(moments, longer, torch.Generator().manual_seed(0), x) for x in (None, third))
    left = [scores(x.volume, x.density.log().float())[1] for x in (plain, found)]
    assert plain.errors[1] < 1e-3  # two moments are content
    assert min(negative[1], left[0]) > 100 * right[1]
    assert left[1] < 0.5 * left[0]


def test_a_map_of_few_gaussians_comes_back_as_such():
    polar = PolarBasis(20, 5, 9.0)
    centres = torch.tensor([[4.0, 0, 0], [-2, 3, 0], [0, -2, 4]])
    truth = torch.cat([centres.flatten(), torch.tensor([0.0, 0.3, -0.2]), torch.full((3,), 0.5)])
    rotations = view_directions(2)
    weight = torch.softmax(2 * rotations[:, 2, 0] + rotations[:, 2, 1], dim=0).float()
    moments = moments_of_slices(MixtureSlices(20, rotations, 5, polar.orders)(truth), weight, polar)
    config = MomentsConfig(gaussians=4, view_degree=2, starts=8, kept=2, iterations=120)
    found = invert_moments(moments, config, torch.Generator().manual_seed(0))
    assert max(found.errors) < 1e-2
    assert float(found.volume.min()) >= 0
    aligned = align_volumes(Volume(found.volume.float(), 4.0), Volume(mixture_volume(truth, 20), 4.0))
    assert aligned.correlation > 0.95


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_third_moments_of_particles_are_those_of_the_molecule_through_ctf_and_shifts(tmp_path, volume, sigma):
    settings = SimulationSettings(count=4000, seed=3, snr_db=5.0, shift_sigma_px=sigma, ctf=CTFSettings((3e3, 1e4)))
    write_simulation(tmp_path / "set", make_projector(phantom(), 24, 4.0), settings)
    particles = open_particles(tmp_path / "set" / "particles.star")
    generator = torch.Generator().manual_seed(0)
    settings = {"mask_diameter": 80.0, "shift_sigma": 4 * sigma, "orders": 6, "generator": generator}
    sums = ParticleMoments(particles, 5, filters=8, **settings).summed()
    moments, found = sums.image_moments(), sums.third_moments()
    assert found is not None
    rotations = torch.from_numpy(open_particles(tmp_path / "set" / "truth.star").rotations)
    slices = POLAR.coefficients(project(volume.data, rotations.float(), 3))

    order = found.filters.pairs[:, 0]

    def unlike(sigma, gains):
        """Beside the right scale, entries over the root of their spread: of orders 0, and beyond."""
        expected = Seen(found.filters, gains, POLAR, sigma)(slices, torch.full((4000,), 1 / 4000))
        given, made = (x * found.spread.rsqrt() for x in (found.values, expected))
        along = torch.linalg.vecdot(made.flatten(), given.flatten()).real / made.norm() ** 2
        return [float((given - along * made)[:, x].norm() / given[:, x].norm()) for x in (order == 0, order > 0)]

    known = unlike(sigma, found.gains)
    assert known[0] < 0.1
    assert known[1] < 0.25
    assert min(unlike(sigma, torch.ones(1, 6))) > 0.9
    assert not sigma or all(5 * x > 4 * y for x, y in zip(unlike(0.0, found.gains), (0.3, 0.7), strict=True))
    quick = replace(QUICK, starts=1, iterations=15, gaussians=2)
    assert max(invert_moments(moments, quick, generator, found).errors) < 0.5


@pytest.mark.parametrize("wrong", ["defocus", "one", "filters"])
def test_particles_whose_third_moments_say_nothing_are_refused(wrong, generator):
    images = torch.randn(40, 24, 24, generator=generator)
    columns = None
    if wrong == "defocus":
        params = CTFSettings((1e4, 3e4)).sample(40, generator)
        columns = {name: value.double().numpy() for name, value in vars(params).items()}
        columns["defocus_u"][3] = math.nan
    filters = ThirdFilters.random(PolarBasis(24, 4, 8.0), 2, 2, generator, images) if wrong == "filters" else 4
    particles = ArrayParticles(images[: 1 if wrong == "one" else 40].numpy(), 4.0, ctf=columns)
    codes = {"defocus": "DATA427: the defocus_u of image 4", "one": "DATA426", "filters": "CONF124"}
    with pytest.raises((ConfigError, DataError), match=codes[wrong]):
        ParticleMoments(particles, 5, mask_diameter=64.0, filters=filters, generator=generator).summed().third_moments()


def test_an_objective_that_is_not_finite_is_refused(exact, generator):
    fit = MomentFit(exact, QUICK, 4)
    with pytest.raises(ConfigError, match="CONF125"):
        fit.minimised(1e30 * fit.maps.start(generator), fit.uniform, 5)


def test_a_small_particle_on_few_rings_has_a_map(generator):
    polar = PolarBasis(24, 4, 3.5)
    rotations = view_directions(1)
    slices = torch.randn(len(rotations), polar.orders + 1, 5, generator=generator).to(torch.complex64)
    moments = moments_of_slices(slices, torch.full((len(rotations),), 1 / len(rotations)), polar)
    found = invert_moments(moments, replace(QUICK, starts=1, iterations=3, order=1), generator)
    assert found.volume.isfinite().all()


@pytest.mark.parametrize("mask_diameter", [64.0, 88.0])
def test_noise_alone_has_no_moments_though_the_mean_of_its_background_is_taken_off(mask_diameter, generator):
    strength = 0.5 + torch.rand(8000, generator=generator)
    images = strength.sqrt()[:, None, None] * torch.randn(8000, 24, 24, generator=generator)
    particles = ArrayParticles((images + 3.0).numpy(), 4.0)
    settings = {"filters": 16, "orders": 6, "generator": generator, "errors": True}
    sums = ParticleMoments(particles, 5, mask_diameter=mask_diameter, **settings).summed()
    third = sums.third_moments()
    errors = third.values / (third.spread / len(images)).sqrt()
    first, second = third.filters.pairs.unbind(1)
    for group in (second == 0, (first == 0) & (second > 0), first > 0):
        assert 0.3 < float(errors[:, group].abs().square().mean().sqrt()) < 1.7
    if mask_diameter < 80.0:  # beyond, the corners say too little of the coarsest noise for second moments
        two = sums.image_moments()
        assert two.variance is not None
        seen = two.variance[1] > 1e-9 * two.variance[1].max()
        assert 0.5 < float((two.second.abs().square() / two.variance[1])[seen].mean().sqrt()) < 1.6


@pytest.mark.parametrize("errors", [False, True])
def test_a_pass_that_was_stopped_goes_on_where_it_was(tmp_path, errors, generator):
    images = torch.randn(2500, 16, 16, generator=generator)
    params = vars(CTFSettings((3e3, 1e4)).sample(2500, generator))
    particles = ArrayParticles(images.numpy(), 4.0, ctf={name: x.double().numpy() for name, x in params.items()})

    def made(rows=None):
        settings = {"filters": 3, "orders": 3, "shift_sigma": 2.0, "errors": errors, "rows": rows}
        return ParticleMoments(particles, 4, mask_diameter=40.0, generator=torch.Generator().manual_seed(1), **settings)

    whole, stopped, again = made(), made(), made()
    whole.summed()
    stopped.step(0)
    save_checkpoint(tmp_path / "sums.safetensors", stopped.state(), {})
    again.load_state(load_checkpoint(tmp_path / "sums.safetensors")[0])
    again.summed()
    parts = [made(rows).summed() for rows in torch.arange(2500).split([1000, 1500])]
    for name, value in whole.state().items():
        assert torch.equal(again.state()[name], value), name
    total = (parts[0] + parts[1]).state()
    assert all(
        torch.allclose(total[name], x, rtol=1e-4, atol=1e-4 * float(x.abs().max())) for name, x in whole.state().items()
    )
    assert (again.sums.image_moments().variance is not None) == errors
    with pytest.raises(DataError, match="DATA430"):
        parts[0] + replace(parts[1], shift_sigma_px=0.1)


def test_a_map_that_is_right_on_few_rings_is_followed_outwards(volume, generator):
    """From the truth without its outer rings, by third moments of images with noise, to what the truth itself is held to."""
    polar = PolarBasis(24, 7, 10.0)
    rotations = random_rotations(6000, generator).float()
    likely = torch.multinomial((2 * rotations[:, 2, 0] + rotations[:, 2, 1]).exp(), 6000, True, generator=generator)
    images = project(volume.data, rotations[likely], 2)
    sd = 0.5 * float(images.std())
    images = images + sd * torch.randn(images.shape, generator=generator)
    stops = marched_rings(4, 7)
    assert stops == [5, 6, 7]
    filters = ThirdFilters.random(polar, 24, 8, generator, images, reaches=stops)
    moments = ImageMomentSums.of(polar, images, sd**2).debiased(torch.ones(1))
    third = ThirdSums.of(filters, images, sd**2).debiased(torch.ones(1))
    config = replace(QUICK, degree=5, margin=2, positivity=0.0, view_degree=2, order=1, iterations=25)
    few = BallBasis(24, 10.0, 4, 5)
    start = few.volume(few.nearest(volume.data))
    found = march(moments, config, start, third, 4)
    last = marched(config, 4, 7)
    assert (last.degree, last.order) == (10, 2)
    held = BallBasis(24, 10.0, 9, last.degree)
    likeness = [
        float(torch.corrcoef(torch.stack([x.flatten().double(), volume.data.flatten().double()]))[0, 1])
        for x in (start, found.volume, held.volume(held.nearest(volume.data)))
    ]
    assert likeness[0] < likeness[1] - 0.5 * (likeness[2] - likeness[0])
    with pytest.raises(ConfigError, match="CONF126"):
        march(moments.within(4), config, start, third, 4)
