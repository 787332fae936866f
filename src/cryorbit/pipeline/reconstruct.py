"""From a particle stack to a map and poses: ab initio -> assignment -> refinement -> files. Orchestration only."""

import math
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.io.examine import examine_particles
from cryorbit.io.particle_set import duplicate_groups
from cryorbit.io.particles import ParticleSet, open_particles
from cryorbit.methods.halves import Agreement
from cryorbit.methods.marginal import Marginal
from cryorbit.methods.refinement import Refinement
from cryorbit.metrics.fsc import MaskedFSC, masked_fsc, resolution
from cryorbit.metrics.masks import contrast_sign, mask_from_map, soft_sphere
from cryorbit.metrics.resample import inverted
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import disk_to_images
from cryorbit.physics.slicing import slicing_grid
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig, check, to_toml
from cryorbit.pipeline.rundir import locked, open_run
from cryorbit.pipeline.verdict import Evidence, judge, sentence
from cryorbit.training.checkpoint import load_checkpoint, save_checkpoint
from cryorbit.training.dataset import FourierStack
from cryorbit.training.history import History
from cryorbit.training.loop import Progress, run
from cryorbit.types import Poses, Reconstruction, Volume

FEWEST_PARTICLES = 20
_EXAMPLES = 10
_ASSIGN_BATCH = 2000
_DARK = "particles.star points to the dark images as they are on disk: invert them before RELION refines from it"


@dataclass(frozen=True)
class Inputs:
    """The particles of a run and what was decided about them."""

    particles: ParticleSet
    mask_diameter: float
    symmetry: Float[Tensor, "s 3 3"]
    half_set: Int[Tensor, " n"]
    device: torch.device
    warnings: tuple[str, ...]


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA when present; a device that is asked for and absent is an error, not a fallback."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError("CONF020", f"--device {name} is not a device", "use auto, cpu, cuda or cuda:0")
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            "CONF021",
            f"--device {name}: this torch sees {count} CUDA devices",
            "use --device cpu, or install torch with CUDA",
        )
    return device


