"""From a particle stack to a map and poses: ab initio -> handover -> refinement -> files. Orchestration only."""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.methods.marginal import Marginal
from cryorbit.methods.refinement import Refinement
from cryorbit.metrics.explained import Unexplained, unexplained
from cryorbit.metrics.fsc import MaskedFSC, masked_fsc, resolution
from cryorbit.metrics.local_resolution import local_resolution
from cryorbit.metrics.masks import mask_within, soft_sphere
from cryorbit.metrics.resample import inverted
from cryorbit.metrics.sharpen import sharpen
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import disk_to_images
from cryorbit.physics.slicing import slicing_grid
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import ABINITIO, AMORTIZED, MOMENTS, POSES, RunConfig
from cryorbit.pipeline.handover import hand_over
from cryorbit.pipeline.inputs import Inputs, prepare
from cryorbit.pipeline.joint import check_view, learnt_maps, least_radius
from cryorbit.pipeline.moment_start import moment_maps
from cryorbit.pipeline.rundir import opened
from cryorbit.pipeline.start import Start, fourier_stack, start_from_poses
from cryorbit.pipeline.verdict import NOTED, OTHER_METHOD, OTHERS, TRUST, agree, judge, sentence
from cryorbit.poses.posterior import PosedParticles
from cryorbit.training.dataset import working_box
from cryorbit.training.history import History
from cryorbit.training.loop import Progress, run
from cryorbit.types import Poses, Reconstruction, Volume

_WIDE = 0.4  # of the range: offsets spread as widely are cut off by it
_EXAMPLES = 10


