"""Settings of a run: frozen dataclasses to and from TOML, presets as differences, ``--set section.key=value``."""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import tomli_w

from cryorbit.errors import ConfigError
from cryorbit.methods.align2d import Align2DConfig
from cryorbit.methods.amortized_config import AmortizedConfig, checked
from cryorbit.methods.class_averages import ClassAveragesConfig
from cryorbit.methods.marginal_config import FINEST, MarginalConfig
from cryorbit.methods.moment_fit import MomentsConfig
from cryorbit.methods.particle_moments import ParticleMomentsConfig
from cryorbit.methods.refinement_config import RefinementConfig, checked_volume

T = TypeVar("T")

AUTO = "auto"
ABINITIO, POSES, CLASSES = "abinitio", "poses", "classes"
MARGINAL, AMORTIZED = "marginal", "amortized"
RANDOM, MOMENTS = "random", "moments"
CONTRASTS = (AUTO, "light", "dark")

PRESETS: dict[str, tuple[str, ...]] = {
    "fast": (
        "abinitio.starts=1",
        "abinitio.march_steps=16",
        "abinitio.settle_steps=4",
        "refine.sweeps=5",
        "refine.iterations=4",
        "amortized.steps=700",
    ),
    "default": (),
    "thorough": (
        "abinitio.starts=6",
        "abinitio.batch=600",
        "abinitio.march_steps=48",
        "abinitio.settle_steps=16",
        "refine.sweeps=24",
        "refine.iterations=8",
        "amortized.steps=4000",
        "amortized.heads=4",
    ),
    "paper001": (  # the autoencoder as it is printed; its rate is not: docs/methods/amortized.md
        "method=amortized",
        "amortized.steps=10000",
        "amortized.batch=32",
        "amortized.likelihood=l2",
        "amortized.radius_start=0",
        "amortized.radius_end=0",
        "amortized.heads=1",
        "amortized.polar=false",
        "amortized.augmented=false",
        "amortized.normalised=false",
        "amortized.he=false",
        "amortized.matched=false",
        "amortized.fit_shift=false",
        "amortized.side=0",
        "amortized.bfloat16=false",
        "amortized.starts=1",
    ),
}


def _with_third_moments() -> MomentsConfig:
    """As they find molecules best (docs/benchmarks.md)."""
    return MomentsConfig(margin=2, positivity=0.0, view_degree=5, starts=10, kept=4, iterations=300)


@dataclass(frozen=True)
class RunConfig:
    """Everything ``cryorbit reconstruct``, ``refine``, ``align2d`` or ``moments`` needs to do the same again; written to ``config.toml``.

    Attributes
    ----------
    particles, datadir
        Input file, and where to look for its stacks.
    mask_diameter
        Particle diameter in angstrom; 0 takes 85 % of the box.
    symmetry
        Point group imposed on the map (C1, Cn, Dn, T, O, I); ``auto`` looks for one on the map of a run without.
    preset
        The preset the other values started from.
    seed
        Random start, minibatches, half sets.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    memory_gib
        Budget for Fourier pixels kept in memory; larger stacks are read again at each pass.
    pixel_size
        Angstrom per pixel, where the file does not say or says it wrong; 0 believes the file.
    contrast
        ``light`` or ``dark`` particles; ``auto`` goes by the ab initio map.
    flip_hand
        Write the other hand: the mirrored map and its poses.
    no_ctf
        Take the images as unmodulated whatever the file says.
    voltage, spherical_aberration, amplitude_contrast
        kV, mm, fraction: used where the file has a defocus but not these; 0 leaves them to the file.
    start
        ``abinitio``; ``poses``: refine those of the file; ``classes``: 2-D classes, no map; ``moments``: a map, no poses.
    method
        How poses are found ab initio: ``marginal`` (a grid, every pose weighed) or ``amortized`` (a network that is learnt with the map).
    init
        What the first of the ab initio starts of each half begins with: ``random`` poses, like all the others, or ``moments``, the map whose
        first and second moments are those of the half's images.
    ini_high
        Angstrom up to which the maps of given poses are trusted at first; 0: to where their half maps' FSC falls below 0.5.
    mask
        Map of the molecule's mask, 0 to 1, in the frame of given poses; empty draws one.
    volume
        What refined maps are made of: ``voxel`` or ``neural``.
    """

    particles: str
    datadir: str = ""
    mask_diameter: float = 0.0
    symmetry: str = "C1"
    preset: str = "default"
    seed: int = 0
    device: str = "auto"
    memory_gib: float = 4.0
    pixel_size: float = 0.0
    contrast: str = "auto"
    flip_hand: bool = False
    no_ctf: bool = False
    voltage: float = 0.0
    spherical_aberration: float = 0.0
    amplitude_contrast: float = 0.0
    start: str = ABINITIO
    method: str = MARGINAL
    init: str = RANDOM
    ini_high: float = 0.0
    mask: str = ""
    volume: str = "voxel"
    abinitio: MarginalConfig = field(default_factory=MarginalConfig)
    amortized: AmortizedConfig = field(default_factory=AmortizedConfig)
    refine: RefinementConfig = field(default_factory=RefinementConfig)
    align2d: Align2DConfig = field(default_factory=Align2DConfig)
    averages: ClassAveragesConfig = field(default_factory=ClassAveragesConfig)
    moments: ParticleMomentsConfig = field(default_factory=ParticleMomentsConfig)
    inversion: MomentsConfig = field(default_factory=_with_third_moments)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"did you mean {close[0]}? known: {', '.join(known)}" if close else ""


