"""Simulated particles: the SNR is what was asked for, the images are what the truth says."""

import math

import numpy as np
import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import disk_to_images, images_to_disk
from cryorbit.physics.noise import estimate_spectrum
from cryorbit.physics.shift import phase_ramp
from cryorbit.simulate.orientations import Orientations
from cryorbit.simulate.particles import CTFSettings, make_projector, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.project_atoms import direct_sum
from cryorbit.simulate.settings import SimulationSettings
from cryorbit.types import Volume

SMALL = {"box": 32, "pixel_size": 3.0}


def test_clean_images_are_the_measurement_model() -> None:
    """CTF * shift * projection, each from its own formula, against the images without noise."""
    model = phantom()
    data = simulate_particles(
        model, count=5, snr_db=None, ctf=CTFSettings(astigmatism=900.0), shift_sigma_px=2.0, **SMALL
    )
    projector = make_projector(model, 32, 3.0)
    values = direct_sum(model, data.poses.rotations, projector.disk, 3.0).to(torch.complex64)
    values = values * phase_ramp(data.poses.shifts / 3.0, projector.disk) * ctf_on_disk(data.ctf, projector.disk, 3.0)
    images = disk_to_images(values, projector.disk)
    scale = (images * data.images).sum() / images.square().sum()
    assert float((scale * images - data.images).norm() / data.images.norm()) < 1e-4


def test_clean_images_have_unit_variance_without_noise() -> None:
    data = simulate_particles(phantom(), count=40, snr_db=None, **SMALL)
    variance = data.images.var(dim=(1, 2), correction=0).mean()
    assert float(variance) == pytest.approx(1.0, rel=1e-4)
    assert data.clean_variance == pytest.approx(1.0, rel=1e-4)
    assert data.noise_variance == 0
    assert data.snr == math.inf


@pytest.mark.parametrize("snr_db", [5.0, -10.0])
@pytest.mark.parametrize("noise", ["white", "coloured"])
def test_realised_snr(snr_db: float, noise: str) -> None:
    """Noise and signal measured apart, from the same draws with and without noise."""
    common = dict(count=200, ctf=CTFSettings(), shift_sigma_px=1.0, seed=3, **SMALL)
    noisy = simulate_particles(phantom(), snr_db=snr_db, noise=noise, **common)
    clean = simulate_particles(phantom(), snr_db=None, **common)
    signal = clean.images * math.sqrt(10 ** (snr_db / 10))
    residual = noisy.images - signal
    # 200 x 32^2 samples: standard error of a variance 0.3 %; the coloured spectrum has fewer effective samples
    assert float(residual.var()) == pytest.approx(1.0, abs=0.02)
    assert abs(float(residual.mean())) < 0.02
    measured = float(signal.var(dim=(1, 2), correction=0).mean() / residual.var())
    assert 10 * math.log10(measured) == pytest.approx(snr_db, abs=0.1)
    assert 10 * math.log10(noisy.snr) == pytest.approx(snr_db, abs=1e-3)


def test_coloured_noise_has_the_stated_spectrum() -> None:
    common = dict(count=400, seed=5, **SMALL)
    noisy = simulate_particles(phantom(), snr_db=0.0, noise="coloured", **common)
    clean = simulate_particles(phantom(), snr_db=None, **common)
    disk = make_projector(phantom(), 32, 3.0).disk
    spectrum = estimate_spectrum(images_to_disk(noisy.images - clean.images, disk), disk)
    expected = noisy.noise_spectrum[: len(spectrum)]
    assert float(expected[0] / expected[-1]) > 2.0
    torch.testing.assert_close(spectrum[1:], expected[1:], rtol=0.1, atol=0)


