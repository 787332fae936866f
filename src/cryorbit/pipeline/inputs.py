"""What a run works on: particles opened and checked, device, mask diameter, halves. Everything that can be refused is refused here."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.io.examine import examine_particles
from cryorbit.io.image_checks import check_images
from cryorbit.io.mrc import read_volume
from cryorbit.io.particle_set import duplicate_groups
from cryorbit.io.particles import ParticleSet, open_particles
from cryorbit.io.star import quoted
from cryorbit.methods.online_em import rotation_grid
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.ctf import ctf
from cryorbit.pipeline.config import AUTO, MOMENTS, POSES, RunConfig, check
from cryorbit.types import CTFParams

FEWEST_PARTICLES = 20
_FEWEST_VIEWS, _TURNS = 2, 32
_SMALLEST_MASK = 0.005  # of the sphere of the mask diameter
_LEAST_POWER = 1e-4  # of the signal, left by the CTF: particles then tell what one in 10,000 of them would without it
_CTF_SAMPLE, _CTF_SHELLS = 1000, 16
_TAKEN_AS_DARK = "the particles are taken as dark (--contrast light forbids it)"
DARK = "particles.star points to the dark images as they are on disk: invert them before RELION refines from it"


@dataclass(frozen=True)
class Inputs:
    """The particles of a run and what was decided about them; ``symmetry`` is the point group that is imposed, by name, ``mask`` the user's."""

    particles: ParticleSet
    mask_diameter: float
    symmetry: str
    half_set: Int[Tensor, " n"]
    device: torch.device
    warnings: tuple[str, ...]
    mask: Float[Tensor, "d d d"] | None = None


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA when present; a device that is asked for and absent is an error, not a fallback."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
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


def open_checked(config: RunConfig) -> tuple[ParticleSet, list[str]]:
    """The particles of ``config`` with a CTF, or none wanted; and what is worth a warning.

    Raises
    ------
    DataError
        What no work can begin with.
    """
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
    for name in {str(stack.path) for stack in (particles.images.stacks if particles.images else ())}:
        quoted(name)  # as the results will have to
    warnings = [f.message + (f" ({f.hint})" if f.hint else "") for f in examination.findings if f.level == "warning"]
    if config.no_ctf:
        particles = replace(particles, ctf=None)
    elif particles.ctf is None and len(particles.ctf_missing) < 6:
        raise DataError(
            "DATA041",
            f"the CTF of {path.name} is incomplete: {', '.join(particles.ctf_missing)} missing",
            "say it with --set (voltage=300, spherical_aberration=2.7, amplitude_contrast=0.1), or pass --no-ctf",
        )
    return particles, warnings


def prepare(config: RunConfig) -> Inputs:
    """Open and check the particles; everything that can be refused is refused here, before any work."""
    check(config)
    device = choose_device(config.device)
    if config.symmetry == AUTO and config.start == POSES:
        raise ConfigError(
            "CONF025",
            "--symmetry auto looks for a point group on an ab initio map, these poses have their own",
            "name the group they were found with, for example --symmetry C1 or --symmetry O",
        )
    symmetry = "C1" if config.symmetry == AUTO else config.symmetry
    group = point_group(symmetry).float()  # an unknown name is refused here
    order = config.abinitio.order
    turns = so3.random_rotations(_TURNS, torch.Generator().manual_seed(0))  # as each step turns it
    rotations = min(len(rotation_grid(order, group, turn)) for turn in turns)
    least = _FEWEST_VIEWS * len(so3.half_grid(order)) // (12 * 4**order)
    if rotations < least:
        raise ConfigError(
            "CONF023",
            f"symmetry {symmetry} may leave {rotations} rotations of the grid of HEALPix order {order}, at least "
            f"{least} are needed",
            f"pass --set abinitio.order={order + 1}, or impose a smaller group",
        )
    particles, warnings = open_checked(config)
    if len(particles) < FEWEST_PARTICLES:
        raise DataError(
            "DATA040",
            f"{config.particles} holds {len(particles)} particles, at least {FEWEST_PARTICLES} are needed",
            "some thousands are usual; check that the file is the one meant",
        )
    extent = particles.box * particles.pixel_size
    diameter = config.mask_diameter or 0.85 * extent
    if not 4 * particles.pixel_size < diameter <= extent:
        raise ConfigError(
            "CONF022",
            f"mask diameter {diameter:g} A does not fit a box of {extent:.1f} A ({particles.box} px of {particles.pixel_size:.3f} A)",
            "give --mask-diameter in angstrom, a little more than the longest side of the particle",
        )
    if config.refine.defocus_range and particles.ctf is None:
        raise ConfigError(
            "CONF026", "the particles have no CTF whose defocus could be refined", "leave --defocus-range out"
        )
    check_ctf(particles, config.abinitio.radii(len(group)), diameter)
    half_set = split_halves(particles, config.seed)
    smallest = min(int((half_set == half).sum()) for half in (1, 2))
    if smallest < FEWEST_PARTICLES // 2:
        raise DataError(
            "DATA043",
            f"one half of {config.particles} would hold {smallest} particles, at least {FEWEST_PARTICLES // 2} are needed: many rows name "
            "the same image, and such rows share a half",
            "remove repeated rows",
        )
    if particles.half_set is not None and not torch.equal(half_set, torch.as_tensor(particles.half_set)):
        warnings.append("the half sets of the file are too uneven to use; a balanced random split is used instead")
    if not config.mask_diameter:
        warnings.append(f"no --mask-diameter given: {diameter:.0f} A (85 % of the box) is used")
    if config.contrast == "dark" and config.start != MOMENTS:  # which writes no particles
        warnings.append(DARK)
    if config.init == MOMENTS and config.contrast == AUTO:
        warnings.append("--init moments takes particles as bright: say --contrast dark if they are dark")
    if config.start == POSES:
        warnings += _check_poses(particles)
    mask = read_mask(Path(config.mask), particles, diameter) if config.mask else None
    return Inputs(particles, diameter, symmetry, half_set, device, tuple(warnings), mask)