def reconstruct(
    config: RunConfig, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Reconstruction:
    """Recover the map and every particle's pose, and write the run folder.

    Parameters
    ----------
    config
        Settings; the same config and folder continue an interrupted run.
    output
        Run folder.
    overwrite
        Delete a previous run in ``output`` first.
    progress
        Called after each step.

    Returns
    -------
    The reconstruction that was written.
    """
    inputs = prepare(config)
    if config.method == AMORTIZED:
        check_view(config, inputs, working_box(inputs.particles.box, _first_radius(config, inputs)))
    with opened(output, config, inputs, overwrite=overwrite) as fingerprint:
        return _run(config, inputs, output, progress, fingerprint)


def _run(
    config: RunConfig, inputs: Inputs, output: Path, progress: Progress | None, fingerprint: str
) -> Reconstruction:
    history = History(output / "history.jsonl")
    seconds: dict[str, float] = {}

    begun = time.monotonic()
    folder = output / "checkpoint"
    if config.start == POSES:
        start = start_from_poses(config, inputs)
        seconds["maps"] = time.monotonic() - begun
    else:
        engine = _abinitio(config, inputs, folder, history, progress, fingerprint)
        seconds["abinitio"] = time.monotonic() - begun
        begun = time.monotonic()
        start = hand_over(config, inputs, engine, folder, fingerprint)
        del engine  # and its images
        seconds["assign"] = time.monotonic() - begun
    begun = time.monotonic()
    refinement = _refine(config, start, folder, history, progress, fingerprint)
    seconds["refine"] = time.monotonic() - begun
    begun = time.monotonic()
    posed = refinement.posed()
    posterior = posed.posterior.in_angstrom(refinement.stack.pixel_size)
    posed = replace(posed, posterior=posterior.mirrored() if config.flip_hand else posterior)
    seconds["posterior"] = time.monotonic() - begun

    result, curves = _summarise(config, start, refinement, posed, seconds)
    _write(output, start, refinement, posed, result, curves)
    return result


def _first_radius(config: RunConfig, inputs: Inputs) -> float:
    """Fourier radius in pixels of the images that ab initio looks at."""
    extent, group = inputs.particles.box * inputs.particles.pixel_size, point_group(inputs.symmetry)
    radius = min(config.abinitio.radii(len(group))[1] * extent / inputs.mask_diameter, 0.5 * inputs.particles.box - 1)
    return float(round(max(radius, least_radius(config, inputs)) if config.method == AMORTIZED else radius))


def _abinitio(
    config: RunConfig,
    inputs: Inputs,
    folder: Path,
    history: History,
    progress: Progress | None,
    fingerprint: str,
) -> Marginal:
    stack = fourier_stack(config, inputs, _first_radius(config, inputs))
    engine = Marginal(
        stack,
        config.abinitio,
        mask_diameter=inputs.mask_diameter,
        symmetry=point_group(inputs.symmetry).float(),
        half_set=inputs.half_set,
        seed=config.seed,
    )
    checkpoint = folder / f"{engine.name}.safetensors"
    if not checkpoint.exists():
        if config.method == AMORTIZED:
            engine.take_over(learnt_maps(config, inputs, stack, folder, history, progress, fingerprint))
        if config.init == MOMENTS:
            engine.begin_at(moment_maps(config, inputs, stack))
    run(engine, checkpoint=checkpoint, history=history, progress=progress, fingerprint=fingerprint)
    return engine


def _refine(
    config: RunConfig,
    start: Start,
    folder: Path,
    history: History,
    progress: Progress | None,
    fingerprint: str,
) -> Refinement:
    stack = start.stack
    refinement = Refinement(
        stack,
        config.refine,
        mask_diameter=start.inputs.mask_diameter,
        symmetry=point_group(start.inputs.symmetry).float(),
        start=start.maps,
        radius=start.radius,
        candidates=(start.rotations, start.shifts / stack.pixel_size),
        half_set=start.inputs.half_set,
        intensity=start.intensity,
        solvent=start.inputs.mask,
        volume=config.volume,
    )
    run(
        refinement,
        checkpoint=folder / "refine.safetensors",
        history=history,
        progress=progress,
        fingerprint=fingerprint,
    )
    return refinement


def _summarise(
    config: RunConfig, start: Start, refinement: Refinement, posed: PosedParticles, seconds: dict[str, float]
) -> tuple[Reconstruction, MaskedFSC]:
    inputs = start.inputs
    t = refinement.tensors
    box, apix = refinement.stack.box, refinement.stack.pixel_size
    scale = refinement.stack.scale  # back to the images' own grey values, which RELION expects of a reference
    half_1, half_2, full = (t[name].cpu() / scale for name in ("half_1", "half_2", "map"))
    rotations, shifts = refinement.poses
    if config.flip_hand:
        half_1, half_2, full = (inverted(one) for one in (half_1, half_2, full))
        rotations = so3.half_turn(rotations)
    sphere = soft_sphere(box, 0.5 * inputs.mask_diameter / apix)
    warnings = list(inputs.warnings)
    if inputs.mask is not None:
        mask = inverted(inputs.mask) if config.flip_hand else inputs.mask
    else:
        found = mask_within(sphere, full, apix)
        mask = sphere if found is None else found
        if found is None:
            warnings.append("no mask could be drawn around the map: the sphere is used instead")
    curves = masked_fsc(half_1, half_2, mask, torch.Generator().manual_seed(config.seed))
    unmasked = resolution(curves.unmasked, 0.143, box, apix)
    masked = resolution(curves.corrected, 0.143, box, apix)
    sharpened = sharpen(half_1, half_2, mask, curves.corrected, apix)
    local = local_resolution(half_1, half_2, apix)
    quantiles = np.quantile(local[mask > 0.5].numpy(), [0.05, 0.5, 0.95])
    agreement = agree(len(rotations), masked, unmasked, 2 * apix)
    spectra, left = _spectra(start, refinement)
    turned, moved = (float(x.median()) for x in posed.posterior.spread_up_to(start.mates))
    told = _verdict(start, agreement, masked, left, math.degrees(turned))
    status = str(told["status"])
    if left is not None and left.share - 2 * left.error > NOTED and OTHERS not in status:
        warnings.append(f"the map leaves {100 * left.share:.0f} % of the images' signal unexplained. {OTHERS}")
    if config.method == AMORTIZED and told["verdict"] != TRUST:
        warnings.append(OTHER_METHOD)
    if config.start == ABINITIO:
        warnings.append(
            "the hand is a coin's toss: images cannot tell a molecule from its mirror image. Look at the map; --flip-hand writes the other"
        )
    if refinement.defocus is not None and refinement.defocus.sigma > _WIDE * config.refine.defocus_range:
        warnings.append(
            f"the particles' defocus is off by {refinement.defocus.sigma:.0f} A (standard deviation), too much for the range of "
            f"{config.refine.defocus_range:.0f} A: widen --defocus-range, and check voltage and pixel size"
        )
    metrics: dict[str, object] = {
        **told,
        "resolution_A": unmasked,
        "resolution_masked_A": masked,
        "local_resolution_A": dict(zip(("5 %", "50 %", "95 %"), quantiles.tolist(), strict=True)),
        "b_factor_A2": sharpened.b_factor,
        "pixel_size_A": apix,
        "box": box,
        "particles": len(rotations),
        "mask_diameter_A": inputs.mask_diameter,
        "symmetry": inputs.symmetry,
        "preset": config.preset,
        "seed": config.seed,
        "start": config.start,
        "method": config.method,
        "volume": config.volume,
        "contrast": "dark" if inputs.particles.sign < 0 else "light",
        "hand_flipped": config.flip_hand,
        "pose_spread_deg": math.degrees(turned),
        "shift_spread_A": moved,
        "pose_widening": posed.widening,
        "scale_spread": posed.scale_spread,
        "defocus_sigma_A": None if refinement.defocus is None else refinement.defocus.sigma,
        "pose_change_deg": float(torch.rad2deg(t["pose_change"])),
        "seconds": sum(seconds.values()),
        "stage_seconds": seconds,
        "signal_unexplained": left and left.share,
        "signal_unexplained_error": left and left.error,
        **spectra,
        "warnings": warnings,
    }
    poses = Poses(rotations, shifts * apix)
    result = Reconstruction(
        Volume(full, apix),
        Volume(sharpened.data, apix),
        Volume(local, apix),
        (Volume(half_1, apix), Volume(half_2, apix)),
        poses,
        inputs.half_set,
        curves.unmasked,
        masked,
        status,
        tuple(warnings),
        metrics,
    )
    return result, curves


def _spectra(start: Start, refinement: Refinement) -> tuple[dict[str, list[float] | None], Unexplained | None]:
    """Power per shell of what the map leaves of the images, of the images and of their background; and the share of signal left.

    Of a user's mask it is not asked: what that cuts off is left on purpose.
    """
    stack = refinement.stack
    image, background = stack.power, stack.background_power
    residual = refinement.tensors["noise"][: len(image)]
    pixels = stack.disk.shell_sums(torch.ones(len(stack.disk)), len(image))
    left = None
    if background is not None and start.inputs.mask is None:
        left = unexplained(image, background, residual, pixels, stack.background_images)
    named = {"noise_variance": residual, "image_power": image, "background_power": background}
    return {name: None if x is None else (x / stack.scale**2).tolist() for name, x in named.items()}, left


def _verdict(
    start: Start, agreement: str, masked: float, left: Unexplained | None, spread_deg: float
) -> dict[str, object]:
    """What the run says of itself: of an ab initio run, the chance that it is right; of a refinement, how far its halves agree."""
    evidence = start.evidence
    if evidence is None and start.doubt:
        return {"status": f"Do not trust this map: {start.doubt}. After refinement {agreement}"}
    if evidence is None:
        status = (
            f"Refined to {masked:.1f} A: {agreement}. The poses came with the particles; halves that started from poses of one joint "
            "refinement share its mistakes"
        )
        return {"status": status}
    evidence = replace(evidence, spread_deg=spread_deg)
    if left is not None:
        evidence = replace(evidence, unexplained=left.share, unexplained_error=left.error)
    verdict = judge(evidence)
    return {
        "status": sentence(verdict, agreement, masked),
        "probability_right": verdict.probability,
        "verdict": verdict.level,
        "evidence": asdict(evidence),
        "reasons": list(verdict.reasons),
        "pose_effective_median": evidence.effective,
        "halves_independent": not evidence.joined,
        "halves_periods": evidence.periods,
        "halves_same_pose": evidence.posed,
        "intensity_sd": evidence.intensity_sd,
        "halves_pose_difference_deg": evidence.pose_difference_deg,
    }


def _write(
    output: Path, start: Start, refinement: Refinement, posed: PosedParticles, result: Reconstruction, curves: MaskedFSC
) -> None:
    inputs = start.inputs
    outputs.write_maps(output, result)
    outputs.write_posterior(output / "poses.npz", posed)
    columns = outputs.particle_columns(posed, refinement.tensors["log_likelihood"], start.effective)
    if refinement.defocus is not None:
        columns |= outputs.defocus_columns(inputs.particles, refinement.defocus)
    outputs.write_poses(output, inputs.particles, result, columns)
    outputs.write_fsc(
        output / "fsc.csv",
        {
            "fsc": curves.unmasked,
            "fsc_masked": curves.corrected,
            "fsc_masked_raw": curves.masked,
            "fsc_randomised": curves.randomised,
        },
        result.map.box,
        result.map.pixel_size,
    )
    chosen = torch.linspace(0, len(result.poses) - 1, _EXAMPLES).round().to(torch.int64)
    stack = refinement.stack
    sphere = soft_sphere(stack.box, 0.5 * inputs.mask_diameter / stack.pixel_size)
    grid = slicing_grid((result.map.data * sphere).to(stack.device), stack.disk.radius)
    shifts = result.poses.shifts[chosen] / stack.pixel_size
    levels = stack.equalisation(chosen)  # show the images as they are
    predicted = forward(
        grid,
        result.poses.rotations[chosen].to(stack.device),
        shifts.to(stack.device),
        stack.disk.to(stack.device),
        stack.ctf(chosen) / levels,
    )
    disk = stack.disk.to(stack.device)
    outputs.write_report_data(
        output / "report_data.npz",
        disk_to_images(stack.images(chosen) / levels / stack.scale, disk),
        disk_to_images(predicted, disk),
        chosen,
    )
    outputs.write_json(output / "metrics.json", result.metrics)
