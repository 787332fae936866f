"""Continuous refinement of approximate poses, two independent halves, to the resolution their agreement supports.

* **volume**: voxels, one map per half (Wiener-filtered by the halves' Fourier shell correlation).
* **poses**: one rotation and shift per particle, Gauss-Newton on so(3) x R^2 (``poses/table.py``); several starts at the first sweep.
* **objective**: Gaussian image likelihood, one noise variance per spectral shell.

A sweep moves every particle against its own half's map, then rebuilds both maps; the Fourier radius follows the halves' agreement outwards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups import so3
from cryorbit.groups.point import keep_axes
from cryorbit.methods.online_em import rotation_grid
from cryorbit.metrics.align import improve_alignment
from cryorbit.metrics.fsc import masked_fsc
from cryorbit.metrics.masks import mask_from_map, soft_sphere
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk, resize_volume
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import (
    Accumulator,
    SlicingGrid,
    insert_slices,
    slice_grid,
    slicing_grid,
    volume_from_accumulator,
)
from cryorbit.physics.spectrum import mean_weight, shell_mean
from cryorbit.poses.grid import expectation, shift_grid, with_half_turns
from cryorbit.poses.table import refine_poses
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import FourierStack

_ALIGNED_PX = 0.05  # Fourier or real pixels by which the halves may lie off each other


@dataclass(frozen=True)
class RefinementConfig:
    """Settings of the refinement.

    Attributes
    ----------
    sweeps
        Most passes over the particles.
    batch
        Particles at a time.
    iterations
        Gauss-Newton steps per particle and sweep.
    radius_growth
        Largest factor between the radii of successive sweeps.
    fsc_radius
        The radius reaches to the last shell where the halves correlate by this much, plus two.
    fit_shift
        Whether shifts are refined.
    search_order, search_every
        Every so many sweeps (0, or shifts fixed: never) each particle is scored against a whole grid of rotations of this HEALPix order,
        so that it can leave a wrong mode.
    """

    sweeps: int = 8
    batch: int = 500
    iterations: int = 6
    radius_growth: float = 1.5
    fsc_radius: float = 0.2
    fit_shift: bool = True
    search_order: int = 2
    search_every: int = 2


class Refinement:
    """Two-half refinement, one sweep per step of ``training.loop.run``.

    Parameters
    ----------
    stack
        Particles as Fourier pixels up to (or near) Nyquist.
    config
        Settings.
    mask_diameter
        Particle diameter in angstrom.
    symmetry
        (S, 3, 3) point-group rotations.
    start
        Map to start each half from, in one frame (any box over the same extent; transform values on the stack's scale).
    radius
        Fourier radius up to which ``start`` is trusted.
    candidates
        (N, M, 3, 3) rotations and (N, M, 2) shifts in pixels of the stack's working box: where to start each particle.
    half_set
        (N,) 1 or 2.
    intensity
        (N,) how much stronger than the map each image is; None takes all alike.
    """

    name = "refine"

    def __init__(
        self,
        stack: FourierStack,
        config: RefinementConfig,
        *,
        mask_diameter: float,
        symmetry: Float[Tensor, "s 3 3"],
        start: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]],
        radius: int,
        candidates: tuple[Float[Tensor, "n m 3 3"], Float[Tensor, "n m 2"]],
        half_set: Int[Tensor, " n"],
        intensity: Float[Tensor, " n"] | None = None,
    ) -> None:
        self.stack, self.config = stack, config
        device = stack.device
        self.symmetry = symmetry.to(device)
        self.candidates = candidates
        self.half_set = half_set
        self.mask = soft_sphere(stack.box, 0.5 * mask_diameter / stack.pixel_size, 3.0).to(device)
        self.limit = int(stack.disk.shell.max())
        self.search_radius = radius
        shells = self.limit + 2
        self.intensity = torch.ones(len(stack)) if intensity is None else intensity.cpu()
        first, second = (resize_volume(one.to(device), stack.box) * self.mask for one in start)
        self.tensors: State = {
            "rotations": candidates[0][:, 0].clone(),
            "shifts": candidates[1][:, 0].clone(),
            "reference_1": first,
            "reference_2": second,
            "half_1": first.clone(),
            "half_2": second.clone(),
            "map": 0.5 * (first + second),
            "noise": torch.zeros(shells),
            "fsc": torch.zeros(stack.box // 2 + 1),
            "log_likelihood": torch.zeros(len(stack)),
            "pose_change": torch.tensor(float("inf")),
            "radius": torch.tensor(radius),
            "previous_radius": torch.tensor(0),
        }

    def state(self) -> State:
        """Everything a resumed run needs."""
        return dict(self.tensors)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        self.tensors = {
            k: v.to(self.stack.device) if k.startswith(("reference", "half", "map")) else v for k, v in state.items()
        }

    def total_steps(self) -> int:
        """Most sweeps."""
        return self.config.sweeps

    def finished(self) -> bool:
        """Whether neither the radius nor the poses change any more."""
        same = int(self.tensors["radius"]) == int(self.tensors["previous_radius"])
        still = float(self.tensors["pose_change"]) < 0.05 / max(int(self.tensors["radius"]), 1)
        return same and still

    # -- one sweep --------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float | str]:
        """Refine every pose against its half's map, rebuild the maps, compare the halves."""
        t = self.tensors
        radius = int(t["radius"])
        if index == 0:
            t["noise"] = self._initial_noise()
        before = t["rotations"].clone()
        every = self.config.search_every
        search = bool(every) and self.config.fit_shift and index % every == 1
        accumulators, power, count = [], torch.zeros_like(t["noise"]), 0
        for half in (1, 2):
            members = torch.nonzero(self.half_set == half)[:, 0]
            grid = slicing_grid(t[f"reference_{half}"], self.stack.disk.radius)
            for chosen in members.split(self.config.batch):
                self._refine(grid, chosen, radius, self.candidates if index == 0 else None)
                if search:
                    self._search(grid, chosen, radius)
                power += self._residual(grid, chosen)
                count += len(chosen)
            accumulators.append(self._inserted(members))
            self._unfiltered(half, accumulators[-1])
        if self._lay_second_on_first():
            accumulators[1] = self._inserted(members)
            self._unfiltered(2, accumulators[1])
        self._rebuild(accumulators)
        inside = torch.arange(len(t["noise"])) <= self.limit
        t["noise"] = torch.where(inside, torch.maximum(power / count, 1e-6 * t["noise"]), t["noise"])
        change = so3.distance(before, t["rotations"])
        t["pose_change"] = change.median()
        t["previous_radius"] = t["radius"]
        t["radius"] = torch.tensor(self._next_radius(radius))
        box_a = self.stack.box * self.stack.pixel_size
        return {
            "radius": float(radius),
            "resolution_A": box_a / max(self._agreement(0.143), 1e-3),
            "pose_change_deg": float(torch.rad2deg(change.median())),
            "log_likelihood": float(t["log_likelihood"].mean()),
        }

    def _precision(self, radius: int) -> tuple[FourierDisk, Int[Tensor, " q"], Float[Tensor, " q"]]:
        disk, keep = self.stack.at_radius(radius)
        return disk, keep, disk.weight / self.tensors["noise"].to(disk.weight.device)[disk.shell]

    def _initial_noise(self) -> Float[Tensor, " k"]:
        """Power of a sample of the images per shell: an upper bound that the first sweep replaces."""
        sample = torch.arange(0, len(self.stack), max(1, len(self.stack) // 500))[:500]
        return self._shell_mean(self.stack.images(sample).abs().square().mean(dim=0))

    def _shell_mean(self, values: Float[Tensor, " p"]) -> Float[Tensor, " k"]:
        return shell_mean(values, self.stack.disk.to(values.device), self.limit + 2).cpu()

    def _ctf(self, chosen: Int[Tensor, " b"]) -> Float[Tensor, "b p"]:
        return self.stack.ctf(chosen) * self.intensity[chosen, None].to(self.stack.device)

    def _refine(
        self, grid: SlicingGrid, chosen: Int[Tensor, " b"], radius: int, candidates: tuple[Tensor, Tensor] | None
    ) -> None:
        """Gauss-Newton for the particles ``chosen``; with ``candidates``, from each of them, keeping the best."""
        t = self.tensors
        if candidates is None:
            starts = [(t["rotations"][chosen], t["shifts"][chosen])]
        else:
            starts = [(candidates[0][chosen, m], candidates[1][chosen, m]) for m in range(candidates[0].shape[1])]
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for rotation, shift in starts:
            r, s, loss = self._descend(grid, chosen, radius, rotation, shift)
            if best is None:
                best = (r, s, loss)
            else:
                win = loss < best[2]
                best = (
                    torch.where(win[:, None, None], r, best[0]),
                    torch.where(win[:, None], s, best[1]),
                    torch.where(win, loss, best[2]),
                )
        assert best is not None
        t["rotations"][chosen], t["shifts"][chosen] = best[0].cpu(), best[1].cpu()
        t["log_likelihood"][chosen] = -best[2].to(torch.float32).cpu()

    def _descend(
        self, grid: SlicingGrid, chosen: Int[Tensor, " b"], radius: int, rotations: Tensor, shifts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Levenberg-Marquardt for the particles ``chosen`` from the poses given: poses and loss."""
        disk, keep, precision = self._precision(radius)
        images, ctf = self.stack.images(chosen)[:, keep], self._ctf(chosen)[:, keep]
        return refine_poses(
            grid,
            images,
            ctf,
            precision,
            rotations.to(images.device),
            shifts.to(images.device),
            disk,
            iterations=self.config.iterations,
            fit_shift=self.config.fit_shift,
        )

    def _search(self, grid: SlicingGrid, chosen: Int[Tensor, " b"], radius: int) -> None:
        """Refine from the best rotation of the whole grid the particles that fit there elsewhere than where they are; keep the better."""
        t, low = self.tensors, self.search_radius
        disk, keep, precision = self._precision(low)
        spread = float(t["shifts"].std())
        shifts = shift_grid(3 * spread, min(0.38 * self.stack.box / low, max(3 * spread, 1e-3)), spread)
        rotations = rotation_grid(self.config.search_order, self.symmetry)
        images, ctf = self.stack.images(chosen)[:, keep], self._ctf(chosen)[:, keep]
        slices = slice_grid(grid, rotations, disk)
        found = expectation(images, ctf, slices, precision, shifts, disk, sums=False)
        best = with_half_turns(rotations)[found.best[:, 0]].cpu()
        mates = best[:, None] @ self.symmetry.cpu()
        apart = so3.distance(mates, t["rotations"][chosen, None].expand_as(mates)).amin(dim=1)
        away = apart > 1.2 * so3.grid_spacing(self.config.search_order)
        if not bool(away.any()):
            return
        others = chosen[away]
        start = best[away], shifts.points[found.best_shift[away, 0].cpu()]
        there = self._descend(grid, others, radius, *start)
        here = self._descend(grid, others, radius, t["rotations"][others], t["shifts"][others])
        win = there[2] < here[2]
        t["rotations"][others] = torch.where(win[:, None, None], there[0], here[0]).cpu()
        t["shifts"][others] = torch.where(win[:, None], there[1], here[1]).cpu()
        t["log_likelihood"][others] = -torch.where(win, there[2], here[2]).to(torch.float32).cpu()

    def _residual(self, grid: SlicingGrid, chosen: Int[Tensor, " b"]) -> Float[Tensor, " k"]:
        """Power per shell of what the reference does not explain, summed over the particles."""
        t, disk = self.tensors, self.stack.disk.to(self.stack.device)
        images, ctf = self.stack.images(chosen), self._ctf(chosen)
        rotations, shifts = t["rotations"][chosen].to(images.device), t["shifts"][chosen].to(images.device)
        residual = images - forward(grid, rotations, shifts, disk, ctf)
        return self._shell_mean(residual.abs().square().sum(dim=0))

    def _inserted(self, members: Int[Tensor, " n"]) -> Accumulator:
        """The particles ``members`` at their poses, over the whole disk."""
        t, disk = self.tensors, self.stack.disk.to(self.stack.device)
        out: Accumulator | None = None
        for chosen in members.split(self.config.batch):
            images, ctf = self.stack.images(chosen), self._ctf(chosen)
            rotations, shifts = t["rotations"][chosen].to(images.device), t["shifts"][chosen].to(images.device)
            values = images * ctf * phase_ramp(shifts, disk).conj()
            for element in self.symmetry:
                out = insert_slices(values, ctf.square(), rotations @ element, disk, out=out)
        assert out is not None
        return out

    def _unfiltered(self, half: int, accumulator: Accumulator) -> None:
        weight = mean_weight(accumulator, self.stack.box // 2 + 2)
        self.tensors[f"half_{half}"] = volume_from_accumulator(accumulator, 1e-3 * weight)

    def _lay_second_on_first(self) -> bool:
        """Turn and shift the poses of half 2 so that its map lies on that of half 1: nothing else holds the two together."""
        t, mask = self.tensors, self._solvent_mask()
        still = torch.eye(3), torch.zeros(3), False
        rotation, shift, _ = improve_alignment(t["half_2"] * mask, t["half_1"] * mask, still, rounds=1)
        rotation, shift = keep_axes(rotation, shift, self.symmetry.cpu())
        angle = float(so3.distance(rotation, torch.eye(3)))
        if angle * self.limit < _ALIGNED_PX and float(shift.norm()) < _ALIGNED_PX:
            return False
        second = self.half_set == 2
        turned = t["rotations"][second] @ rotation.T
        t["rotations"][second] = turned
        t["shifts"][second] -= (turned @ shift)[:, :2]
        return True

    def _rebuild(self, accumulators: list[Accumulator]) -> None:
        """FSC of the halves inside the solvent mask, and the filtered references (Wiener; Scheres 2012 eq. 9)."""
        t = self.tensors
        shells = self.stack.box // 2 + 2
        first, second = accumulators
        mask = self._solvent_mask()
        randomness = torch.Generator().manual_seed(0)
        t["fsc"] = masked_fsc(t["half_1"].cpu(), t["half_2"].cpu(), mask.cpu(), randomness).corrected.float()
        beyond = torch.arange(len(t["fsc"])) > self._agreement(0.143)
        trusted = torch.where(beyond, 0.0, t["fsc"])  # chance correlations past the crossing are noise
        correlation = torch.cat([trusted, trusted[-1:]]).clamp(1e-3, 0.999)
        correlation[0] = 0.999
        ssnr = (correlation / (1 - correlation)).to(self.mask.device)
        for name, accumulator in (("reference_1", first), ("reference_2", second)):
            t[name] = volume_from_accumulator(accumulator, mean_weight(accumulator, shells) / ssnr) * mask
        both = first + second
        t["map"] = volume_from_accumulator(both, mean_weight(both, shells) / (2 * ssnr))

    def _solvent_mask(self) -> Float[Tensor, "d d d"]:
        """The molecule's own soft mask inside the sphere: what lies outside it in a reference is noise."""
        both = 0.5 * (self.tensors["half_1"] + self.tensors["half_2"]) * self.mask
        try:
            return self.mask * mask_from_map(both, self.stack.pixel_size).to(self.mask)
        except DataError:  # nothing bright enough to draw a mask around
            return self.mask

    def _agreement(self, threshold: float) -> float:
        """Last shell before the FSC first falls below ``threshold``."""
        below = torch.nonzero(self.tensors["fsc"][1:] < threshold)
        return float(below[0]) if len(below) else float(len(self.tensors["fsc"]) - 1)

    def _next_radius(self, radius: int) -> int:
        reach = int(self._agreement(self.config.fsc_radius)) + 2
        return max(min(reach, int(radius * self.config.radius_growth), self.limit), min(radius, 4))
