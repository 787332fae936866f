"""From a particle stack to the map of its moments, without poses: sums of both halves -> maps of both -> one map. Orchestration only."""

import csv
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError, RunError
from cryorbit.io.atomic import atomic_path
from cryorbit.io.mrc import write_volume
from cryorbit.methods.halves import HALVES, members_of
from cryorbit.methods.moment_fit import MomentMap, MomentsConfig, view_directions
from cryorbit.methods.moment_prior import MomentPrior, PriorConfig
from cryorbit.methods.moments import check_inversion, invert_from, invert_moments, march, marched, marched_rings
from cryorbit.methods.particle_moments import ParticleMoments, ParticleSums
from cryorbit.metrics.fsc import crossing, fsc
from cryorbit.metrics.map_search import align_volumes
from cryorbit.physics.fourier import resize_volume
from cryorbit.physics.image_moments import ImageMoments
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.third_moments import ThirdMoments
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.inputs import Inputs, bright, prepare
from cryorbit.pipeline.rundir import config_of, opened
from cryorbit.simulate.proteins import Proteins
from cryorbit.training.checkpoint import in_use, load_checkpoint
from cryorbit.training.dataset import Downsampled
from cryorbit.training.history import History
from cryorbit.training.loop import Progress, run
from cryorbit.types import Volume
from cryorbit.volumes.ball import BallBasis

_GRID = 4  # pixels of the images' box for each ring: so coarse a grid still tells the rings apart
_MARGIN = 2
_LEARNT_DEGREE, _LEARNT_ORDER = 10, 2
_FAINT = 3.0  # standard errors below which third moments decide little


@dataclass(frozen=True)
class MapOfMoments:
    """What came out beside the sums.

    Attributes
    ----------
    volume
        Bright, in the particles' box and grey scale.
    curve
        FSC of the halves' maps, laid on it, to the last ring.
    directions, density
        (V, 3) unit vectors in the map's frame and the share of the particles seen along each.
    """

    volume: Volume
    curve: Float[Tensor, " shells"]
    directions: Float[Tensor, "v 3"]
    density: Float[Tensor, " v"]


def map_of_moments(
    config: RunConfig,
    output: Path,
    *,
    others: Sequence[Path] = (),
    prior: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], MapOfMoments | None]:
    """Sum the moments of a stack, invert them, and write the run folder.

    Parameters
    ----------
    config
        Settings, ``start`` being ``moments``; the same config and folder continue an interrupted run.
    output
        Run folder.
    others
        Run folders of other parts of the same particles, whose sums are added before the inversion. Without them a part alone is only
        summed.
    prior
        Weights of the learned prior for particles of this size on these rings; taught first where there are none.
    overwrite
        Delete a previous run in ``output`` first.
    progress
        Called after each step.

    Returns
    -------
    Metrics, ready for JSON, and the map; None where only sums were asked for.

    Raises
    ------
    ConfigError
        CONF115 settings that cannot invert such moments.
    RunError
        RUN060 sums that are not there, not finished or of the same images.
    """
    inputs = bright(config, prepare(config))
    if overwrite and any(path.resolve() == output.resolve() for path in others):
        raise RunError("RUN060", f"{output} is written to, its sums cannot be added", "name the other run folders")
    rings = _rings(config, inputs)
    small = _downsampled(inputs, rings[-1])
    for last in rings:
        basis = PolarBasis(small.box, last, 0.5 * inputs.mask_diameter / small.pixel_size)
        settings = config.inversion if last == rings[0] else marched(config.inversion, rings[0], last)
        check_inversion(settings, basis, last, third=config.moments.filters > 0)
    parts = _parts_of(config, others)
    with opened(output, config, inputs, overwrite=overwrite) as fingerprint:
        return _run(config, inputs, small, rings, output, parts, prior, progress, fingerprint)


