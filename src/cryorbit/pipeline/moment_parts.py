"""What ``cryorbit moments`` sums: which images, on which rings, and what other runs have summed of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from cryorbit.errors import ConfigError, RunError
from cryorbit.methods.halves import HALVES, members_of
from cryorbit.methods.moments import MARGIN, marched_rings
from cryorbit.methods.particle_moments import ParticleMoments, ParticleSums
from cryorbit.physics.image_moments import SHIFTED
from cryorbit.pipeline.config import RunConfig, decisive
from cryorbit.pipeline.inputs import Inputs
from cryorbit.pipeline.rundir import config_of, differences, fingerprint_of
from cryorbit.training.checkpoint import in_use, load_checkpoint
from cryorbit.training.dataset import Downsampled

_GRID = 4  # pixels of the images' box for each ring: so coarse a grid still tells the rings apart


@dataclass(frozen=True)
class Part:
    """Sums of another run, of each half, and from where to where of it they are."""

    sums: list[ParticleSums]
    share: tuple[float, float]


def rings_of(config: RunConfig, inputs: Inputs) -> list[int]:
    """How many a map is first looked for on, and the stops of the march outwards."""
    c, extent = config.moments, extent_of(inputs)
    first = round(c.periods * extent / inputs.mask_diameter)
    last = math.ceil(extent / c.resolution) if c.resolution else first
    if last > first and not c.filters:
        raise ConfigError(
            "CONF127",
            f"--resolution {c.resolution:g} without third moments",
            "leave moments.filters above 0: two moments lead astray",
        )
    if not c.shift_sigma <= extent / (2 * SHIFTED):
        raise ConfigError(
            "CONF128",
            f"--shift-sigma {c.shift_sigma:g} A in images of {extent:.0f} A, expected at most {extent / (2 * SHIFTED):.0f}",
            "give the standard deviation of each coordinate, or cut out larger images",
        )
    return [first, *marched_rings(first, last)]


def extent_of(inputs: Inputs) -> float:
    return inputs.particles.box * inputs.particles.pixel_size


def downsampled(inputs: Inputs, rings: int) -> Downsampled:
    """The particles on a grid that is fine enough for these rings."""
    box = 2 * math.ceil(_GRID * (rings + MARGIN) / 2)
    return Downsampled(inputs.particles, min(box, inputs.particles.box))


def summation(config: RunConfig, inputs: Inputs, small: Downsampled, rings: list[int], half: int) -> ParticleMoments:
    c = config.moments
    return ParticleMoments(
        small,
        rings[-1],
        mask_diameter=inputs.mask_diameter,
        shifts=inputs.particles.shifts,
        shift_sigma=c.shift_sigma,
        errors=config.inversion.tolerance > 0,
        filters=c.filters,
        orders=c.orders,
        generator=torch.Generator().manual_seed(config.seed),
        reaches=rings,
        rows=_rows(config, inputs, half),
        device=inputs.device,
        name=_stage(half),
    )


def _stage(half: int) -> str:
    return f"moments {half}"


def _rows(config: RunConfig, inputs: Inputs, half: int) -> Int[Tensor, " m"]:
    """The images of a half that a run sums."""
    members = members_of(inputs.half_set, half)
    begin, end = (round(x * len(members)) for x in _share(config))
    return members[begin:end]


def _share(config: RunConfig) -> tuple[float, float]:
    """From where to where of each half a run sums."""
    return (config.moments.part - 1) / config.moments.parts, config.moments.part / config.moments.parts


def parts_of(config: RunConfig, inputs: Inputs, others: Sequence[Path]) -> list[Part]:
    """Sums to be added, of the same particles with the same settings, none of whose images is summed twice."""
    found: list[Part] = []
    for folder in others:
        there = _config_of(folder)
        alike = replace(
            there,
            device=config.device,
            inversion=config.inversion,
            moments=replace(there.moments, part=config.moments.part, parts=config.moments.parts),
        )
        with_errors = (there.inversion.tolerance > 0) == (config.inversion.tolerance > 0)
        if decisive(alike) != decisive(config) or not with_errors:
            told = differences(decisive(alike), decisive(config)) or "inversion.tolerance above 0 in one of them"
            raise RunError(
                "RUN060",
                f"{folder} is not a part of the same sums ({told})",
                "give every part the same settings but --part",
            )
        share = _share(there)
        for begun, ended in (_share(config), *(part.share for part in found)):
            if share[0] < ended and begun < share[1]:
                raise RunError(
                    "RUN060",
                    f"{folder} holds images that are summed already (part {there.moments.part} of {there.moments.parts})",
                    "give every run its own --part",
                )
        found.append(Part([_sums_of(folder, there, inputs, half) for half in HALVES], share))
    return found


def _config_of(folder: Path) -> RunConfig:
    if not (folder / "config.toml").is_file():
        raise RunError("RUN060", f"{folder} is no run of `cryorbit moments`", "name a run folder of another part")
    try:
        return config_of(folder)
    except RunError as error:
        raise RunError("RUN060", f"{folder}: {error.message}", "sum this part again") from error


def _sums_of(folder: Path, config: RunConfig, inputs: Inputs, half: int) -> ParticleSums:
    """What another run has summed."""
    stage = _stage(half)
    path = folder / "checkpoint" / f"{stage}.safetensors"
    if not path.is_file():
        raise RunError("RUN060", f"{folder} has not summed its part", "finish that run first: give its command again")
    try:
        state, meta = load_checkpoint(path)
        with in_use(path):
            sums = ParticleSums.of_state(state)
    except RunError as error:
        raise RunError("RUN060", error.message, f"sum the part of {folder} again") from error
    if (meta.get("stage"), meta.get("fingerprint")) != (stage, fingerprint_of(config, inputs)):
        raise RunError("RUN060", f"{path} holds sums of other images or settings", f"sum the part of {folder} again")
    if sums.moments.count != len(_rows(config, inputs, half)):
        raise RunError("RUN060", f"{folder} has not summed its part", "finish that run first: give its command again")
    return sums
