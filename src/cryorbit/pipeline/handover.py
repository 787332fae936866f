"""From ab initio to refinement: one frame for both halves, contrast, symmetry, every particle's candidate poses, and the evidence."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.methods.halves import Agreement
from cryorbit.methods.marginal import Marginal
from cryorbit.metrics.masks import contrast_sign
from cryorbit.metrics.symmetry import SymmetryFinding, detect_symmetry
from cryorbit.pipeline.config import AUTO, RunConfig
from cryorbit.pipeline.inputs import DARK, Inputs
from cryorbit.pipeline.verdict import Evidence
from cryorbit.training.checkpoint import load_checkpoint, save_checkpoint
from cryorbit.types import Volume

_ASSIGN_BATCH = 2000
_SMALLEST_BOX = 16  # in which a symmetry is looked for
_STANDARD_ERRORS = 2.0  # by which a symmetry may lower the held-out likelihood and still be kept


@dataclass(frozen=True)
class Handover:
    """What refinement starts from.

    Attributes
    ----------
    inputs
        With the sign of the images that was found, where it was left open.
    maps
        One per half, in one frame, bright.
    rotations, shifts
        (N, M, 3, 3) and (N, M, 2) angstrom, the most probable pose of each particle first.
    effective
        (N,) effective number of poses.
    evidence
        How the halves compare, for the verdict.
    """

    inputs: Inputs
    maps: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    rotations: Float[Tensor, "n m 3 3"]
    shifts: Float[Tensor, "n m 2"]
    effective: Float[Tensor, " n"]
    evidence: Evidence


def hand_over(config: RunConfig, inputs: Inputs, engine: Marginal, folder: Path, fingerprint: str) -> Handover:
    """Compare and align the halves, settle the contrast, and pose every particle."""
    agreement = engine.agreement()
    assigned = _assign(engine, folder / "assigned.safetensors", fingerprint)
    effective = assigned["effective"]
    inputs, maps = _settle_contrast(config, inputs, engine)
    found = symmetry_of(engine)
    if found.name != "C1":  # equivalent poses are one pose
        group = found.rotation.T @ point_group(found.name).float() @ found.rotation
        agreement = engine.agreement(group)
        effective = (effective / len(group)).clamp_min(1.0)
    evidence = _evidence(engine, agreement, effective)
    return Handover(inputs, maps, assigned["rotations"], assigned["shifts"], effective, evidence)


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
    periods, posed, apart = engine.periods(float(agreement.reach)), agreement.posed, agreement.pose_deg
    if bool(engine.joined):
        periods, posed, apart = engine.at_pairing.tolist()
    spread = float(engine.intensities().std())
    return Evidence(bool(engine.joined), periods, posed, apart, float(effective.median()), spread)


def _settle_contrast(config: RunConfig, inputs: Inputs, engine: Marginal) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """The ab initio maps with bright density, and the particles with the sign that gives it, where the user left it open."""
    first, second = engine.maps()
    stack = engine.stack
    if config.contrast != AUTO or contrast_sign(0.5 * (first + second), inputs.mask_diameter, stack.pixel_size) > 0:
        return inputs, (first, second)
    particles = replace(inputs.particles, sign=-inputs.particles.sign)
    found = "the map is darker than its surroundings: the particles are taken as dark (--contrast light forbids it)"
    return replace(inputs, particles=particles, warnings=(*inputs.warnings, found, DARK)), (-first, -second)


def symmetry_of(engine: Marginal) -> SymmetryFinding:
    """Point group of the mean of the two maps of a run that imposed none; C1 for one that did."""
    nothing = SymmetryFinding("C1", torch.eye(3), torch.zeros(3), 1.0, ())
    if len(engine.symmetry) > 1 or engine.stack.box < _SMALLEST_BOX:
        return nothing
    stack = engine.stack
    first, second = engine.maps()
    mean = (0.5 * (first + second)).cpu()
    mean = mean * contrast_sign(mean, engine.mask_diameter, stack.pixel_size)
    shells = torch.zeros(stack.box // 2 + 1)
    shells[: len(engine.motion.fsc)] = engine.motion.fsc
    try:
        return detect_symmetry(Volume(mean, stack.pixel_size), mask_diameter=engine.mask_diameter, fsc=shells)
    except DataError:  # no density to look at: a map of noise
        return nothing


def symmetry_holds(plain: Marginal, symmetric: Marginal, found: SymmetryFinding) -> tuple[bool, str]:
    """Whether images of the other half are as likely after a run that imposed the symmetry as after one that did not."""
    radius = min(plain.radius(), symmetric.radius())
    gain = symmetric.held_out(radius) - plain.held_out(radius)
    mean, error = float(gain.mean()), float(gain.std()) / len(gain) ** 0.5
    kept = mean > -_STANDARD_ERRORS * error
    images = "images both halves have learnt from (they were joined)" if bool(symmetric.joined) else "held-out images"
    return kept, (
        f"symmetry {found.name} was found on the map (correlation {found.score:.2f}) and {'' if kept else 'not '}imposed: it changes the "
        f"log likelihood of {images} by {mean:+.2f} +- {error:.2f} (--symmetry {'C1' if kept else found.name} decides otherwise)"
    )