def _rings(config: RunConfig, inputs: Inputs) -> list[int]:
    """How many a map is first looked for on, and the stops of the march outwards."""
    c, extent = config.moments, _extent(inputs)
    first = round(c.periods * extent / inputs.mask_diameter)
    last = math.ceil(extent / c.resolution) if c.resolution else first
    if last > first and not c.filters:
        raise ConfigError(
            "CONF127",
            f"--resolution {c.resolution:g} without third moments",
            "leave moments.filters above 0: two moments lead astray",
        )
    return [first, *marched_rings(first, last)]


def _extent(inputs: Inputs) -> float:
    return inputs.particles.box * inputs.particles.pixel_size


def _downsampled(inputs: Inputs, rings: int) -> Downsampled:
    """The particles on a grid that is fine enough for these rings."""
    box = 2 * math.ceil(_GRID * (rings + _MARGIN) / 2)
    return Downsampled(inputs.particles, min(box, inputs.particles.box))


def _parts_of(config: RunConfig, others: Sequence[Path]) -> list[Path]:
    """Folders of sums to be added, none of whose images is summed twice."""
    taken = [_share(config)]
    for folder in others:
        if not (folder / "config.toml").is_file():
            raise RunError("RUN060", f"{folder} is no run of `cryorbit moments`", "name a run folder of another part")
        there = config_of(folder)
        if there.start != config.start or there.particles != config.particles or there.seed != config.seed:
            raise RunError(
                "RUN060",
                f"{folder} is not a part of the same sums (start {there.start}, particles {there.particles}, seed {there.seed})",
                "sum every part with `cryorbit moments`, the same particles and the same --seed",
            )
        share = _share(there)
        for begun, ended in taken:
            if share[0] < ended and begun < share[1]:
                raise RunError(
                    "RUN060",
                    f"{folder} holds images that are summed already (part {there.moments.part} of {there.moments.parts})",
                    "give every run its own --part",
                )
        taken.append(share)
    return list(others)


def _share(config: RunConfig) -> tuple[float, float]:
    """From where to where of each half a run sums."""
    return (config.moments.part - 1) / config.moments.parts, config.moments.part / config.moments.parts


def _run(
    config: RunConfig,
    inputs: Inputs,
    small: Downsampled,
    rings: list[int],
    output: Path,
    others: list[Path],
    prior: Path | None,
    progress: Progress | None,
    fingerprint: str,
) -> tuple[dict[str, Any], MapOfMoments | None]:
    begun, history = time.monotonic(), History(output / "history.jsonl")
    sums = []
    for half in HALVES:
        method = _summation(config, inputs, small, rings, half)
        checkpoint = output / "checkpoint" / f"{method.name}.safetensors"
        run(method, checkpoint=checkpoint, history=history, progress=progress, fingerprint=fingerprint)
        total = method.summed()
        for folder in others:
            total = total + _sums_of(folder, method.name)
        sums.append(total)
    count = sum(x.moments.count for x in sums)
    metrics: dict[str, Any] = {
        "particles": count,
        "particles_in_file": len(inputs.particles),
        "rings": rings[-1],
        "finest_A": _extent(inputs) / rings[-1],
        "mask_diameter_A": inputs.mask_diameter,
        "pixel_size_A": inputs.particles.pixel_size,
        "box": inputs.particles.box,
        "shifts_undone": inputs.particles.shifts is not None,
        "seconds_summing": time.monotonic() - begun,
        "warnings": list(inputs.warnings),
    }
    if config.moments.parts > 1 and not others:
        outputs.write_json(output / "metrics.json", metrics)
        return metrics, None
    network = None if prior is None else _learned(sums[0], rings[0], prior, history, progress)
    begun = time.monotonic()
    found = _inverted(config, rings[0], sums, network, progress)
    metrics |= found.metrics | {"seconds_inverting": time.monotonic() - begun}
    return metrics, _written(output, inputs, small, found, metrics)


