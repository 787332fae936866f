"""From ab initio to refinement: one frame for both halves, contrast, symmetry, every particle's candidate poses, and the evidence."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.methods.halves import Agreement, symmetry_gain, unmoved
from cryorbit.methods.marginal import HALVES, Marginal
from cryorbit.metrics.masks import contrast_sign
from cryorbit.metrics.symmetry import SymmetryFinding, detect_symmetry
from cryorbit.pipeline.config import AUTO, RunConfig
from cryorbit.pipeline.inputs import DARK, Inputs
from cryorbit.pipeline.verdict import Evidence
from cryorbit.training.checkpoint import load_checkpoint, save_checkpoint
from cryorbit.types import Poses, Volume

_ASSIGN_BATCH = 2000
_STANDARD_ERRORS = 2.0  # by which a symmetry may lower the held-out likelihood and still be kept


@dataclass(frozen=True)
class Handover:
    """What refinement starts from.

    Attributes
    ----------
    inputs
        With the sign of the images and the symmetry that were found, where they were left open.
    maps
        One per half, in one frame, bright.
    rotations, shifts
        (N, M, 3, 3) and (N, M, 2) angstrom, the most probable pose of each particle first.
    effective
        (N,) effective number of poses.
    agreement, evidence
        How the halves compare, and what follows for the verdict.
    symmetry
        Name of the point group that goes on.
    """

    inputs: Inputs
    maps: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    rotations: Float[Tensor, "n m 3 3"]
    shifts: Float[Tensor, "n m 2"]
    effective: Float[Tensor, " n"]
    agreement: Agreement
    evidence: Evidence
    symmetry: str


def hand_over(config: RunConfig, inputs: Inputs, engine: Marginal, folder: Path, fingerprint: str) -> Handover:
    """Compare and align the halves, settle what the user left open, and pose every particle."""
    agreement = engine.agreement()
    assigned = _assign(engine, folder / "assigned.safetensors", fingerprint)
    inputs, maps = _settle_contrast(config, inputs, engine)
    found = _symmetry_of(engine, maps, agreement, inputs.mask_diameter)
    order = 1
    if found.name != "C1":  # equivalent poses are one pose
        group = found.rotation.T @ point_group(found.name).float() @ found.rotation
        agreement = engine.agreement(group)
        order = len(group)
    effective = assigned["effective"] / order
    evidence = _evidence(engine, agreement, effective)
    symmetry = "C1" if config.symmetry == AUTO else config.symmetry
    rotations, shifts = assigned["rotations"], assigned["shifts"]
    if config.symmetry == AUTO and found.name != "C1":
        scaled = replace(unmoved(1), rotation=found.rotation, shift=found.shift / engine.stack.pixel_size)
        kept, note = _held_out(engine, found, scaled)
        inputs = replace(inputs, warnings=(*inputs.warnings, note))
        if kept:
            symmetry = found.name
            in_angstrom = replace(scaled, shift=found.shift)
            poses = in_angstrom.framed(Poses(rotations.flatten(0, 1), shifts.flatten(0, 1)))
            rotations, shifts = poses.rotations.view_as(rotations), poses.shifts.view_as(shifts)
            maps = (scaled.moved(maps[0]), scaled.moved(maps[1]))
            inputs = replace(inputs, symmetry=point_group(symmetry).float())
    return Handover(inputs, maps, rotations, shifts, effective, agreement, evidence, symmetry)


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
    if config.contrast != AUTO or contrast_sign(0.5 * (first + second), inputs.mask_diameter, stack.pixel_size) > 0:
        return inputs, (first, second)
    particles = replace(inputs.particles, sign=-inputs.particles.sign)
    found = "the map is darker than its surroundings: the particles are taken as dark (--contrast light forbids it)"
    return replace(inputs, particles=particles, warnings=(*inputs.warnings, found, DARK)), (-first, -second)


def _symmetry_of(
    engine: Marginal, maps: tuple[Tensor, Tensor], agreement: Agreement, mask_diameter: float
) -> SymmetryFinding:
    """Point group of the mean of the two maps, of a run that imposed none."""
    nothing = SymmetryFinding("C1", torch.eye(3), torch.zeros(3), 1.0, ())
    if len(engine.symmetry) > 1 or engine.stack.box < 16:
        return nothing
    mean = Volume(0.5 * (maps[0] + maps[1]).cpu(), engine.stack.pixel_size)
    shells = torch.zeros(engine.stack.box // 2 + 1)
    shells[: len(agreement.fsc)] = agreement.fsc
    try:
        return detect_symmetry(mean, mask_diameter=mask_diameter, fsc=shells)
    except DataError:  # no density to look at: a map of noise
        return nothing


def _held_out(engine: Marginal, found: SymmetryFinding, axes: Agreement) -> tuple[bool, str]:
    """Whether images of the other half are as likely under the symmetrised maps as under the maps as they are."""
    group = point_group(found.name).float()
    gains = torch.cat(
        [
            symmetry_gain(run, volume, engine.sample(3 - half), engine.grids(run, engine.radius()), group, axes)
            for half, run, volume in zip(HALVES, engine.winners(), engine.maps(), strict=True)
        ]
    )
    mean, error = float(gains.mean()), float(gains.std()) / len(gains) ** 0.5
    kept = mean > -_STANDARD_ERRORS * error
    what = "imposed" if kept else "not imposed"
    return kept, (
        f"symmetry {found.name} found (correlation {found.score:.2f}) and {what}: it changes the log likelihood of held-out images by "
        f"{mean:.2f} +- {error:.2f} each (--symmetry {'C1' if kept else found.name} decides otherwise)"
    )
