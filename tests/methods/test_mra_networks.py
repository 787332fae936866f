"""Networks of moments: exact equivariance, learning in a few steps, the fit of eq. 28, resume of both phases."""

import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.methods.mra_networks import NETWORKS, Refinement, Supervised, SupervisedConfig, make_network, predict
from cryorbit.metrics.signals import frame_shift
from cryorbit.networks.moment_encoder import read_density
from cryorbit.physics.moments import Moments, analytic_moments, real_space, relative_errors
from cryorbit.simulate.mra import Mixtures
from cryorbit.training.checkpoint import save_checkpoint
from cryorbit.training.loop import Method, run

FAMILY = Mixtures(length=15, components=1, width=(0.08, 0.12))


def drawn(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    signals, densities = FAMILY.draw(count, generator)
    return signals.float(), densities.float()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_scale_with_the_signal_and_densities_sum_to_one(name, generator):
    network = make_network(name, 15)
    signal, density = drawn(4, generator)
    v, rho = predict(network, analytic_moments(signal, density))
    torch.testing.assert_close(rho.sum(1), torch.ones(4))
    tripled = predict(network, analytic_moments(3 * signal, density))
    torch.testing.assert_close(tripled[0], 3 * v, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tripled[1], rho, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_signal_of_zeros_gives_finite_outputs(name):
    v, rho = make_network(name, 15)(torch.zeros(1, 15), torch.zeros(1, 15, 15))
    assert bool(v.isfinite().all())
    torch.testing.assert_close(rho.sum(1), torch.ones(1))


def equivariance_error(name: str, generator: torch.Generator) -> float:
    """Largest change of the outputs when the moments are moved by 4 samples and the signal is moved back."""
    network = make_network(name, 15)
    signal, density = drawn(4, generator)
    here = predict(network, analytic_moments(signal, density))
    there = predict(network, analytic_moments(signal, density.roll(4, dims=1)))
    moved_back = there[0].roll(-4, dims=1), there[1]
    return max(float((b - a).abs().max().detach()) for a, b in zip(here, moved_back, strict=True))


def test_the_equivariant_network_is_equivariant(generator):
    assert equivariance_error("equivariant", generator) < 1e-4


def test_a_density_is_read_off_beside_the_true_signal_in_its_frame(generator):
    signal, density = FAMILY.draw(4, generator)
    read = read_density(signal, *real_space(analytic_moments(signal, density)), floor=1e-9)
    torch.testing.assert_close(read, density, rtol=0, atol=1e-4)


def test_the_equivariant_network_gives_signal_and_density_in_one_frame(generator):
    method = Supervised(FAMILY, SupervisedConfig(steps=60, batch=16))
    run(method)
    given = analytic_moments(*drawn(8, generator))
    with torch.no_grad():
        pairs = zip(*predict(method.network, given), strict=True)
    each = [Moments(*pair) for pair in zip(given.first, given.second, strict=True)]
    assert [frame_shift(*pair, moments) for pair, moments in zip(pairs, each, strict=True)] == [0] * 8


def test_equivariance_check_can_fail(generator):
    assert equivariance_error("paper003", generator) > 1e-3


def test_seeds_and_names(generator):
    first, again, other = (make_network("equivariant", 15, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    with pytest.raises(ConfigError, match="CONF403"):
        make_network("transformer", 15)


@pytest.mark.parametrize(("name", "steps"), [("equivariant", 20), ("paper003", 50)])
def test_supervised_training_learns(name, steps):
    method = Supervised(FAMILY, SupervisedConfig(network=name, steps=steps, batch=16))
    errors = [float(method.step(i)["signal_error"]) for i in range(steps)]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])


def refinement(generator: torch.Generator) -> Refinement:
    signal, density = drawn(2, generator)
    moments = [analytic_moments(*pair) for pair in zip(signal.double(), density.double(), strict=True)]
    return Refinement(make_network("equivariant", 15), moments, steps=6, rate=3e-3)


def test_refinement_fits_each_problem_by_itself(generator):
    method = refinement(generator)
    template = {k: v.clone() for k, v in method.template.state_dict().items()}
    before = relative_errors(analytic_moments(*method.pairs()), method.given)
    run(method)
    after = relative_errors(analytic_moments(*method.pairs()), method.given)
    for old, new in zip(before, after, strict=True):
        assert bool((new < old).all())
    assert all(torch.equal(template[k], v) for k, v in method.template.state_dict().items())


@pytest.mark.parametrize("phase", ["supervised", "reconstruction"])
def test_resumed_run_equals_uninterrupted(phase, tmp_path):
    def build() -> Method:
        if phase == "supervised":
            return Supervised(FAMILY, SupervisedConfig(steps=5, batch=8))
        return refinement(torch.Generator().manual_seed(3))

    whole, part, resumed = build(), build(), build()
    run(whole)
    for index in range(2):
        part.step(index)
    save_checkpoint(tmp_path / "c", part.state(), {"fingerprint": "", "stage": part.name, "next_step": 2})
    run(resumed, checkpoint=tmp_path / "c")
    assert all(torch.equal(value, resumed.state()[key]) for key, value in whole.state().items())
