"""What refinement starts from, and how to get it from the poses a particle file carries (``cryorbit refine``)."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups.point import point_group
from cryorbit.io.mrc import read_volume
from cryorbit.methods.half_maps import halves_from_poses
from cryorbit.metrics.fsc import last_shell
from cryorbit.metrics.masks import contrast_sign
from cryorbit.pipeline.config import AUTO, RunConfig
from cryorbit.pipeline.inputs import DARK, Inputs
from cryorbit.pipeline.verdict import Evidence
from cryorbit.training.dataset import FourierStack

_TRUSTED_FSC = 0.5  # of the maps of given poses: up to there they are taken for what the particles show
_FEWEST_PERIODS = 4.0  # per particle diameter: less than that holds no pose


@dataclass(frozen=True)
class Start:
    """What refinement starts from.

    Attributes
    ----------
    inputs
        With the sign of the images that was found, where it was left open.
    maps
        One per half, in one frame, bright.
    radius
        Fourier radius up to which they are trusted, in pixels of the box.
    rotations, shifts
        (N, M, 3, 3) and (N, M, 2) angstrom, the most probable pose of each particle first.
    intensity
        (N,) how much stronger than the map each image is.
    mask
        (D, D, D) of the molecule, where the user gave one.
    effective, evidence
        (N,) effective number of poses and how the halves compare; None for poses that came with the particles.
    """

    inputs: Inputs
    maps: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    radius: int
    rotations: Float[Tensor, "n m 3 3"]
    shifts: Float[Tensor, "n m 2"]
    intensity: Float[Tensor, " n"]
    mask: Float[Tensor, "d d d"] | None = None
    effective: Float[Tensor, " n"] | None = None
    evidence: Evidence | None = None


def full_stack(config: RunConfig, inputs: Inputs) -> FourierStack:
    """The particles' Fourier pixels to Nyquist."""
    return FourierStack(
        inputs.particles,
        0.5 * inputs.particles.box,
        mask_diameter=inputs.mask_diameter,
        memory_gib=config.memory_gib,
        device=inputs.device,
    )


def settle_contrast(
    config: RunConfig, inputs: Inputs, maps: tuple[Tensor, Tensor], pixel_size: float
) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """Maps with bright density, and the particles with the sign that gives it, where the user left it open."""
    first, second = maps
    if config.contrast != AUTO or contrast_sign(0.5 * (first + second), inputs.mask_diameter, pixel_size) > 0:
        return inputs, (first, second)
    particles = replace(inputs.particles, sign=-inputs.particles.sign)
    found = "the map is darker than its surroundings: the particles are taken as dark (--contrast light forbids it)"
    return replace(inputs, particles=particles, warnings=(*inputs.warnings, found, DARK)), (-first, -second)


def start_from_poses(config: RunConfig, inputs: Inputs) -> Start:
    """Maps of two halves at the poses of the file, and how far to trust them: to ``ini_high``, or where their FSC falls below 0.5.

    Raises
    ------
    DataError
        DATA044: the file has no angles, or the same for all.
    """
    particles, box_a = inputs.particles, inputs.particles.box * inputs.particles.pixel_size
    if particles.rotations is None:
        raise DataError(
            "DATA044",
            f"{config.particles} has no angles to refine",
            "find them with `cryorbit reconstruct`, or give the STAR or .cs file of a refinement",
        )
    if len(particles) > 1 and np.ptp(particles.rotations, axis=0).max() < 1e-6:
        raise DataError(
            "DATA044",
            f"all {len(particles)} particles of {config.particles} have the same angles",
            "find them with `cryorbit reconstruct`, or give the STAR or .cs file of a refinement",
        )
    mask = read_mask(config.mask, particles.box) if config.mask else None
    rotations = torch.from_numpy(particles.rotations).float()
    if particles.shifts is None:
        inputs = replace(inputs, warnings=(*inputs.warnings, "the file has no origins: shifts start at 0"))
    shifts = torch.zeros(len(rotations), 2) if particles.shifts is None else torch.from_numpy(particles.shifts).float()
    stack = full_stack(config, inputs)
    halves = halves_from_poses(
        stack,
        rotations,
        shifts / stack.pixel_size,
        inputs.half_set,
        mask_diameter=inputs.mask_diameter,
        symmetry=point_group(inputs.symmetry).float(),
        mask=mask,
    )
    inputs, maps = settle_contrast(config, inputs, halves.references, stack.pixel_size)
    agreed = last_shell(halves.correlation, _TRUSTED_FSC)
    fewest = min(round(_FEWEST_PERIODS * box_a / inputs.mask_diameter), particles.box // 2)
    if agreed < fewest:
        warning = (
            f"the half maps of the poses in the file agree only to {box_a / max(agreed, 1):.0f} A (FSC 0.5): they may be wrong; "
            "`cryorbit reconstruct` starts without them"
        )
        inputs = replace(inputs, warnings=(*inputs.warnings, warning))
    radius = round(box_a / config.ini_high) if config.ini_high else agreed
    return Start(
        inputs,
        maps,
        min(max(radius, fewest), particles.box // 2),
        rotations[:, None],
        shifts[:, None],
        torch.ones(len(rotations)),
        mask,
    )


def read_mask(path: str, box: int) -> Float[Tensor, "d d d"]:
    """A mask map in the frame of the poses, checked: the particles' box, values from 0 to 1."""
    data = read_volume(Path(path))[0]
    if data.shape[-1] != box:
        raise ConfigError("CONF024", f"the mask {path} has a box of {data.shape[-1]} px, the particles have {box}")
    if data.min() < -1e-3 or data.max() > 1 + 1e-3 or data.max() < 0.5:
        raise ConfigError(
            "CONF024",
            f"the mask {path} has values from {data.min():.3g} to {data.max():.3g}, expected 0 (solvent) to 1 (molecule)",
        )
    return torch.from_numpy(data).float().clamp(0.0, 1.0)
