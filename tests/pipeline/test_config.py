"""Configs are data: TOML both ways, unknown keys name the nearest, presets and --set are differences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryorbit.errors import ConfigError
from cryorbit.pipeline.config import PRESETS, RunConfig, check, from_toml, override, preset, to_toml


@given(
    seed=st.integers(0, 2**31),
    diameter=st.floats(0, 1e4, allow_nan=False),
    name=st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=30),
    invert=st.booleans(),
)
def test_toml_round_trip(seed, diameter, name, invert):
    config = RunConfig(particles=name, seed=seed, mask_diameter=diameter, invert_contrast=invert)
    assert from_toml(to_toml(config)) == config


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean march_steps"):
        override(RunConfig(particles="x"), ["abinitio.march_step=3"])
    with pytest.raises(ConfigError, match="did you mean refine"):
        override(RunConfig(particles="x"), ["refin.sweeps=3"])
    with pytest.raises(ConfigError, match="CONF010"):
        from_toml('particles = "x"\nsead = 3\n')


def test_values_keep_their_type():
    config = override(
        RunConfig(particles="x"), ["abinitio.decay=0.5", "refine.sweeps=3", "refine.fit_shift=false", "symmetry=C4"]
    )
    assert (config.abinitio.decay, config.refine.sweeps, config.refine.fit_shift, config.symmetry) == (
        0.5,
        3,
        False,
        "C4",
    )
    for text in ("refine.sweeps=3.5", "refine.sweeps=many", "refine.fit_shift=maybe", "refine.sweeps", "refine=3"):
        with pytest.raises(ConfigError):
            override(RunConfig(particles="x"), [text])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    check(preset(RunConfig(particles="x", preset=name)))


def test_unknown_preset_and_bad_ranges():
    with pytest.raises(ConfigError, match="CONF014"):
        preset(RunConfig(particles="x", preset="fastest"))
    for text in (
        "abinitio.batch=0",
        "abinitio.decay=1.0",
        "refine.sweeps=0",
        "abinitio.shift_range=0.9",
        "memory_gib=0",
    ):
        with pytest.raises(ConfigError, match="CONF016"):
            check(override(RunConfig(particles="x"), [text]))
