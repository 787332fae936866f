"""Stochastic variational inference against the exact posterior of the same images at the same poses."""

from dataclasses import replace

import pytest
import torch
from small_stack import APIX, BOX, COUNT, askew_group, known, small_stack, symmetric_stack

from cryorbit.errors import ConfigError
from cryorbit.groups.point import point_group
from cryorbit.methods.map_posterior import MapPosterior, map_posterior
from cryorbit.methods.variational import Variational, VariationalConfig
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.fsc import fsc, shell_sum
from cryorbit.metrics.resample import move_volume
from cryorbit.physics.fourier import shell_index, volume_to_fourier
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run

ONE = torch.eye(3)[None]


@pytest.fixture(scope="module")
def case() -> tuple[FourierStack, SimulatedParticles, PoseSamples, MapPosterior]:
    stack, truth = small_stack(3)
    poses = known(truth)
    return stack, truth, poses, map_posterior(stack, torch.ones(COUNT), poses, ONE)


@pytest.mark.parametrize("posterior", ["gaussian", "dirac"])
def test_converges_to_the_exact_posterior(case, posterior):
    stack, truth, poses, exact = case
    method = Variational(stack, VariationalConfig(posterior=posterior, epochs=8, batch=100), poses=poses, symmetry=ONE)
    apart = []
    for step in range(method.total_steps()):
        method.step(step)
        off = volume_to_fourier(method.tensors["mean"] - exact.mean).abs().square()
        apart.append(shell_sum(off, shell_index(BOX), BOX) / shell_sum(exact.variance, shell_index(BOX), BOX))
    assert float(apart[-1][2:-1].max()) < 0.15  # of the posterior's own variance
    assert float(apart[-1][2:-1].mean()) < 0.5 * float(apart[2][2:-1].mean())
    assert float(fsc(method.tensors["mean"], exact.mean)[1:-1].min()) > 0.98
    if posterior == "dirac":
        assert float(method.volume.variance.max()) == 0
        return
    variance = method.volume.variance.detach()
    ratio = shell_sum(variance, shell_index(BOX), BOX) / shell_sum(exact.variance, shell_index(BOX), BOX)
    assert 0.85 < float(ratio[2:-1].min()) < float(ratio[2:-1].max()) < 1.15
    coverage = interval_coverage(method.tensors["mean"], variance, truth.volume.data * stack.scale)
    assert coverage.overall == pytest.approx(0.9, abs=0.03)
    assert float((method.tensors["noise"] / exact.noise - 1)[2:-1].abs().max()) < 0.08


def test_bound_rises_and_wrong_poses_have_a_lower_one(case):
    stack, _, poses, _ = case
    ends = []
    for rotations in (poses.rotations, poses.rotations.roll(1, 0)):
        method = Variational(
            stack, VariationalConfig(epochs=3), poses=replace(poses, rotations=rotations), symmetry=ONE
        )
        bounds = [float(method.step(step)["elbo_per_image"]) for step in range(method.total_steps())]
        ends.append(sum(bounds[-3:]) / 3)
        assert ends[-1] > bounds[0]
    assert ends[0] > ends[1] + 1.0


def test_symmetry_is_imposed(case):
    """A map of given poses under C2 is C2, and is the exact one."""
    stack, _, poses, _ = case
    group = point_group("C2").float()
    exact = map_posterior(stack, torch.ones(COUNT), poses, group)
    method = Variational(stack, VariationalConfig(epochs=6, batch=100), poses=poses, symmetry=group)
    run(method)
    mean = method.tensors["mean"]
    assert float(fsc(mean, exact.mean)[1:-1].min()) > 0.9
    assert float(fsc(mean, move_volume(mean, group[1], torch.zeros(3)))[1:-1].min()) > 0.97


def test_under_the_group_of_the_molecule_it_is_the_exact_posterior():
    group = askew_group("C7")
    stack, truth = symmetric_stack(group, 3)
    poses = known(truth)
    exact = map_posterior(stack, torch.ones(COUNT), poses, group)
    method = Variational(stack, VariationalConfig(epochs=4, batch=100), poses=poses, symmetry=group)
    run(method)
    off = volume_to_fourier(method.tensors["mean"] - exact.mean).abs().square()
    apart = shell_sum(off, shell_index(BOX), BOX) / shell_sum(exact.variance, shell_index(BOX), BOX)
    assert float(apart[3:-1].max()) < 0.1  # of the posterior's own variance


def test_bound_is_highest_under_the_group_of_the_molecule():
    stack, truth = symmetric_stack(askew_group("C7"), 3)
    poses = known(truth)
    bound = {}
    for name in ("C7", "C6", "C1"):
        method = Variational(stack, VariationalConfig(batch=100), poses=poses, symmetry=askew_group(name))
        bounds = [float(method.step(step)["elbo_per_image"]) for step in range(method.total_steps())]
        bound[name] = sum(bounds[-method.batches :]) / method.batches
    assert bound["C7"] > bound["C1"] + 1.0, bound
    assert bound["C7"] > bound["C6"] + 1.0, bound


@pytest.mark.parametrize("posterior", ["gaussian", "dirac"])
def test_without_noise_every_batch_comes_nearer(posterior):
    """Batches of few images, and nothing to hold the map back where their weights are uneven."""
    box, count = 40, 400
    truth = simulate_particles(
        phantom(radius=60.0, width=5.0), count=count, box=box, pixel_size=APIX, snr_db=None, seed=1
    )
    stack = FourierStack(ArrayParticles(truth.images.numpy(), APIX), box / 2, mask_diameter=150.0)
    poses = known(truth)
    method = Variational(stack, VariationalConfig(posterior=posterior, batch=50), poses=poses, symmetry=ONE)
    clean, off = truth.volume.data * stack.scale, []
    for step in range(8):
        method.step(step)
        off.append(float((method.tensors["mean"] - clean).square().sum() / clean.square().sum()))
    assert off == sorted(off, reverse=True)
    assert off[-1] < 0.01


@pytest.mark.parametrize(
    "settings", [{"posterior": "mixture"}, {"prior": "none"}, {"epochs": 0}, {"batch": 0}, {"decay": 0.3}]
)
def test_settings_are_checked(case, settings):
    stack, _, poses, _ = case
    with pytest.raises(ConfigError, match="CONF106"):
        Variational(stack, VariationalConfig(**settings), poses=poses, symmetry=ONE)


def test_every_particle_needs_one_pose(case):
    stack, _, poses, _ = case
    fewer = PoseSamples(poses.particle[1:], poses.rotations[1:], poses.shifts[1:], poses.weight[1:])
    with pytest.raises(ConfigError, match="CONF107"):
        Variational(stack, VariationalConfig(), poses=fewer, symmetry=ONE)
