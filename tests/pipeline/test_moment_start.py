"""``--init moments``: each half's first map comes from its own images, on their scale; where it is refused; a run from its files."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.io.mrc import read_volume
from cryorbit.methods.marginal import Marginal
from cryorbit.methods.moment_fit import MomentsConfig
from cryorbit.metrics.align import align_volumes
from cryorbit.physics.fourier import resize_volume
from cryorbit.pipeline import moment_start
from cryorbit.pipeline.config import RunConfig, check, override
from cryorbit.pipeline.inputs import prepare
from cryorbit.pipeline.moment_start import moment_maps
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.pipeline.start import fourier_stack
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.types import Volume

BOX, APIX, DIAMETER = 24, 4.0, 70.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("moments") / "in"
    settings = SimulationSettings(count=400, snr_db=0.0, seed=2, ctf=CTFSettings((1e4, 3e4)))
    write_simulation(made, make_projector(phantom(), BOX, APIX), settings)
    return made


def config_of(folder: Path) -> RunConfig:
    return RunConfig(particles=str(folder / "particles.star"), mask_diameter=DIAMETER, init="moments", contrast="light")


def test_each_half_has_a_map_of_its_own_images_in_the_box_and_on_the_scale_of_the_stack(folder, monkeypatch):
    monkeypatch.setattr(moment_start, "_SETTINGS", MomentsConfig(starts=1, kept=1, iterations=40))
    config = config_of(folder)
    inputs = prepare(config)
    stack = fourier_stack(config, inputs, 9.0)
    first, second = moment_maps(config, inputs, stack)
    volume = torch.from_numpy(read_volume(folder / "truth.mrc")[0])
    coarse = Volume(resize_volume(resize_volume(volume, 8), stack.box), stack.pixel_size)
    for found in (first, second):
        assert found.shape == (stack.box,) * 3
        aligned = align_volumes(Volume(found, stack.pixel_size), coarse)
        assert aligned.correlation > 0.6
        ratio = float((aligned.map.data * coarse.data).sum() / coarse.data.square().sum()) / stack.scale
        assert 0.5 < ratio < 1.5
    others = replace(inputs, half_set=torch.where(inputs.half_set == 2, torch.arange(400) % 2 + 2, inputs.half_set))
    again, fewer = moment_maps(config, others, stack)  # half 2 lost every other image
    assert torch.equal(again, first)
    assert not torch.equal(fewer, second)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (["init=moment"], "CONF016"),
        (["init=moments", "method=amortized"], "CONF016"),
        (["init=moments", "symmetry=C2"], "CONF113"),
    ],
)
def test_starts_that_cannot_work_are_refused(settings, code):
    with pytest.raises(ConfigError, match=code):
        check(override(RunConfig(particles="x.star"), settings))
    check(override(RunConfig(particles="x.star"), ["init=moments", "symmetry=auto"]))


class Begun(Exception):
    """A run got as far as its first maps."""


def test_a_run_hands_both_maps_to_the_engine_and_says_so_in_its_settings(folder, tmp_path, monkeypatch):
    given = []

    def stop(engine, maps):
        given.extend(maps)
        raise Begun

    monkeypatch.setattr(Marginal, "begin_at", stop)
    with pytest.raises(Begun):
        reconstruct(config_of(folder), tmp_path / "run")
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["init"] == "moments"
    assert len(given) == 2
    assert not torch.equal(*given)


def test_particles_of_unknown_contrast_are_a_word_worth(folder):
    told = prepare(replace(config_of(folder), contrast="auto")).warnings
    assert any("--contrast dark" in warning for warning in told)
    assert not any("--contrast dark" in warning for warning in prepare(config_of(folder)).warnings)