def bright(config: RunConfig, inputs: Inputs) -> Inputs:
    """The particles with the other sign where the images' centres are dark and the user left it open: no map is there to tell."""
    checks = check_images(inputs.particles) if config.contrast == AUTO else None
    if checks is None or checks.protein != "dark":
        return inputs
    particles = replace(inputs.particles, sign=-inputs.particles.sign)
    told = (_TAKEN_AS_DARK,) if config.start == MOMENTS else (_TAKEN_AS_DARK, DARK)
    return replace(inputs, particles=particles, warnings=(*inputs.warnings, *told))


def check_ctf(particles: ParticleSet, radii: tuple[float, float], diameter: float) -> None:
    """Refuse particles whose CTF leaves next to nothing in every shell between ``radii``, periods per ``diameter`` (angstrom), where poses are
    told.
    """
    if particles.ctf is None:
        return
    first, last = (periods / diameter for periods in radii)
    chosen = np.linspace(0, len(particles) - 1, min(len(particles), _CTF_SAMPLE)).astype(np.int64)
    params = CTFParams.of(particles.ctf)[torch.from_numpy(chosen)]
    params = replace(params, scale=torch.ones_like(params.scale))
    shells = torch.linspace(first, last, _CTF_SHELLS, dtype=torch.float64)
    power = float(ctf(params, torch.stack([shells, torch.zeros_like(shells)], dim=1)).square().mean(dim=0).max())
    if not power >= _LEAST_POWER:
        raise DataError(
            "DATA048",
            f"the CTF of the particles leaves {power:.1g} of the signal's power between {1 / first:.1f} and {1 / last:.1f} A, where poses are "
            f"told, expected {_LEAST_POWER:g} or more; the median B-factor is {float(params.bfactor.median()):.4g} A^2",
            "check the unit of the CTF B-factors and the defocus; a file without a column of B-factors has none",
        )


def _check_poses(particles: ParticleSet) -> list[str]:
    """Refuse particles without poses to refine; what is worth a warning."""
    hint = "find them with `cryorbit reconstruct`, or give the STAR or .cs file of a refinement"
    if particles.rotations is None:
        raise DataError("DATA044", f"{particles.path} has no angles to refine", hint)
    if np.ptp(particles.rotations, axis=0).max() < 1e-6:
        raise DataError("DATA044", f"all {len(particles)} particles of {particles.path} have the same angles", hint)
    if np.abs(particles.rotations[:, 2, 2]).min() > 1 - 1e-6:
        raise DataError(
            "DATA044",
            f"all {len(particles)} particles of {particles.path} are seen along one axis (tilts of 0 or 180): angles in the plane, as 2-D "
            "classification writes them",
            hint,
        )
    return ["the file has no origins: shifts start at 0"] if particles.shifts is None else []


def read_mask(path: Path, particles: ParticleSet, diameter: float) -> Float[Tensor, "d d d"]:
    """A mask map in the frame of the poses, checked: the particles' box and pixel size, values from 0 to 1.

    Raises
    ------
    ConfigError
        CONF024 it is no mask of these particles.
    """
    data, pixel_size = read_volume(path)
    hint = "make it with relion_mask_create or cryoSPARC's mask tools from a map of these poses, box and pixel size"
    if data.shape[-1] != particles.box:
        raise ConfigError(
            "CONF024", f"the mask {path} has a box of {data.shape[-1]} px, the particles have {particles.box}", hint
        )
    if pixel_size > 0 and abs(pixel_size - particles.pixel_size) > 0.02 * particles.pixel_size:
        raise ConfigError(
            "CONF024",
            f"the mask {path} has {pixel_size:.3f} A per pixel, the particles have {particles.pixel_size:.3f}",
            hint,
        )
    if data.min() < -1e-3 or data.max() > 1 + 1e-3 or data.max() <= 0.5:
        raise ConfigError(
            "CONF024",
            f"the mask {path} has values from {data.min():.3g} to {data.max():.3g}, expected 0 (solvent) to 1 (molecule)",
            hint,
        )
    mask = torch.from_numpy(data).float().clamp(0.0, 1.0)
    sphere = soft_sphere(particles.box, 0.5 * diameter / particles.pixel_size)
    inside = float((mask * sphere).sum())
    if inside < max(_SMALLEST_MASK * float(sphere.sum()), 0.5 * min(float(mask.sum()), float(sphere.sum()))):
        raise ConfigError(
            "CONF024",
            f"the mask {path} misses the particle: {100 * inside / float(sphere.sum()):.1f} % of the sphere of {diameter:.0f} A is in it, and "
            f"{100 * inside / max(float(mask.sum()), 1e-9):.0f} % of it in the sphere",
            hint,
        )
    return mask