@pytest.mark.parametrize("dose", [0.2, 5.0])
def test_counts_have_the_stated_rate(dose: float) -> None:
    """Whole numbers whose mean and variance are the dose plus the clean image, at the SNR asked for."""
    common = dict(count=300, shift_sigma_px=1.0, seed=3, **SMALL)
    counted = simulate_particles(phantom(), snr_db=10 * math.log10(0.09 * dose), noise="poisson", dose=dose, **common)
    clean = simulate_particles(phantom(), snr_db=None, **common).images * 0.3 * dose
    assert torch.equal(counted.images, counted.images.round())
    assert float(counted.images.min()) == 0
    rate = dose + clean
    standard = (counted.images - rate) / rate.sqrt()
    assert abs(float(standard.mean())) < 0.01  # 300 x 32^2 samples
    assert float(standard.var()) == pytest.approx(1.0, abs=0.02)
    bright = clean > dose
    assert float(counted.images[bright].mean() / rate[bright].mean()) == pytest.approx(1.0, abs=0.03)
    assert counted.noise_variance == dose
    assert counted.noise_spectrum.unique().tolist() == pytest.approx([dose])
    assert counted.snr == pytest.approx(0.09 * dose, rel=1e-4)
    assert float(counted.volume.data.sum()) == pytest.approx(float(clean[0].sum()), rel=1e-3)


def test_a_contrast_that_leaves_no_electrons_is_refused() -> None:
    """With a CTF images are dark somewhere; ten times the dose at the same SNR is a third of the contrast."""
    common = dict(count=4, ctf=CTFSettings(), noise="poisson", snr_db=-6.0, **SMALL)
    with pytest.raises(ConfigError, match=r"CONF344: a pixel would have -.* electrons: at a dose of 0.5 and an SNR"):
        simulate_particles(phantom(), dose=0.5, **common)
    assert float(simulate_particles(phantom(), dose=50.0, **common).images.min()) >= 0


def test_images_are_projections_of_the_volume() -> None:
    data = simulate_particles(phantom(), count=8, snr_db=None, **SMALL)
    fast = simulate_particles(data.volume, count=8, snr_db=None, **SMALL)
    assert torch.equal(fast.poses.rotations, data.poses.rotations)
    assert float((fast.images - data.images).norm() / data.images.norm()) < 2e-3
    assert float(data.volume.data.sum()) == pytest.approx(float(data.images[0].sum()), rel=1e-3)


def test_fast_is_the_slices_of_the_exact_map() -> None:
    exact = simulate_particles(phantom(), count=8, snr_db=None, **SMALL)
    fast = simulate_particles(phantom(), count=8, snr_db=None, fast=True, **SMALL)
    assert 1e-6 < float((fast.images - exact.images).norm() / exact.images.norm()) < 2e-3


def test_a_seed_fixes_everything_and_another_changes_everything() -> None:
    first = simulate_particles(phantom(), count=70, seed=1, ctf=CTFSettings(), shift_sigma_px=1.0, **SMALL)
    again = simulate_particles(phantom(), count=70, seed=1, ctf=CTFSettings(), shift_sigma_px=1.0, **SMALL)
    other = simulate_particles(phantom(), count=70, seed=2, ctf=CTFSettings(), shift_sigma_px=1.0, **SMALL)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.ctf.defocus_u, again.ctf.defocus_u)
    assert abs(float(np.corrcoef(first.images.flatten(), other.images.flatten())[0, 1])) < 0.9
    assert not torch.equal(first.poses.rotations, other.poses.rotations)


def test_golden_draw_of_seed_zero() -> None:
    """Frozen numbers: a changed order of draws would silently change every simulated set."""
    data = simulate_particles(phantom(), count=3, seed=0, ctf=CTFSettings(), shift_sigma_px=1.0, **SMALL)
    assert data.poses.rotations[0, 0].tolist() == pytest.approx([0.161922, 0.465693, -0.870007], abs=1e-5)
    assert data.poses.shifts[2].tolist() == pytest.approx([2.446579, 1.249042], abs=1e-4)
    assert data.ctf.defocus_u.tolist() == pytest.approx([18059.033, 9139.192, 8833.024], abs=0.1)
    assert data.images[1, 16, 16].item() == pytest.approx(2.010036, abs=1e-3)


