"""From ab initio to refinement: one frame for both halves, contrast, symmetry, every particle's candidate poses, and the evidence."""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.methods.halves import HALVES, Agreement, members_of, unmoved
from cryorbit.methods.marginal import Marginal
from cryorbit.methods.symmetric import SymmetryTest, group_of, symmetrised
from cryorbit.metrics.symmetry import SymmetryFinding
from cryorbit.pipeline.config import AUTO, RunConfig
from cryorbit.pipeline.inputs import Inputs
from cryorbit.pipeline.start import Start, fourier_stack, inverted_contrast, is_dark
from cryorbit.pipeline.verdict import Evidence
from cryorbit.poses.grid import distinct_modes, recounted, with_half_turns
from cryorbit.training.checkpoint import State, kept
from cryorbit.types import Poses

_ASSIGN_BATCH = 2000

SHIFTS_CUT = "the particles' shifts spread more widely than ab initio searches: extract them again, centred, or widen abinitio.shift_range"


def hand_over(config: RunConfig, inputs: Inputs, engine: Marginal, folder: Path, fingerprint: str) -> Start:
    """Compare and align the halves, settle symmetry and contrast, and pose every particle."""
    agreement, mates = engine.agreement(), torch.eye(3)[None]
    found = engine.found_symmetry()
    test = None if found.name == "C1" else engine.test_symmetry(found)
    if config.symmetry == AUTO:
        inputs = replace(inputs, warnings=(*inputs.warnings, symmetry_note(engine, test)))
    if test and test.allowed and config.symmetry == AUTO:
        impose(engine, found)
        inputs, agreement = replace(inputs, symmetry=found.name), engine.agreement()
    elif test and test.allowed:  # equivalent poses are one pose
        agreement, mates = test.agreement, group_of(found)
    assigned = _assign_all(engine, folder / "assigned.safetensors", fingerprint)
    first, second = engine.maps()
    dark = is_dark(config, 0.5 * (first + second), inputs.mask_diameter, engine.stack.pixel_size)
    inputs, maps = (inverted_contrast(inputs), (-first, -second)) if dark else (inputs, (first, second))
    effective = assigned["effective"] if len(mates) == 1 else (assigned["effective"] / len(mates)).clamp_min(1.0)
    evidence = _evidence(engine, agreement, effective, float(assigned["intensity"].std()))
    if engine.shifts_cut():
        inputs = replace(inputs, warnings=(*inputs.warnings, SHIFTS_CUT))
    return Start(
        inputs,
        fourier_stack(config, inputs),
        maps,
        engine.radius(),
        assigned["rotations"],
        assigned["shifts"],
        assigned["intensity"],
        effective=effective,
        evidence=evidence,
        mates=mates,
    )


def _assign_all(engine: Marginal, path: Path, fingerprint: str) -> dict[str, Tensor]:
    """Every particle's most probable grid poses under the ab initio maps, and its intensity; kept, so that a resumed run does not repeat it.

    Intensities are divided by the mean of their half: only ratios within a half mean something.
    """
    count, modes = len(engine.stack), engine.config.modes
    shapes = {
        "rotations": (count, modes, 3, 3),
        "shifts": (count, modes, 2),
        "effective": (count,),
        "intensity": (count,),
    }

    def make() -> State:
        parts = [assign(engine, chosen) for chosen in torch.arange(count).split(_ASSIGN_BATCH)]
        tensors = {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(shapes)}
        for own in engine.members.values():
            tensors["intensity"][own] /= tensors["intensity"][own].mean()
        return tensors

    return kept(path, fingerprint, shapes, make)


def assign(
    engine: Marginal, chosen: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "b m 3 3"], Float[Tensor, "b m 2"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Distinct probable poses of the particles ``chosen`` under the map of their own half, in the frame of the first.

    Parameters
    ----------
    engine
        A finished engine, its halves laid on each other (:meth:`Marginal.agreement`).
    chosen
        (B,) particles.

    Returns
    -------
    rotations, shifts, effective, intensity
        (B, M, 3, 3) the most probable first, (B, M, 2) angstrom, (B,) effective number of poses, as the grid of
        ``config.order`` counts them, (B,) how much stronger than the map each is.
    """
    modes = engine.config.modes
    rotations = torch.empty(len(chosen), modes, 3, 3)
    shifts = torch.empty(len(chosen), modes, 2)
    effective, intensity = torch.empty(len(chosen)), torch.empty(len(chosen))
    radius = engine.radius()
    for half, run in zip(HALVES, engine.winners(), strict=True):
        own = members_of(engine.half_set[chosen], half)
        if not len(own):
            continue
        grids = engine.grids(run, radius)
        every = with_half_turns(grids.rotations)
        result = run.expect(chosen[own], grids, run.intensity_of(chosen[own]), modes=8 * modes)
        best, best_shift = distinct_modes(result, every, modes, 1.2 * so3.grid_spacing(engine.order()))
        found = Poses(every[best.flatten()].cpu(), grids.shifts.points[best_shift.flatten().cpu()])
        if half == 2:
            found = engine.motion.framed(found)
        rotations[own] = found.rotations.view(len(own), -1, 3, 3)
        shifts[own] = found.shifts.view(len(own), -1, 2) * engine.stack.pixel_size
        intensity[own] = run.fresh_intensity(chosen[own], result).cpu()
        effective[own] = recounted(result.effective.cpu(), engine.order(), engine.config.order)
    return rotations, shifts, effective, intensity


def _evidence(engine: Marginal, agreement: Agreement, effective: Float[Tensor, " n"], intensity_sd: float) -> Evidence:
    """What ab initio knows about itself; independent agreement is only what there was before the halves were joined."""
    periods, posed, apart = engine.periods(float(agreement.reach)), agreement.posed, agreement.pose_deg
    if bool(engine.joined):
        periods, posed, apart = engine.at_pairing.tolist()
    return Evidence(bool(engine.joined), periods, posed, apart, float(effective.median()), intensity_sd)


def symmetry_note(engine: Marginal, test: SymmetryTest | None) -> str:
    """What became of the search for a symmetry, in one sentence."""
    if test is None:
        return "no symmetry was found on the ab initio map: C1"
    name, kept = test.found.name, test.allowed
    images = (
        "images both halves have learnt from (they were joined)" if bool(engine.joined) else "images of the other half"
    )
    return (
        f"symmetry {name} was found on the map (correlation {test.found.score:.2f}) and {'' if kept else 'not '}imposed: averaging each "
        f"half's map over it changes the log likelihood of {images} by {test.gain:+.2f} +- {test.error:.2f} (--symmetry "
        f"{'C1' if kept else name} decides otherwise)"
    )


def impose(engine: Marginal, found: SymmetryFinding) -> None:
    """Average each half's map over the symmetry, its axes where they belong; from now on the engine imposes the group."""
    group = point_group(found.name).float().to(engine.stack.device)
    for run, volume in zip(engine.winners(), engine.maps(), strict=True):
        run.volume = symmetrised(volume, found, engine.stack.pixel_size, framed=True) * run.mask
        run.symmetry = group
    engine.symmetry, engine.motion = group, unmoved(engine.stack.box // 2 + 1)
