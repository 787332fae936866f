"""Rotation-invariant features: the losses of papers/004 by hand, the schedule, and learning on a small set."""

import math

import pytest
import torch
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.methods.invariant import PRESETS, Invariant, InvariantConfig, angle_loss, reconstruction_loss
from cryorbit.methods.spatial_vae import SpatialVAE, SpatialVAEConfig
from cryorbit.metrics.pictures import angle_errors, picture_errors
from cryorbit.physics.planar import rotate_images
from cryorbit.simulate.pictures import TurnedPictures, inside_disc, side_views
from cryorbit.simulate.source import open_source
from cryorbit.training.loop import run

SIDE = 16


def bars(count: int, seed: int = 0) -> Tensor:
    """Pointers of varying length and width along x, blunt at one end."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIDE, dtype=torch.float32) - SIDE // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    length, width = 3 + 2 * torch.rand(count, 1, 1, generator=g), 0.9 + 0.6 * torch.rand(count, 1, 1, generator=g)
    shaft = torch.exp(-(y**2) / (2 * width**2)) * torch.sigmoid(2 * (length - x.abs()))
    head = torch.exp(-((x - length) ** 2 + y**2) / 5)
    return inside_disc((0.6 * shaft + head).clamp(max=1.0))


def test_losses_are_the_papers():
    zero, one = torch.zeros(2), torch.tensor([0.5, -0.5])
    assert float(angle_loss(one, zero, "scalar")) == pytest.approx(math.exp(0.5) - 1)
    assert float(angle_loss(torch.full((1,), 50.0), torch.zeros(1), "scalar")) == pytest.approx(math.exp(6) - 1)
    assert float(angle_loss(torch.tensor([math.pi]), torch.tensor([-math.pi]), "circle")) == pytest.approx(0, abs=1e-6)
    assert float(angle_loss(torch.tensor([math.pi]), torch.tensor([-math.pi]), "scalar")) > 100  # eq. 1 knows no circle
    apart = torch.zeros(1, 2, 2)
    apart[0] = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert float(reconstruction_loss(apart, torch.zeros(1, 2, 2))) == pytest.approx(5 + 7)


def test_preset_is_the_papers():
    c = PRESETS["paper004"]
    assert (c.epochs, c.drop_epoch, c.rate, c.weight_decay) == (300, 200, 1e-4, 1e-5)
    assert (c.angle, c.critic, c.critic_every, c.supervised) == ("scalar", 1.0, 4, True)


def test_critic_every_fourth_step_and_rate_dropped():
    method = Invariant(TurnedPictures(bars(8)), InvariantConfig(critic=1.0, batch=4, epochs=6, drop_epoch=4, rate=1e-3))
    with_critic = ["critic_gap" in method.step(i) for i in range(method.total_steps())]
    assert with_critic == [i % 4 == 0 for i in range(12)]
    assert method.optimiser.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("angle", "epochs", "left"), [("directed", 10, 0.03), ("fitted", 10, 0.3), ("circle", 20, 0.3)]
)
def test_learns_angles_and_canonical_pictures(angle, epochs, left):
    train, test = TurnedPictures(bars(128), noise=0.05), TurnedPictures(bars(64, 1), noise=0.05)
    method = Invariant(
        train, InvariantConfig(angle=angle, epochs=epochs, batch=16, drop_epoch=3 * epochs // 4, latent=8)
    )
    run(method)
    shown, truth, angles = test.draw(torch.arange(64), torch.Generator().manual_seed(5))
    made, found = method.canonical(shown)
    assert angle_errors(found, angles)["median_deg"] < (1 if angle != "circle" else 10)
    assert picture_errors(made, truth)["pixel_mean"] < left * picture_errors(shown, truth)["pixel_mean"]


def test_pictures_that_may_be_either_way_up_are_met_half_way():
    """Pointers to the right or to the left, at uniform angles: which of the two nobody can know, and a guess would be all wrong for half."""
    pointers = bars(128)
    pointers[::2] = pointers[::2].flip(1, 2).roll((1, 1), (1, 2))
    train, test = TurnedPictures(pointers), TurnedPictures(pointers[:64])
    method = Invariant(train, InvariantConfig(epochs=10, batch=16, drop_epoch=8, latent=8))
    run(method)
    shown, truth, _ = test.draw(torch.arange(64), torch.Generator().manual_seed(5))
    made, _ = method.canonical(shown)
    other = picture_errors(truth.flip(1, 2).roll((1, 1), (1, 2)), truth)
    errors = picture_errors(made, truth)
    assert errors["sse_worst"] < 0.5 * other["sse_worst"]
    assert errors["sse_mean"] == pytest.approx(0.25 * other["sse_mean"], rel=0.2)


def test_learns_angles_without_a_truth():
    train, test = TurnedPictures(bars(128), noise=0.05), TurnedPictures(bars(64, 1), noise=0.05)
    method = Invariant(
        train, InvariantConfig(epochs=10, batch=16, drop_epoch=8, latent=8, angle="fitted", supervised=False)
    )
    run(method)
    shown, truth, angles = test.draw(torch.arange(64), torch.Generator().manual_seed(5))
    made, found = method.canonical(shown)
    errors = angle_errors(found, angles, free=True)
    assert errors["median_deg"] < 1
    framed = rotate_images(made, torch.full((64,), errors["offset"]))
    assert picture_errors(framed, truth)["pixel_mean"] < 0.3 * picture_errors(shown, truth)["pixel_mean"]
    assert float(method.variance) < 0.2 * float(
        train.pictures.square().mean()
    )  # what is left goes to the noise's, 0.0025


def test_features_do_not_change_with_the_turn(generator):
    method = Invariant(TurnedPictures(bars(8)), InvariantConfig(angle="fitted", latent=8), seed=1)
    polar = torch.rand(4, method.grid.rings, method.grid.angles, generator=generator)
    with torch.no_grad():
        still = method.encoder(polar)
        for turn in (1, 7, 32):
            torch.testing.assert_close(method.encoder(polar.roll(turn, dims=-1)), still, atol=1e-5, rtol=1e-5)
        assert float((method.encoder(polar.flip(-1)) - still).abs().max()) > 1e-3  # a mirror is another picture
        pictures = bars(8)
        quarter = rotate_images(pictures, torch.full((8,), math.pi / 2))
        torch.testing.assert_close(method.features(quarter), method.features(pictures), atol=1e-4, rtol=1e-4)


def test_where_to_begin_turns_with_the_picture_and_what_is_read_does_not(generator):
    method = Invariant(TurnedPictures(bars(8)), InvariantConfig(latent=8), seed=1)
    polar = torch.rand(4, method.grid.rings, method.grid.angles, generator=generator)
    begin = torch.tensor([0, 5, 31, 60])
    with torch.no_grad():
        z, chance = method.encoder(polar, method.prior, begin)
        torch.testing.assert_close(chance.exp().sum(1), torch.ones(4))
        for turn in (1, 7, 32):
            turned, moved = method.encoder(polar.roll(turn, dims=-1), method.prior, (begin + turn) % 64)
            torch.testing.assert_close(turned, z, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(moved, chance.roll(turn, dims=-1), atol=1e-5, rtol=1e-5)
        assert float((method.encoder(polar, method.prior, begin + 3)[0] - z).abs().max()) > 1e-4
        prior = torch.log_softmax(
            10.0 * (torch.arange(64) == 9), dim=0
        )  # read from where the prior says, if scores say little
        torch.testing.assert_close(
            method.encoder(polar, prior)[0], method.encoder(polar, prior, torch.full((4,), 9))[0], atol=1e-6, rtol=0
        )


def test_prior_of_the_angles_decides_where_the_picture_does_not():
    """A bar that looks the same upside down, shown near 0: half a turn away only the prior speaks against."""
    bar = bars(1)
    even = (bar + bar.flip(1, 2).roll((1, 1), (1, 2))) / 2
    method = Invariant(TurnedPictures(even.expand(8, -1, -1), spread=0.5), InvariantConfig(latent=8))
    with torch.no_grad():
        chance = method._encode(even)[1][0]
        assert float(chance[0] - chance[32]) == pytest.approx(0.5 * (math.pi / 0.5) ** 2, abs=0.05)


def test_spatial_vae_turns_coordinates_as_pictures_are_turned():
    method = SpatialVAE(TurnedPictures(bars(4)), SpatialVAEConfig())
    with torch.no_grad():
        z = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))

        def shown(angle: float, x: float) -> Tensor:
            shift = torch.tensor([[x, 0.0]])
            return method.decoder(method._moved(torch.tensor([angle]), shift), z).view(1, SIDE, SIDE)

        still = shown(0.0, 0.0)
        quarter = rotate_images(still, torch.tensor([math.pi / 2]))
        torch.testing.assert_close(shown(math.pi / 2, 0.0)[:, 1:, 1:], quarter[:, 1:, 1:], atol=1e-4, rtol=0)
        torch.testing.assert_close(shown(0.0, 2 / SIDE)[:, :, 1:], still[:, :, :-1], atol=1e-5, rtol=0)


def test_spatial_vae_lowers_its_loss():
    method = SpatialVAE(TurnedPictures(bars(64)), SpatialVAEConfig(epochs=10, batch=32))
    losses = [float(method.step(i)["loss"]) for i in range(method.total_steps())]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_side_views_lie_along_x(generator):
    views = side_views(open_source("4ake"), 20, 32, generator)
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1
    axis = torch.arange(32.0) - 16
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    weight = (views - views.median()).clamp_min(0).mean(0)
    assert float((weight * x**2).sum()) > 1.3 * float((weight * y**2).sum())


def test_errors_are_of_each_definition(generator):
    truth = torch.rand(5, 4, 4, generator=generator)
    found = truth.clone()
    found[2] += 0.5
    errors = picture_errors(found, truth)
    assert errors["sse_worst"] == pytest.approx(16 * 0.25, rel=1e-5)
    assert errors["sse_mean"] == pytest.approx(16 * 0.25 / 5, rel=1e-5)
    assert errors["pixel_worst"] == pytest.approx(0.25, rel=1e-5)
    blank = picture_errors(truth.mean(0).expand(5, -1, -1), truth)
    assert blank["relative_mean"] == pytest.approx(1.0)
    angles = torch.linspace(-3, 3, 40)
    assert angle_errors(angles + 1.0, angles)["median_deg"] == pytest.approx(math.degrees(1.0), abs=1e-3)
    free = angle_errors(angles + 1.0 - 2 * math.pi, angles, free=True)
    assert free["median_deg"] < 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"angle": "degrees"},
        {"angle": "directed", "supervised": False},
        {"angle": "scalar", "supervised": False},
        {"angle": "circle", "supervised": False},
        {"critic": 1.0, "angle": "fitted", "supervised": False},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match="CONF43"):
        Invariant(TurnedPictures(bars(2)), InvariantConfig(**settings))
    for pictures in (torch.empty(0, 16, 16), torch.ones(3, 4, 4), torch.zeros(3, 16, 16)):
        with pytest.raises(ConfigError, match="CONF434"):
            TurnedPictures(pictures)
    with pytest.raises(ConfigError, match="CONF430"):
        TurnedPictures(bars(2), noise=-1.0)
