"""What refinement starts from, and how to get it from the poses a particle file carries (``cryorbit refine``)."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.groups.point import point_group
from cryorbit.methods.half_maps import HalfMaps, halves_from_poses
from cryorbit.metrics.fsc import fsc, last_shell
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
    stack
        The particles' Fourier pixels to Nyquist.
    maps
        One per half, in one frame, bright.
    radius
        Fourier radius up to which they are trusted, in pixels of the box.
    rotations, shifts
        (N, M, 3, 3) and (N, M, 2) angstrom, the most probable pose of each particle first.
    intensity
        (N,) how much stronger than the map each image is.
    effective, evidence
        (N,) effective number of poses and how the halves compare; None for poses that came with the particles.
    mates
        (S, 3, 3) rotations that leave the map as it is though none are imposed, in its frame; the identity among them.
    doubt
        Why poses that came with the particles cannot be trusted, if so.
    """

    inputs: Inputs
    stack: FourierStack
    maps: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    radius: int
    rotations: Float[Tensor, "n m 3 3"]
    shifts: Float[Tensor, "n m 2"]
    intensity: Float[Tensor, " n"]
    effective: Float[Tensor, " n"] | None = None
    evidence: Evidence | None = None
    mates: Float[Tensor, "s 3 3"] = field(default_factory=lambda: torch.eye(3)[None])
    doubt: str = ""


def fourier_stack(config: RunConfig, inputs: Inputs, radius: float | None = None) -> FourierStack:
    """The particles' Fourier pixels up to ``radius`` of them, default Nyquist."""
    return FourierStack(
        inputs.particles,
        0.5 * inputs.particles.box if radius is None else radius,
        mask_diameter=inputs.mask_diameter,
        memory_gib=config.memory_gib,
        device=inputs.device,
    )


def is_dark(config: RunConfig, volume: Tensor, mask_diameter: float, pixel_size: float) -> bool:
    """Whether a first map, masked by no more than a sphere, is dark, where the user left the sign of the images open."""
    return config.contrast == AUTO and contrast_sign(volume, mask_diameter, pixel_size) < 0


def inverted_contrast(inputs: Inputs) -> Inputs:
    """The particles with the other sign, and a word about it."""
    found = "the map is darker than its surroundings: the particles are taken as dark (--contrast light forbids it)"
    particles = replace(inputs.particles, sign=-inputs.particles.sign)
    return replace(inputs, particles=particles, warnings=(*inputs.warnings, found, DARK))


def start_from_poses(config: RunConfig, inputs: Inputs) -> Start:
    """Maps of two halves at the poses of the file, and how far to trust them: to ``ini_high``, or where their FSC falls below 0.5."""
    particles, box_a = inputs.particles, inputs.particles.box * inputs.particles.pixel_size
    rotations = torch.as_tensor(particles.rotations, dtype=torch.float32)
    shifts = torch.zeros(len(rotations), 2)
    if particles.shifts is not None:
        shifts = torch.from_numpy(particles.shifts).float()

    def made(stack: FourierStack, symmetry: str) -> HalfMaps:
        group = point_group(symmetry).float()
        return halves_from_poses(
            stack,
            rotations,
            shifts / stack.pixel_size,
            inputs.half_set,
            mask_diameter=inputs.mask_diameter,
            symmetry=group,
            mask=inputs.mask,
        )

    stack = fourier_stack(config, inputs)
    halves = made(stack, inputs.symmetry)
    if is_dark(config, halves.unfiltered, inputs.mask_diameter, stack.pixel_size):
        inputs = inverted_contrast(inputs)
        stack = fourier_stack(config, inputs)
        halves = made(stack, inputs.symmetry)
    agreed = last_shell(halves.correlation, _TRUSTED_FSC)
    fewest = min(round(_FEWEST_PERIODS * box_a / inputs.mask_diameter), particles.box // 2)
    doubt = ""
    if agreed < fewest:
        doubt = (
            f"the half maps of the poses in the file agree only to {box_a / max(agreed, 1):.0f} A (FSC 0.5), so most poses may be wrong; "
            "`cryorbit reconstruct` starts without them"
        )
    if inputs.symmetry != "C1":
        plain = made(stack, "C1")
        alike = last_shell(fsc(plain.joint.cpu(), halves.joint.cpu()), _TRUSTED_FSC)
        if alike < 0.5 * last_shell(plain.correlation, _TRUSTED_FSC):
            warning = (
                f"the map of these poses does not look {inputs.symmetry}: with and without it maps agree only to "
                f"{box_a / max(alike, 1):.0f} A (FSC 0.5); is the group right, and do its axes lie where RELION has them?"
            )
            inputs = replace(inputs, warnings=(*inputs.warnings, warning))
    radius = max(round(box_a / config.ini_high), 2) if config.ini_high else max(agreed, fewest)
    return Start(
        inputs,
        stack,
        halves.references,
        min(radius, particles.box // 2),
        rotations[:, None],
        shifts[:, None],
        torch.ones(len(rotations)),
        doubt=doubt,
    )
