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
    config = RunConfig(particles=name, seed=seed, mask_diameter=diameter, contrast="dark" if invert else "auto")
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


def test_fast_sweeps_less_and_thorough_more_than_the_default():
    fast, default, thorough = (preset(RunConfig(particles="x", preset=n)) for n in ("fast", "default", "thorough"))
    assert fast.refine.sweeps < default.refine.sweeps < thorough.refine.sweeps
    assert fast.abinitio.starts <= default.abinitio.starts < thorough.abinitio.starts


def test_unknown_preset_and_bad_ranges():
    with pytest.raises(ConfigError, match="CONF014"):
        preset(RunConfig(particles="x", preset="fastest"))
    for text in (
        "abinitio.batch=0",
        "abinitio.decay=1.0",
        "refine.sweeps=0",
        "abinitio.shift_range=0.9",
        "memory_gib=-1",
        "abinitio.sharp=nan",
        "seed=-1",
    ):
        with pytest.raises(ConfigError, match="CONF016"):
            check(override(RunConfig(particles="x"), [text]))


def test_documented_settings_are_the_settings():
    import re
    from dataclasses import fields
    from pathlib import Path

    from cryorbit.methods.distillation import DistillationConfig
    from cryorbit.methods.registry import METHODS, method

    table = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    documented: set[str] = set()
    defaults: dict[str, str] = {}
    for line in table.splitlines():
        if not line.startswith("| `"):
            continue
        names, values = (cell.strip() for cell in line.split("|")[1:3])
        found = re.findall(r"`([^`]+)`", names)
        section = found[0].split(".")[0] + "." if "." in found[0] else ""
        full = [found[0]] + [section + name for name in found[1:]]
        documented |= set(full)
        for name, value in zip(full, values.split(","), strict=True):
            defaults[name] = {"true": "True", "false": "False"}.get(value.strip(), value.strip())
    actual = {f"{name}.{f.name}": f.default for name in METHODS for f in fields(method(name)[1])}
    actual |= {f.name: f.default for f in fields(DistillationConfig)}
    run = RunConfig(particles="x")
    actual |= {
        f"{name}.{key}": value for name in ("moments", "inversion") for key, value in vars(getattr(run, name)).items()
    }
    assert set(actual) <= documented
    for name, value in actual.items():
        documented_value = defaults[name]
        assert documented_value == str(value) or float(documented_value) == float(value), name


@pytest.mark.parametrize(
    ("assignment", "code"),
    [
        ("preset=fast", "CONF018"),
        ("start=poses", "CONF018"),
        ("abinitio=3", "CONF012"),
        ("abinitio.radius_start=1e-9", "CONF016"),
    ],
)
def test_settings_that_cannot_work_are_refused(assignment, code):
    with pytest.raises(ConfigError, match=code):
        check(override(RunConfig(particles="x.star"), [assignment]))
