"""From a particle stack to the map of its moments, without poses: sums of both halves -> maps of both -> one map. Orchestration only."""

import csv
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import RunError
from cryorbit.io.atomic import atomic_path
from cryorbit.io.mrc import write_volume
from cryorbit.methods.halves import HALVES
from cryorbit.methods.moment_fit import MomentMap, MomentsConfig, view_directions
from cryorbit.methods.moment_prior import MomentPrior, PriorConfig
from cryorbit.methods.moments import MARGIN, check_inversion, follow, in_ball, invert_moments, march, marched
from cryorbit.methods.particle_moments import ParticleMoments, ParticleSums
from cryorbit.metrics.fsc import crossing, fsc
from cryorbit.metrics.map_search import align_volumes
from cryorbit.physics.fourier import resize_volume
from cryorbit.physics.image_moments import ImageMoments, check_centring
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.third_moments import ThirdMoments
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.inputs import Inputs, bright, prepare
from cryorbit.pipeline.moment_parts import Part, downsampled, extent_of, parts_of, rings_of, summation
from cryorbit.pipeline.rundir import opened
from cryorbit.simulate.proteins import Proteins
from cryorbit.training.checkpoint import load_checkpoint
from cryorbit.training.dataset import Downsampled
from cryorbit.training.history import History
from cryorbit.training.loop import Progress, run
from cryorbit.types import Volume
from cryorbit.volumes.ball import BallBasis

_LEARNT_DEGREE, _LEARNT_ORDER = 10, 2
_RESULTS = ("metrics.json", "map.mrc", "half_map_1.mrc", "half_map_2.mrc", "fsc.csv", "views.csv", "moments.png")
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
    if any(path.resolve() == output.resolve() for path in others):
        raise RunError("RUN060", f"{output} is written to, its sums cannot be added", "name the other run folders")
    rings = rings_of(config, inputs)
    small = downsampled(inputs, rings[-1])
    radius = min(0.5 * inputs.mask_diameter / small.pixel_size, small.box / 2)
    for last in rings:
        basis = PolarBasis(small.box, last, radius)
        first = last == rings[0]
        settings = in_ball(config.inversion) if first else marched(config.inversion, rings[0], last)
        for checked in (config.inversion, settings) if first else (settings,):
            check_inversion(checked, basis, last, third=config.moments.filters > 0)
    if prior is not None:
        _check_prior(prior, PolarBasis(small.box, rings[0], radius), config.moments.shift_sigma / small.pixel_size)
    parts = parts_of(config, inputs, others)
    summations = [summation(config, inputs, small, rings, half) for half in HALVES]
    with opened(output, config, inputs, overwrite=overwrite) as fingerprint:
        return _run(config, inputs, small, rings, output, summations, parts, prior, progress, fingerprint)