def _coerce(value: Any, like: Any, name: str) -> Any:
    """``value`` as the type of ``like``; text is parsed, numbers may widen, nothing else."""
    kind = type(like)
    try:
        if isinstance(value, str) and kind is not str:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    except (ValueError, KeyError):
        pass
    if type(value) is not kind:
        raise ConfigError(
            "CONF011",
            f"{name} = {value!r} is not {'a' if kind is not int else 'an'} {kind.__name__}",
            "docs/configuration.md lists what each may be",
        )
    return value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from ``values``; an unknown key is an error that names the nearest known one."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError("CONF010", f"unknown setting {where}{key}", _nearest(key, list(fields)))
        f = fields[key]
        if f.default_factory is not dataclasses.MISSING:
            if not isinstance(value, dict):
                raise ConfigError("CONF012", f"{where}{key} is a section, found {value!r}")
            made[key] = from_dict(type(f.default_factory()), value, f"{where}{key}.")
        else:
            made[key] = _coerce(value, "" if f.default is dataclasses.MISSING else f.default, f"{where}{key}")
    absent = [n for n, f in fields.items() if n not in made and f.default is f.default_factory is dataclasses.MISSING]
    if absent:
        raise ConfigError("CONF017", f"the setting {where}{absent[0]} is missing", "restore the run's own config.toml")
    return cls(**made)


def override(config: RunConfig, assignments: list[str] | tuple[str, ...]) -> RunConfig:
    """Apply ``section.key=value`` texts in order."""
    values = dataclasses.asdict(config)
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                "CONF013",
                f"--set {text!r} has no value",
                "write --set section.key=value, for example --set refine.sweeps=12",
            )
        target = values
        *sections, key = name.strip().split(".")
        for section in sections:
            if not isinstance(target.get(section), dict):
                raise ConfigError(
                    "CONF010",
                    f"unknown section {section}",
                    _nearest(section, [k for k, v in values.items() if isinstance(v, dict)]),
                )
            target = target[section]
        if name.strip() == "preset":
            raise ConfigError("CONF018", "a preset cannot be --set, it sets other settings", "pass --preset instead")
        if name.strip() == "start":
            raise ConfigError(
                "CONF018", "start cannot be --set", "use `cryorbit reconstruct`, `refine`, `align2d` or `moments`"
            )
        if isinstance(target.get(key), dict):
            raise ConfigError(
                "CONF012",
                f"{name.strip()} is a section, found {value.strip()!r}",
                f"write --set {name.strip()}.key=value",
            )
        if key not in target:
            raise ConfigError("CONF010", f"unknown setting {name.strip()}", _nearest(key, list(target)))
        target[key] = value.strip()
    return from_dict(RunConfig, values)


def override_section(config: T, assignments: list[str]) -> T:
    """Apply ``key=value`` texts to the dataclass of one section."""
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("CONF013", f"--set {text!r} has no value", "write --set key=value")
        if name.strip() not in values:
            raise ConfigError("CONF010", f"unknown setting {name.strip()}", _nearest(name.strip(), list(values)))
        values[name.strip()] = value.strip()
    return from_dict(type(config), values)


def preset(config: RunConfig) -> RunConfig:
    """The config with its preset's differences applied."""
    if config.preset not in PRESETS:
        raise ConfigError("CONF014", f"unknown preset {config.preset}", _nearest(config.preset, list(PRESETS)))
    return override(config, PRESETS[config.preset])


def decisive(config: RunConfig) -> RunConfig:
    """The settings that results depend on: all but the memory, which may change where a run is continued."""
    return replace(config, memory_gib=RunConfig.memory_gib)


def to_toml(config: RunConfig) -> str:
    """The config as TOML text."""
    return tomli_w.dumps(dataclasses.asdict(config))