def _summation(config: RunConfig, inputs: Inputs, small: Downsampled, rings: list[int], half: int) -> ParticleMoments:
    c, members = config.moments, members_of(inputs.half_set, half)
    begin, end = (round(x * len(members)) for x in _share(config))
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
        rows=members[begin:end],
        device=inputs.device,
        name=f"moments {half}",
    )


def _sums_of(folder: Path, stage: str) -> ParticleSums:
    """What another run has summed."""
    path = folder / "checkpoint" / f"{stage}.safetensors"
    if not (folder / "metrics.json").is_file() or not path.is_file():
        raise RunError("RUN060", f"{folder} has not summed its part", "finish that run first: give its command again")
    state, _ = load_checkpoint(path)
    with in_use(path):
        return ParticleSums.of_state(state)


def _learned(sums: ParticleSums, rings: int, path: Path, history: History, progress: Progress | None) -> MomentPrior:
    """The network for particles of this size on these rings, its weights in ``path``."""
    basis = BallBasis(sums.moments.basis.box, sums.particle_radius_px, rings + _MARGIN, _LEARNT_DEGREE)
    settings = PriorConfig()
    network = MomentPrior(basis, view_directions(_LEARNT_ORDER), rings, Proteins(), settings)
    run(network, checkpoint=path, history=history, progress=progress, fingerprint=f"{basis} {rings} {settings}")
    return network


@dataclass(frozen=True)
class _Found:
    whole: MomentMap
    halves: list[MomentMap]
    metrics: dict[str, object]


def _inverted(
    config: RunConfig, rings: int, sums: list[ParticleSums], network: MomentPrior | None, progress: Progress | None
) -> _Found:
    """Maps of both halves, each from starts of its own, and that of all images near the better one."""
    halves, objectives = [], {}
    for half, part in zip(HALVES, sums, strict=True):
        moments, third = _within(part, rings)
        generator = torch.Generator().manual_seed(2 * config.seed + half)
        tried = {"random": invert_moments(moments, config.inversion, generator, third)}
        if network is not None:
            tried["learned"] = _from_network(config.inversion, network, moments, third)
        name = min(tried, key=lambda x: tried[x].objective)
        halves.append(_marched(config.inversion, part, rings, tried[name]))
        objectives[f"half {half}"] = {"taken": name} | {x: y.objective for x, y in tried.items()}
        if progress is not None:
            progress("invert", half, len(HALVES) + 1, {})
    total = sums[0] + sums[1]
    moments, third = total.image_moments(), total.third_moments()
    best = min(halves, key=lambda x: x.objective)
    last = (
        marched(config.inversion, rings, len(moments.first) - 1) if len(moments.first) - 1 > rings else config.inversion
    )
    third = None if third is None else third.within(len(moments.first) - 1)
    if config.inversion.gaussians and third is None:
        whole = invert_moments(moments, config.inversion, torch.Generator().manual_seed(2 * config.seed), third)
    else:
        more = 3 if last is config.inversion else 1
        whole = _followed(last, best.volume, moments, third, more * config.inversion.iterations)
    if progress is not None:
        progress("invert", len(HALVES) + 1, len(HALVES) + 1, {})
    told = {
        "objectives": objectives,
        "objective": whole.objective,
        "moments_off": list(whole.errors),
        "third_moments_over_noise": None if third is None else _over_noise(third, total.moments.count),
        "gains_off": None if third is None else third.gains_off,
    }
    return _Found(whole, halves, told)


def _within(sums: ParticleSums, rings: int) -> tuple[ImageMoments, ThirdMoments | None]:
    """Moments on the first rings."""
    third = sums.third_moments()
    return sums.image_moments().within(rings), None if third is None else third.within(rings)


def _marched(config: MomentsConfig, sums: ParticleSums, rings: int, found: MomentMap) -> MomentMap:
    """The map followed to the last ring, where it is not there."""
    moments, third = sums.image_moments(), sums.third_moments()
    if third is None or len(moments.first) - 1 == rings:
        return found
    return march(moments, config, found.volume, third, rings)