def _run(
    config: RunConfig,
    inputs: Inputs,
    small: Downsampled,
    rings: list[int],
    output: Path,
    summations: list[ParticleMoments],
    others: list[Part],
    prior: Path | None,
    progress: Progress | None,
    fingerprint: str,
) -> tuple[dict[str, Any], MapOfMoments | None]:
    begun, history = time.monotonic(), History(output / "history.jsonl")
    for name in _RESULTS:  # of other parts or a run that was stopped here
        (output / name).unlink(missing_ok=True)
    sums = []
    for i, method in enumerate(summations):
        checkpoint = output / "checkpoint" / f"{method.name}.safetensors"
        run(method, checkpoint=checkpoint, history=history, progress=progress, fingerprint=fingerprint)
        sums.append(reduce(add, (part.sums[i] for part in others), method.summed()))
    count = sum(x.moments.count for x in sums)
    metrics: dict[str, Any] = {
        "particles": count,
        "particles_in_file": len(inputs.particles),
        "rings": rings[-1],
        "finest_A": extent_of(inputs) / rings[-1],
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
    if count < len(inputs.particles):
        metrics["warnings"].append(
            f"{len(inputs.particles) - count:,} particles of parts that were not added are left out"
        )
    network = None if prior is None else _learned(sums[0], rings[0], prior, history, progress)
    begun = time.monotonic()
    found = _inverted(config, rings[0], sums, network, progress)
    metrics |= found.metrics | {"seconds_inverting": time.monotonic() - begun}
    return metrics, _written(output, inputs, small, found, metrics)


def _learnt_by(polar: PolarBasis) -> tuple[BallBasis, str]:
    """Functions of the network for particles of this size on these rings, and what its weights are told by."""
    basis = BallBasis(polar.box, polar.radius, polar.rings + MARGIN, _LEARNT_DEGREE)
    return basis, f"{basis} {polar.rings} {PriorConfig()}"


def _check_prior(path: Path, polar: PolarBasis, shift_sigma_px: float) -> None:
    """Refuse what cannot be read or written as weights for these particles, before the minutes that it takes to learn some."""
    check_centring(shift_sigma_px, polar)
    hint = "name another file for --prior, or delete this one to have it learnt again"
    if not path.exists():
        if not os.access(path.absolute().parent, os.W_OK):
            raise RunError(
                "RUN061", f"--prior {path} cannot be written", "name a file in a folder that is there and writable"
            )
        return
    try:
        _, meta = load_checkpoint(path)
    except RunError as error:
        raise RunError("RUN061", f"--prior {path} holds no weights ({error.message})", hint) from error
    if (meta.get("stage"), meta.get("fingerprint")) != (MomentPrior.name, _learnt_by(polar)[1]):
        raise RunError(
            "RUN061",
            f"--prior {path} was not learnt for {polar.rings} rings of a box of {polar.box} pixels and particles of {2 * polar.radius:.2f}",
            hint,
        )


def _learned(sums: ParticleSums, rings: int, path: Path, history: History, progress: Progress | None) -> MomentPrior:
    """The network for these particles, its weights in ``path``."""
    polar = PolarBasis(sums.moments.basis.box, rings, sums.particle_radius_px)
    basis, fingerprint = _learnt_by(polar)
    network = MomentPrior(basis, view_directions(_LEARNT_ORDER), rings, Proteins(), PriorConfig())
    run(network, checkpoint=path, history=history, progress=progress, fingerprint=fingerprint)
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
        every, every_third = part.image_moments(), part.third_moments()
        moments, third = every.within(rings), None if every_third is None else every_third.within(rings)
        generator = torch.Generator().manual_seed(2 * config.seed + half)
        tried = {"random": invert_moments(moments, config.inversion, generator, third)}
        if network is not None:
            tried["learned"] = _from_network(config.inversion, network, moments, third)
        name = min(tried, key=lambda x: tried[x].objective)
        found = tried[name]
        if every_third is not None and every.basis.rings > rings:
            found = march(every, config.inversion, found.volume, every_third, rings)
        halves.append(found)
        objectives[f"half {half}"] = {"taken": name} | {x: y.objective for x, y in tried.items()}
        if progress is not None:
            progress("invert", half, len(HALVES) + 1, {})
    total = sums[0] + sums[1]
    moments, third = total.image_moments(), total.third_moments()
    best = min(halves, key=lambda x: x.objective)
    end = moments.basis.rings
    last = marched(config.inversion, rings, end) if end > rings else config.inversion
    third = None if third is None else third.within(end)
    if config.inversion.gaussians and third is None:
        whole = invert_moments(moments, config.inversion, torch.Generator().manual_seed(2 * config.seed), third)
    else:
        more = 3 if last is config.inversion else 1
        whole = follow(moments, replace(last, iterations=more * last.iterations), best.volume, third)
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


def _from_network(
    config: MomentsConfig, network: MomentPrior, moments: ImageMoments, third: ThirdMoments | None
) -> MomentMap:
    """Every head's map a little way, then the likeliest to the end."""
    maps = (network.basis.volume(x) for x in network.predict(moments))
    tried = [follow(moments, config, volume, third) for volume in maps]
    best = min(tried, key=lambda x: x.objective)
    return follow(moments, replace(config, iterations=3 * config.iterations), best.volume, third)


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
        "resolution_0.5_A": _reached(curve, 0.5, extent_of(inputs)),
        "resolution_0.143_A": _reached(curve, 0.143, extent_of(inputs)),
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
