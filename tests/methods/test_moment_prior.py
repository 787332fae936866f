"""The network that inverts moments: what its inputs and its loss do not see, learning, resume, a start for the inversion."""

import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.groups import so3
from cryorbit.methods.moment_fit import MomentFit, MomentsConfig, view_directions
from cryorbit.methods.moment_prior import MomentPrior, PriorConfig, random_densities, scaled_moments
from cryorbit.methods.moments import invert_from
from cryorbit.physics.image_moments import Blur, ImageMoments, moments_of_slices
from cryorbit.physics.polar import PolarBasis
from cryorbit.simulate.proteins import Proteins
from cryorbit.training.loop import Method, run
from cryorbit.volumes.ball import BallBasis
from cryorbit.volumes.ball_match import turned

POLAR = PolarBasis(20, 4, 9.0)
BASIS = BallBasis(20, 9.0, 5, 4)
QUICK = PriorConfig(molecules=24, steps=80, batch=16, rate=4e-3, width=64, blocks=1, heads=2)
FAMILY = Proteins(domains=(1, 2), residues=(30, 60))


def made(seed: int = 0, **changes: object) -> MomentPrior:
    return MomentPrior(BASIS, view_directions(1), 4, FAMILY, PriorConfig(**(vars(QUICK) | changes)), seed)


@pytest.fixture(scope="module")
def prior():
    return made()


def test_moments_are_those_of_the_inversion(prior, generator):
    density = random_densities(prior.directions, 3, generator)
    first, second = prior.moments(prior.molecules[:3], density)
    for i in range(3):
        one = moments_of_slices(prior.slices(prior.molecules[i]), density[i], POLAR)
        torch.testing.assert_close(first[i], one.first, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second[i], one.second, rtol=1e-3, atol=1e-5)


def test_inputs_see_neither_contrast_nor_hand_nor_frame(prior, generator):
    density = random_densities(prior.directions, 4, generator)
    maps = prior.molecules[:4]
    inputs = scaled_moments(*prior.moments(maps, density))
    contrast = scaled_moments(*prior.moments(7 * maps, density))
    torch.testing.assert_close(contrast, inputs, atol=1e-4, rtol=1e-3)
    mirrored = scaled_moments(*prior.moments(turned(BASIS, maps, torch.eye(3), True), density))
    torch.testing.assert_close(mirrored, inputs, atol=1e-4, rtol=1e-3)
    quarter = so3.exp(torch.tensor([0.0, 0.0, torch.pi / 2]))  # takes the HEALPix directions to themselves
    where = (prior.directions @ quarter @ prior.directions.mT).argmax(dim=0)  # of R d for each d
    moved = torch.zeros_like(density)
    moved[:, where] = density
    together = scaled_moments(*prior.moments(turned(BASIS, maps, quarter), moved))
    torch.testing.assert_close(together, inputs, atol=1e-4, rtol=1e-3)
    alone = scaled_moments(*prior.moments(turned(BASIS, maps, quarter), density))
    assert float((alone - inputs).abs().max()) > 0.01


def test_densities_are_densities_of_many_shapes(prior, generator):
    density = random_densities(prior.directions, 200, generator)
    torch.testing.assert_close(density.sum(dim=1), torch.ones(200), atol=1e-5, rtol=0)
    assert float(density.min()) >= 0
    peak = density.amax(dim=1) * len(prior.directions)
    assert float(peak.min()) < 2 < 8 < float(peak.max())


def test_training_learns_and_resumes(tmp_path, prior):
    assert isinstance(prior, Method)
    whole = made()
    found = [float(whole.step(i)["mismatch"]) for i in range(QUICK.steps)]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])

    class Stop(Exception):
        pass

    def stop(stage: str, step: int, total: int, values: dict[str, float | str]) -> None:
        if step == 10:
            raise Stop

    with pytest.raises(Stop):
        run(made(), checkpoint=tmp_path / "w", progress=stop, checkpoint_seconds=0.0)
    resumed = made()
    run(resumed, checkpoint=tmp_path / "w")
    for name, weight in resumed.state().items():
        torch.testing.assert_close(weight, whole.state()[name], rtol=1e-4, atol=1e-5)


def test_a_prediction_starts_the_inversion(prior, generator):
    first, second = prior.moments(prior.molecules[:1], random_densities(prior.directions, 1, generator))
    orders = POLAR.orders + 1
    blocks = torch.zeros(orders, 5, 5, dtype=torch.complex128)
    blocks[: second.shape[1]] = second[0]
    moments = ImageMoments(first[0].to(torch.complex128), blocks, POLAR)
    assert 0.2 < prior.strangeness(moments) < 3
    maps = prior.predict(moments)
    assert maps.shape == (2, len(BASIS))
    config = MomentsConfig(degree=4, margin=1, iterations=30)
    assert len(MomentFit(moments, config, 4).maps.start(generator)) == len(BASIS)
    found = invert_from(moments, config, maps[0])
    fit = MomentFit(moments, config, 4)
    assert found.objective < 0.5 * float(fit.objective(fit.scaled(maps[0]), fit.uniform))
    torch.testing.assert_close(invert_from(moments, config, 4 * maps[0]).volume, found.volume)
    for wrong in (maps[0, 1:], 0 * maps[0], float("nan") * maps[0]):
        with pytest.raises(ConfigError, match="CONF119"):
            invert_from(moments, config, wrong)
    with pytest.raises(ConfigError, match="CONF120"):
        prior.predict(moments.within(2))


def test_shifts_that_are_known_hardly_change_a_prediction(prior, generator):
    first, second = prior.moments(prior.molecules[:1], random_densities(prior.directions, 1, generator))
    blocks = torch.zeros(POLAR.orders + 1, 5, 5, dtype=torch.complex128)
    blocks[: second.shape[1]] = second[0]
    wide = PolarBasis(20, 4, 10.0)
    blur = Blur(POLAR, 0.7, outer=wide.orders)
    shifted = ImageMoments(
        *blur(first[0].to(torch.complex128), blocks), wide, shift_sigma_px=0.7, particle_radius_px=9.0
    )
    still = ImageMoments(first[0].to(torch.complex128), blocks, POLAR)
    unknown = ImageMoments(shifted.first, shifted.second[: POLAR.orders + 1], POLAR)
    expected = prior.predict(still)
    known, blurred = (float((prior.predict(m) - expected).norm() / expected.norm()) for m in (shifted, unknown))
    assert known < 0.05
    assert known < 0.2 * blurred


def test_weights_work_where_principal_axes_have_other_signs(tmp_path, prior, generator):
    _, scaled = prior.draw(generator)
    other = made()
    other.whitening = -other.whitening
    other.load_state(prior.state())
    torch.testing.assert_close(other._maps(scaled), prior._maps(scaled))


@pytest.mark.parametrize(
    "wrong",
    [{"molecules": 0}, {"heads": 0}, {"noise": 0.0}, {"blocks": -1}, {"molecules": 1}, {"emphasis": float("nan")}],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match="CONF117"):
        made(**wrong)