def split_halves(particles: ParticleSet, seed: int) -> Int[Tensor, " n"]:
    """Half sets from the file, where it has both, else a balanced random split; rows that show the same image share a half."""
    if particles.half_set is not None:
        given = torch.as_tensor(particles.half_set, dtype=torch.int64)
        if (
            bool(((given == 1) | (given == 2)).all())
            and min(int((given == h).sum()) for h in (1, 2)) >= FEWEST_PARTICLES // 2
        ):
            return given
    image = torch.from_numpy(duplicate_groups(particles))
    _, image = torch.unique(image, return_inverse=True)
    count = int(image.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    half = torch.ones(count, dtype=torch.int64)
    half[order[: count // 2]] = 2
    return half[image]


def prepare(config: RunConfig) -> Inputs:
    """Open and check the particles; everything that can be refused is refused here, before any work."""
    check(config)
    device = choose_device(config.device)
    symmetry = point_group(config.symmetry).to(torch.float32)
    path = Path(config.particles)
    stated = {name: getattr(config, name) for name in ("voltage", "spherical_aberration", "amplitude_contrast")}
    options: dict[str, Any] = {
        "datadir": Path(config.datadir) if config.datadir else None,
        "pixel_size": config.pixel_size or None,
        "invert_contrast": config.contrast == "dark",
        "ctf_given": {name: value for name, value in stated.items() if value},
    }
    examination = examine_particles(path, **options)
    for finding in examination.findings:
        if finding.level == "error":
            raise DataError(finding.code or "DATA042", finding.message, finding.hint)
    particles = open_particles(path, **options)
    if len(particles) < FEWEST_PARTICLES:
        raise DataError(
            "DATA040", f"{config.particles} holds {len(particles)} particles, at least {FEWEST_PARTICLES} are needed"
        )
    extent = particles.box * particles.pixel_size
    diameter = config.mask_diameter or 0.85 * extent
    if not 4 * particles.pixel_size < diameter <= extent:
        raise ConfigError(
            "CONF022",
            f"mask diameter {diameter:g} A does not fit a box of {extent:.1f} A ({particles.box} px of {particles.pixel_size:.3f} A)",
            "give --mask-diameter in angstrom, a little more than the longest side of the particle",
        )
    warnings = [f.message + (f" ({f.hint})" if f.hint else "") for f in examination.findings if f.level == "warning"]
    if config.no_ctf:
        particles = replace(particles, ctf=None)
    elif particles.ctf is None and len(particles.ctf_missing) < 6:
        raise DataError(
            "DATA041",
            f"the CTF of {path.name} is incomplete: {', '.join(particles.ctf_missing)} missing",
            "say it with --set (voltage=300, spherical_aberration=2.7, amplitude_contrast=0.1), or pass --no-ctf",
        )
    if not config.mask_diameter:
        warnings.append(f"no --mask-diameter given: {diameter:.0f} A (85 % of the box) is used")
    if config.contrast == "dark":
        warnings.append(_DARK)
    return Inputs(particles, diameter, symmetry, split_halves(particles, config.seed), device, tuple(warnings))


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
    open_run(output, config, overwrite=overwrite)
    if not (output / "provenance.json").exists():  # a continued run keeps how it began
        outputs.write_json(output / "provenance.json", outputs.provenance(Path(config.particles), str(inputs.device)))
    with locked(output):
        return _run(config, inputs, output, progress)


def _run(config: RunConfig, inputs: Inputs, output: Path, progress: Progress | None) -> Reconstruction:
    stacks = inputs.particles.images.stacks if inputs.particles.images else ()
    fingerprint = " ".join(
        [to_toml(config), *(outputs.checksum(path) for path in (Path(config.particles), *(s.path for s in stacks)))]
    )
    history = History(output / "history.jsonl")
    seconds: dict[str, float] = {}

    begun = time.monotonic()
    engine = _abinitio(config, inputs, output / "checkpoint", history, progress, fingerprint)
    seconds["abinitio"] = time.monotonic() - begun
    begun = time.monotonic()
    agreement = engine.agreement()
    candidates = _assign(engine, output / "checkpoint" / "assigned.safetensors", fingerprint)
    seconds["assign"] = time.monotonic() - begun
    evidence = _evidence(engine, agreement, candidates["effective"])
    begun = time.monotonic()
    inputs, maps = _settle_contrast(config, inputs, engine)
    refinement = _refine(
        config, inputs, engine, maps, candidates, output / "checkpoint", history, progress, fingerprint
    )
    seconds["refine"] = time.monotonic() - begun

    result, curves = _summarise(config, inputs, refinement, evidence, agreement, seconds)
    _write(output, inputs, refinement, result, curves, candidates["effective"])
    return result


def _abinitio(
    config: RunConfig, inputs: Inputs, folder: Path, history: History, progress: Progress | None, fingerprint: str
) -> Marginal:
    settings = config.abinitio
    extent = inputs.particles.box * inputs.particles.pixel_size
    radius = min(settings.radius_end * extent / inputs.mask_diameter, 0.5 * inputs.particles.box - 1)
    stack = FourierStack(
        inputs.particles,
        float(round(radius)),
        mask_diameter=inputs.mask_diameter,
        memory_gib=config.memory_gib,
        device=inputs.device,
    )
    engine = Marginal(
        stack,
        settings,
        mask_diameter=inputs.mask_diameter,
        symmetry=inputs.symmetry,
        half_set=inputs.half_set,
        seed=config.seed,
    )
    path = folder / "abinitio.safetensors"
    run(engine, checkpoint=path, history=history, progress=progress, fingerprint=fingerprint)
    return engine


def _assign(engine: Marginal, path: Path, fingerprint: str) -> dict[str, Tensor]:
    """Every particle's most probable grid poses under the ab initio maps; kept, so that a resumed run does not repeat it."""
    if path.exists():
        tensors, meta = load_checkpoint(path)
        if meta.get("fingerprint") == fingerprint:
            return tensors
    parts = [engine.assign(chosen) for chosen in torch.arange(len(engine.stack)).split(_ASSIGN_BATCH)]
    rotations, shifts, effective = (torch.cat([p[i].cpu() for p in parts]) for i in range(3))
    tensors = {"rotations": rotations.contiguous(), "shifts": shifts.contiguous(), "effective": effective}
    save_checkpoint(path, tensors, {"fingerprint": fingerprint})
    return tensors


def _evidence(engine: Marginal, agreement: Agreement, effective: Float[Tensor, " n"]) -> Evidence:
    """What ab initio knows about itself; independent agreement is only what there was before the halves were joined."""
    periods, posed = engine.periods(agreement.reach), agreement.posed
    if bool(engine.joined):
        periods, posed = engine.at_pairing.tolist()
    return Evidence(bool(engine.joined), periods, posed, float(effective.median()), float(engine.intensity.std()))


def _settle_contrast(config: RunConfig, inputs: Inputs, engine: Marginal) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """The ab initio maps with bright density, and the particles with the sign that gives it, where the user left it open."""
    first, second = engine.maps()
    stack = engine.stack
    if config.contrast != "auto" or contrast_sign(0.5 * (first + second), inputs.mask_diameter, stack.pixel_size) > 0:
        return inputs, (first, second)
    particles = replace(inputs.particles, sign=-inputs.particles.sign)
    found = "the map is darker than its surroundings: the particles are taken as dark (--contrast light forbids it)"
    return replace(inputs, particles=particles, warnings=(*inputs.warnings, found, _DARK)), (-first, -second)


def _refine(
    config: RunConfig,
    inputs: Inputs,
    engine: Marginal,
    maps: tuple[Tensor, Tensor],
    candidates: dict[str, Tensor],
    folder: Path,
    history: History,
    progress: Progress | None,
    fingerprint: str,
) -> Refinement:
    stack = FourierStack(
        inputs.particles,
        0.5 * inputs.particles.box,
        mask_diameter=inputs.mask_diameter,
        memory_gib=config.memory_gib,
        device=inputs.device,
    )
    refinement = Refinement(
        stack,
        config.refine,
        mask_diameter=inputs.mask_diameter,
        symmetry=inputs.symmetry,
        start=maps,
        radius=engine.radius(),
        candidates=(candidates["rotations"], candidates["shifts"] / stack.pixel_size),
        half_set=inputs.half_set,
        intensity=engine.intensity,
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
    config: RunConfig,
    inputs: Inputs,
    refinement: Refinement,
    evidence: Evidence,
    agreement: Agreement,
    seconds: dict[str, float],
) -> tuple[Reconstruction, MaskedFSC]:
    t = refinement.tensors
    box, apix = refinement.stack.box, refinement.stack.pixel_size
    scale = refinement.stack.scale  # back to the images' own grey values, which RELION expects of a reference
    half_1, half_2, full = (t[name].cpu() / scale for name in ("half_1", "half_2", "map"))
    rotations = t["rotations"]
    if config.flip_hand:
        half_1, half_2, full = (inverted(one) for one in (half_1, half_2, full))
        rotations = so3.half_turn(rotations)
    sphere = soft_sphere(box, 0.5 * inputs.mask_diameter / apix)
    warnings = list(inputs.warnings)
    try:
        mask = mask_from_map(full * sphere, apix)
    except DataError:
        mask = sphere
        warnings.append("no mask could be drawn around the map: the sphere is used instead")
    curves = masked_fsc(half_1, half_2, mask, torch.Generator().manual_seed(config.seed))
    unmasked = resolution(curves.unmasked, 0.143, box, apix)
    masked = resolution(curves.corrected, 0.143, box, apix)
    verdict = judge(evidence)
    status = sentence(verdict, len(rotations), masked, unmasked, 2 * apix)
    warnings.append(
        "the hand is a coin's toss: images cannot tell a molecule from its mirror image. Look at the map; --flip-hand writes the other"
    )
    metrics: dict[str, object] = {
        "status": status,
        "resolution_A": unmasked,
        "resolution_masked_A": masked,
        "pixel_size_A": apix,
        "box": box,
        "particles": len(rotations),
        "mask_diameter_A": inputs.mask_diameter,
        "symmetry": config.symmetry,
        "preset": config.preset,
        "seed": config.seed,
        "probability_right": verdict.probability,
        "verdict": verdict.level,
        "evidence": asdict(evidence),
        "reasons": list(verdict.reasons),
        "pose_effective_median": evidence.effective,
        "halves_independent": not evidence.joined,
        "halves_periods": evidence.periods,
        "halves_same_pose": evidence.posed,
        "intensity_sd": evidence.intensity_sd,
        "halves_pose_difference_deg": agreement.pose_deg,
        "contrast": "dark" if inputs.particles.sign < 0 else "light",
        "hand_flipped": config.flip_hand,
        "pose_change_deg": float(torch.rad2deg(t["pose_change"])),
        "seconds": sum(seconds.values()),
        "stage_seconds": seconds,
        "noise_variance": [float(x) / scale**2 for x in t["noise"]],
        "warnings": warnings,
    }
    poses = Poses(rotations, t["shifts"] * apix)
    result = Reconstruction(
        Volume(full, apix),
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


def _write(
    output: Path,
    inputs: Inputs,
    refinement: Refinement,
    result: Reconstruction,
    curves: MaskedFSC,
    effective: Float[Tensor, " n"],
) -> None:
    outputs.write_maps(output, result)
    columns = {
        "log_likelihood": [f"{x:.3f}" for x in refinement.tensors["log_likelihood"].tolist()],
        "effective_poses": [f"{math.ceil(x - 1e-3)}" for x in effective.tolist()],  # RELION reads an integer
    }
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
