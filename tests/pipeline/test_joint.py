"""Joint training under a symmetry: the map of each half has it, and looks as far as the default method would."""

import pytest
import torch

from cryorbit.metrics.fsc import fsc
from cryorbit.pipeline.config import RunConfig, override
from cryorbit.pipeline.inputs import prepare
from cryorbit.pipeline.joint import learnt_maps, least_radius, settings_of
from cryorbit.pipeline.start import fourier_stack
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.history import History


@pytest.mark.parametrize(("group", "least", "most"), [("C1", -1.0, 0.9), ("C2", 0.95, 1.0)])
def test_learnt_maps_have_the_symmetry_that_was_asked_for(tmp_path, group, least, most):
    write_simulation(
        tmp_path / "in", make_projector(phantom(), 16, 6.0), SimulationSettings(count=200, snr_db=3.0, seed=2)
    )
    settings = ["mask_diameter=70", "amortized.steps=10", "amortized.side=16", f"symmetry={group}"]
    config = override(
        RunConfig(particles=str(tmp_path / "in" / "particles.star"), method="amortized", contrast="light"), settings
    )
    inputs = prepare(config)
    stack = fourier_stack(config, inputs, least_radius(config, inputs))
    maps = learnt_maps(config, inputs, stack, tmp_path, History(tmp_path / "history.jsonl"), None, "")
    for volume in maps:
        turned = volume.flip(1, 2).roll((1, 1), dims=(1, 2))
        assert least < float(fsc(volume, turned)[1:5].min()) < most


def test_radii_grow_with_the_group_as_the_default_method_s_do():
    config = RunConfig(particles="x")
    plain, symmetric = settings_of(config, 1), settings_of(config, 24)
    assert plain == config.amortized
    ratio = torch.tensor(config.abinitio.radii(24)) / torch.tensor(config.abinitio.radii(1))
    assert symmetric.radius_start == pytest.approx(float(ratio[0]) * plain.radius_start)
    assert symmetric.radius_end == pytest.approx(float(ratio[1]) * plain.radius_end)
    assert symmetric.radius_end > symmetric.radius_start