def from_toml(text: str) -> RunConfig:
    """Inverse of :func:`to_toml`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("CONF015", f"config.toml is not valid TOML ({error})") from error
    return from_dict(RunConfig, values)


def check(config: RunConfig) -> None:
    """Refuse values no run can use."""
    fine = {
        "mask_diameter": config.mask_diameter >= 0,
        "memory_gib": config.memory_gib >= 0,
        "pixel_size": config.pixel_size >= 0,
        "voltage": config.voltage >= 0,
        "spherical_aberration": config.spherical_aberration >= 0,
        "amplitude_contrast": 0 <= config.amplitude_contrast < 1,
        "start": config.start in (ABINITIO, POSES, CLASSES, MOMENTS),
        "method": config.method in (MARGINAL, AMORTIZED) and (config.method == MARGINAL or config.start == ABINITIO),
        "init": config.init == RANDOM
        or (config.init == MOMENTS and config.start == ABINITIO and config.method == MARGINAL),
        "ini_high": config.ini_high >= 0 and (not config.ini_high or config.start == POSES),
        "mask": not config.mask or config.start == POSES,
        "seed": 0 <= config.seed < 2**31,
        "contrast": config.contrast in CONTRASTS,
        "abinitio.heats": 1 <= config.abinitio.heats <= 100,
        "abinitio.starts": 1 <= config.abinitio.starts <= 100,
        "abinitio.batch": config.abinitio.batch > 0,
        "abinitio.march_steps": 0 < config.abinitio.march_steps <= 10_000,
        "abinitio.settle_steps": 0 < config.abinitio.settle_steps <= 10_000,
        "abinitio.order": 1 <= config.abinitio.order <= FINEST,
        "abinitio.radius_start": 1 <= config.abinitio.radius_start <= config.abinitio.radius_end,
        "abinitio.shift_range": 0 <= config.abinitio.shift_range <= 0.5,
        "abinitio.decay": 0 <= config.abinitio.decay < 1,
        "abinitio.settle_decay": 0 <= config.abinitio.settle_decay < 1,
        "abinitio.sharp": config.abinitio.sharp >= 0,
        "abinitio.modes": 0 < config.abinitio.modes <= 10,
        "abinitio.tau_fudge": config.abinitio.tau_fudge > 0,
        "align2d.classes": 0 <= config.align2d.classes <= 1000,
        "align2d.batch": config.align2d.batch > 0,
        "align2d.radius_start": 1 <= config.align2d.radius_start <= config.align2d.radius_end,
        "align2d.march_steps": 0 < config.align2d.march_steps <= 10_000,
        "align2d.settle_steps": 0 < config.align2d.settle_steps <= 10_000,
        "align2d.decay": 0 <= config.align2d.decay < 1,
        "align2d.settle_decay": 0 <= config.align2d.settle_decay < 1,
        "align2d.shift_range": 0 <= config.align2d.shift_range <= 0.5,
        "align2d.tau_fudge": config.align2d.tau_fudge > 0,
        "averages.sweeps": config.averages.sweeps >= 0,
        "moments.periods": 1 <= config.moments.periods <= 30,
        "moments.resolution": config.moments.resolution >= 0,
        "moments.filters": 0 <= config.moments.filters <= 10_000,
        "moments.orders": config.moments.orders > 0,
        "moments.shift_sigma": config.moments.shift_sigma >= 0,
        "inversion.rings": not config.inversion.rings,  # moments.periods says it
        "moments.part": 1 <= config.moments.part <= config.moments.parts,
        "refine.sweeps": 0 < config.refine.sweeps <= 10_000,
        "refine.batch": config.refine.batch > 0,
        "refine.iterations": config.refine.iterations > 0,
        "refine.modes": 0 < config.refine.modes <= 10,
        "refine.samples": 2 <= config.refine.samples <= 1000,
        "refine.search_order": 1 <= config.refine.search_order <= 4,
        "refine.search_every": config.refine.search_every >= 0,
        "refine.defocus_range": 0 <= config.refine.defocus_range <= 50_000,
        "refine.radius_growth": 1 < config.refine.radius_growth <= 10,
        "refine.fsc_radius": 0 < config.refine.fsc_radius < 1,
        "refine.field_width": 0 < config.refine.field_width <= 4096,
        "refine.field_steps": config.refine.field_steps > 0,
    }
    checked_volume(config.volume)
    checked(config.amortized)
    if config.init == MOMENTS and config.symmetry not in (AUTO, "C1"):
        raise ConfigError(
            "CONF113",
            f"the map of the moments does not know where the axes of --symmetry {config.symmetry} lie",
            "pass --symmetry auto, which looks for them on the final maps, or --init random",
        )
    values = flat(dataclasses.asdict(config))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError("CONF016", f"{name} = {value} is not a finite number", "give a number")
    for name, good in fine.items():
        if not good:
            raise ConfigError(
                "CONF016", f"{name} = {values[name]} is out of range", "docs/configuration.md lists what each may be"
            )


def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Settings of all sections by their full names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return out