def _from_network(
    config: MomentsConfig, network: MomentPrior, moments: ImageMoments, third: ThirdMoments | None
) -> MomentMap:
    """Every head's map a little way, then the likeliest to the end."""
    maps = (network.basis.volume(x) for x in network.predict(moments))
    tried = [_followed(config, volume, moments, third, config.iterations) for volume in maps]
    best = min(tried, key=lambda x: x.objective)
    return _followed(config, best.volume, moments, third, 3 * config.iterations)


def _followed(
    config: MomentsConfig,
    volume: Float[Tensor, "d d d"],
    moments: ImageMoments,
    third: ThirdMoments | None,
    iterations: int,
) -> MomentMap:
    """The map among all in a ball that is near ``volume`` and has the moments."""
    ball = replace(config, gaussians=0, margin=max(_MARGIN, config.margin), iterations=iterations)
    polar = moments.centred_basis
    basis = BallBasis(polar.box, polar.radius, polar.rings + ball.margin, ball.degree)
    return invert_from(moments, ball, basis.nearest(volume).float(), third)


def _over_noise(third: ThirdMoments, count: int) -> float:
    """Root mean square of entries of orders above 0, which tell maps apart, over their standard error: 1 for noise alone."""
    telling = third.filters.pairs[:, 0] > 0
    square = third.values.abs().square() / (third.spread / count)
    return float(square[:, telling].mean().sqrt())


def _written(output: Path, inputs: Inputs, small: Downsampled, found: _Found, metrics: dict[str, Any]) -> MapOfMoments:
    """Lay the halves' maps on the whole one, compare, write."""
    apix, box = inputs.particles.pixel_size, inputs.particles.box
    whole = Volume(found.whole.volume.float(), small.pixel_size)
    laid = [align_volumes(Volume(x.volume.float(), small.pixel_size), whole) for x in found.halves]
    curve = fsc(laid[0].map.data, laid[1].map.data)[
        : metrics["rings"] + 1
    ]  # beyond, maps in one ball are alike by themselves
    warnings = list(metrics["warnings"])
    over = metrics["third_moments_over_noise"]
    if isinstance(over, float) and over < _FAINT:
        warnings.append(
            f"third moments are {over:.1f} times their error: two moments and the starts decide, which leave much open"
        )
    metrics |= {
        "resolution_0.5_A": _reached(curve, 0.5, _extent(inputs)),
        "resolution_0.143_A": _reached(curve, 0.143, _extent(inputs)),
        "correlation_with_halves": [x.correlation for x in laid],
        "warnings": warnings,
    }
    volumes = {"map": whole, "half_map_1": laid[0].map, "half_map_2": laid[1].map}
    full = {name: resize_volume(x.data, box) for name, x in volumes.items()}
    for name, volume in full.items():
        write_volume(output / f"{name}.mrc", volume.numpy(), apix)
    outputs.write_fsc(output / "fsc.csv", {"fsc": curve}, 2 * metrics["rings"], 0.5 * metrics["finest_A"])
    directions = found.whole.rotations[:, 2]
    with atomic_path(output / "views.csv") as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["x", "y", "z", "probability"])
        for direction, share in zip(directions.tolist(), found.whole.density.tolist(), strict=True):
            writer.writerow([*(f"{x:.6f}" for x in direction), f"{share:.6e}"])
    outputs.write_json(output / "metrics.json", metrics)
    return MapOfMoments(Volume(full["map"], apix), curve, directions, found.whole.density)


def _reached(curve: Float[Tensor, " shells"], threshold: float, extent: float) -> float | None:
    """Angstrom, at best that of the last ring; None where the halves never agree."""
    shell = crossing(curve, threshold)
    if shell is None:
        return extent / (len(curve) - 1)
    return None if shell < 1 else extent / shell