def test_shifts_have_the_stated_spread_in_angstrom() -> None:
    data = simulate_particles(phantom(), count=2000, box=16, pixel_size=6.0, shift_sigma_px=2.0)
    assert data.poses.shifts.std(dim=0).tolist() == pytest.approx([12.0, 12.0], rel=0.06)
    assert data.poses.shifts.mean(dim=0).abs().max() < 1.0


def test_defocus_and_astigmatism_are_in_range(generator: torch.Generator) -> None:
    params = CTFSettings(defocus=(9000.0, 11000.0), astigmatism=600.0, phase_shift=0.5).sample(2000, generator)
    mean = (params.defocus_u + params.defocus_v) / 2
    difference = params.defocus_u - params.defocus_v
    assert 9000 <= float(mean.min()) < 9050
    assert 10950 < float(mean.max()) <= 11000.01
    assert -0.01 <= float(difference.min())
    assert 580 < float(difference.max()) <= 600.01
    assert 0 <= float(params.defocus_angle.min())
    assert float(params.defocus_angle.max()) < math.pi
    assert params.phase_shift.unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"count": 0}, "CONF330"),
        ({"count": 10**20}, "CONF330"),
        ({"snr_db": math.inf}, "CONF331"),
        ({"snr_db": math.nan}, "CONF331"),
        ({"snr_db": 1e5}, "CONF331"),
        ({"snr_db": -1e5}, "CONF331"),
        ({"shift_sigma_px": -1.0}, "CONF332"),
        ({"shift_sigma_px": math.nan}, "CONF332"),
        ({"seed": -1}, "CONF334"),
        ({"noise": "poisson"}, "CONF340"),
        ({"dose": 1.0}, "CONF340"),
        ({"noise": "poisson", "dose": 1.0, "snr_db": None}, "CONF340"),
        ({"noise": "poisson", "dose": 0.0}, "CONF340"),
        ({"noise": "poisson", "dose": math.nan}, "CONF340"),
        ({"noise": "poisson", "dose": 1e9}, "CONF340"),
    ],
)
def test_settings_that_cannot_be_used(change: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SimulationSettings(**({"count": 1} | change))
    assert caught.value.code == code


def test_ctf_settings_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="empty"):
        CTFSettings(defocus=(2e4, 1e4))
    with pytest.raises(ConfigError, match="astigmatism"):
        CTFSettings(astigmatism=-1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(
    "field", ["astigmatism", "phase_shift", "voltage", "spherical_aberration", "amplitude_contrast", "bfactor"]
)
def test_ctf_settings_beyond_their_limits_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"CONF321: the (CTF )?{field.replace('_', ' ').replace('bf', 'B-f')} must"):
        CTFSettings(**{field: value})
    for defocus in ((0.0, value), (value, 0.0)):
        with pytest.raises(ConfigError, match="CONF320: the defocus must be from -200,000 to 200,000 A"):
            CTFSettings(defocus=defocus)


@pytest.mark.parametrize("snr_db", [-100.0, 100.0])
def test_the_least_and_the_largest_snr_are_met(snr_db: float) -> None:
    data = simulate_particles(phantom(), count=3, snr_db=snr_db, **SMALL)
    assert 10 * math.log10(data.snr) == pytest.approx(snr_db, abs=1e-3)
    assert bool(torch.isfinite(data.images).all())


def test_limits_that_need_the_box() -> None:
    with pytest.raises(ConfigError, match=r"CONF332: .* box of 32 px must be from 0 to 8 px"):
        simulate_particles(phantom(), count=1, shift_sigma_px=8.1, **SMALL)
    with pytest.raises(ConfigError, match="CONF335: the images overflow"):
        simulate_particles(Volume(1e30 * torch.rand(16, 16, 16), 2.0), count=2, box=16, pixel_size=2.0)


def test_a_map_that_memory_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryorbit.simulate.particles._memory", lambda: 1e6)
    with pytest.raises(ConfigError, match="CONF336: a map of 32 px takes about 0 GB"):
        make_projector(phantom(), 32, 3.0)


def test_broad_atoms_do_not_divide_zero_by_zero() -> None:
    """At 0.2 A per pixel the form factor of wide blobs underflows float64: the images must stay finite."""
    data = simulate_particles(phantom(radius=4.0, width=5.0), count=1, box=64, pixel_size=0.2, snr_db=None)
    assert bool(torch.isfinite(data.images).all())


def test_a_map_must_match_the_images() -> None:
    with pytest.raises(ConfigError, match="16 px"):
        make_projector(Volume(torch.ones(16, 16, 16), 2.0), 32, 2.0)
    with pytest.raises(ConfigError, match="no signal"):
        simulate_particles(Volume(torch.zeros(16, 16, 16), 2.0), count=2, box=16, pixel_size=2.0)
    for box, pixel_size in (
        (32, -1.0),
        (32, 0.0),
        (32, math.nan),
        (32, math.inf),
        (32, 1e30),
        (0, 3.0),
        (100_000, 3.0),
    ):
        with pytest.raises(ConfigError, match=r"CONF336: the (box|pixel size) must be from"):
            make_projector(phantom(), box, pixel_size)


class TestOrientations:
    """Densities of the view direction, the third row of A."""

    def views(self, orientations: Orientations, generator: torch.Generator) -> torch.Tensor:
        rotations = orientations.sample(4000, generator).double()
        eye = torch.eye(3).double().expand_as(rotations)
        torch.testing.assert_close(rotations @ rotations.mT, eye, atol=1e-5, rtol=0)
        assert float(torch.linalg.det(rotations).min()) > 0.99
        psi = torch.atan2(rotations[:, 1, 2], -rotations[:, 0, 2])  # RELION's psi
        assert abs(float(torch.polar(torch.ones_like(psi), psi).mean().abs())) < 0.05
        return rotations[:, 2]

    def test_uniform(self, generator: torch.Generator) -> None:
        views = self.views(Orientations(), generator)
        torch.testing.assert_close(views.T @ views / 4000, torch.eye(3).double() / 3, atol=0.02, rtol=0)
        assert float(views.mean(0).norm()) < 0.05

    def test_cone_of_paper_002(self, generator: torch.Generator) -> None:
        cosine = self.views(Orientations("cone"), generator)[:, 2]
        edge = math.cos(math.radians(15))
        assert float(cosine.min()) > edge - 1e-6
        assert float(cosine.mean()) == pytest.approx((1 + edge) / 2, abs=1e-3)  # uniform on the cap

    def test_von_mises_fisher(self, generator: torch.Generator) -> None:
        """One component: the mean resultant length is coth(kappa) - 1 / kappa."""
        kappa = 12.0
        views = self.views(Orientations("vmf", concentration=kappa, components=1), generator)
        assert float(views.mean(0).norm()) == pytest.approx(1 / math.tanh(kappa) - 1 / kappa, abs=5e-3)

    def test_mixture_has_its_components(self, generator: torch.Generator) -> None:
        views = self.views(Orientations("vmf", concentration=500.0, components=4), generator)
        centres = [views[0]]
        for v in views[1:]:
            if all(float(v @ c) < 0.9 for c in centres):
                centres.append(v)
        assert len(centres) == 4

    def test_preferred(self, generator: torch.Generator) -> None:
        """80 % within 15 degrees of one axis, the rest uniform (of which 1.7 % fall into the cone as well)."""
        views = self.views(Orientations("preferred", components=1), generator)
        axis = views.median(0).values
        inside = views @ (axis / axis.norm()) > math.cos(math.radians(17))
        assert float(inside.double().mean()) == pytest.approx(0.8 + 0.2 * 0.02, abs=0.03)

    @pytest.mark.parametrize(
        "change",
        [
            {"concentration": 0.0},
            {"concentration": math.inf},
            {"components": 0},
            {"components": 10**9},
            {"half_angle": 4.0},
            {"fraction": 1.5},
        ],
    )
    def test_bad_values(self, change: dict[str, float]) -> None:
        with pytest.raises(ConfigError):
            Orientations("vmf", **change)
