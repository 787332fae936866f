"""Refinement of approximate poses to the resolution the halves' agreement supports: two independent halves, expectation-maximisation.

* **volume**: one map per half, voxels or a neural field (``methods/map_models.py``), under the prior the halves' FSC implies.
* **poses**: the posterior over rotation x shift around up to ``modes`` modes per particle: Gauss-Newton on so(3) x R^2 to each mode
  (``poses/table.py``), weighted samples around it (``poses/local.py``).
* **objective**: marginal Gaussian image likelihood, one noise variance per spectral shell.

A sweep moves every particle's modes against its own half's map and samples its posterior, then rebuilds both maps from all samples; the
Fourier radius follows the halves' agreement outwards.
"""

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.methods.defocus import DefocusSearch
from cryorbit.methods.half_maps import compared, insert_posed, motion_onto, solvent_mask, unfiltered
from cryorbit.methods.halves import HALVES, members_of
from cryorbit.methods.map_models import map_model
from cryorbit.methods.online_em import rotation_grid
from cryorbit.methods.refinement_config import RefinementConfig
from cryorbit.metrics.align import framed
from cryorbit.metrics.fsc import last_shell
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import Columns, FourierDisk, resize_volume
from cryorbit.physics.slicing import Accumulator, SlicingGrid, slice_grid, slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.local import PoseSamples, local_posterior, sample_points
from cryorbit.poses.posterior import PosedParticles, PosePosterior
from cryorbit.poses.search import GridSearch, Starts
from cryorbit.poses.widening import map_widening
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack

_SEARCH_PERIODS = 10.5  # per particle diameter: where ab initio's grid of rotations ends, and this one's
_BATCH_PIXELS = 2**21  # Fourier pixels read at a time; a particle may need ten times as much memory for its starts
# Places of the whole grid from which modes are looked for, and how far apart, in the grid's spacing: in a sweep, where a map holds the noise of
# the very image and more search finds more of it; and at last, under the other half's map.
_STARTS, _FINAL_STARTS = (1, 1.2), (8, 0.7)
# Poses drawn around each mode for the last posterior, where particles have one mode each and where they have several; and how wide
_FEW_SAMPLES, _FINAL_SAMPLES, _FINAL_WIDEN = 16, 48, 1.5
_SINGLE = 1.02  # modes per particle: where there are fewer, none are looked for elsewhere at last
_JUDGED = 500  # particles of a half by which the maps' errors are judged
_NO_MASS = 1e-3  # of a particle's mass: modes with less are not followed
_STILL_PX = 0.02  # Fourier pixels at the rim by which settled poses move in a sweep: what is left is some times that
_LEAST_GAIN = 0.05  # nats per particle and sweep: below, the poses move by a seventh of their spread together, or less


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
    solvent
        (D, D, D) mask of the molecule, 0 to 1; None draws one around the mean of the halves at each sweep.
    volume
        What a map is made of: ``voxel`` or ``neural``.
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
        solvent: Float[Tensor, "d d d"] | None = None,
        volume: str = "voxel",
    ) -> None:
        self.stack, self.config = stack, config
        device = stack.device
        self.symmetry = symmetry.to(device)
        self.candidates = candidates
        self.half_set = half_set
        self.mask = soft_sphere(stack.box, 0.5 * mask_diameter / stack.pixel_size, 3.0).to(device)
        self.solvent = None if solvent is None else solvent.to(device)
        self.limit = int(stack.disk.shell.max())
        resolved = _SEARCH_PERIODS * stack.box * stack.pixel_size / mask_diameter  # by the grid of rotations
        self.search_radius = min(radius, max(round(resolved), 4))
        self.batch = max(1, min(config.batch, _BATCH_PIXELS // len(stack.disk)))
        shells = self.limit + 2
        self.intensity = torch.ones(len(stack)) if intensity is None else intensity.cpu()
        first, second = (resize_volume(one.to(device), stack.box) * self.mask for one in start)
        self.defocus = DefocusSearch(stack, config.defocus_range) if config.defocus_range else None
        self.maps = map_model(volume, (first, second), config)
        modes = config.modes
        rotations, shifts = candidates[0][:, :1], candidates[1][:, :1]
        self.tensors: State = {
            "rotations": rotations.expand(-1, modes, -1, -1).clone(),
            "shifts": shifts.expand(-1, modes, -1).clone(),
            "mass": torch.eye(modes)[0].expand(len(stack), modes).clone(),
            "reference_1": first,
            "reference_2": second,
            "half_1": first.clone(),
            "half_2": second.clone(),
            "map": 0.5 * (first + second),
            "noise": torch.zeros(shells),
            "fsc": torch.zeros(stack.box // 2 + 1),
            "log_likelihood": torch.zeros(len(stack)),
            "pose_change": torch.tensor(float("inf")),
            "gain": torch.tensor(0.0),
            "settled": torch.tensor(False),
            "radius": torch.tensor(radius),
            "previous_radius": torch.tensor(0),
            "reach": torch.tensor(0),
        }

    @property
    def poses(self) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"]]:
        """Rotation and shift in pixels of each particle's heaviest mode."""
        return self.tensors["rotations"][:, 0], self.tensors["shifts"][:, 0]

    def state(self) -> State:
        """Everything a resumed run needs."""
        return self.tensors | self.maps.state() | ({} if self.defocus is None else self.defocus.state())

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        on_device = ("reference", "half", "map")
        own = fitted(state, {name: x.shape for name, x in self.tensors.items()})
        self.tensors = {k: v.to(self.stack.device) if k.startswith(on_device) else v for k, v in own.items()}
        self.maps.load_state(state)
        if self.defocus is not None:
            self.defocus.load_state(state)

    def total_steps(self) -> int:
        """Most sweeps."""
        return self.config.sweeps

    def finished(self) -> bool:
        """Whether sweeps no longer change anything, and the last one back-projected everything."""
        return bool(self.tensors["settled"]) and int(self.tensors["reach"]) == self.limit

    def _reach(self, index: int) -> int:
        """How far to back-project: what the next sweep may look at, and everything in the last one."""
        last = bool(self.tensors["settled"]) or index + 1 == self.config.sweeps
        ahead = self.config.most(int(self.tensors["radius"])) + 2
        return self.limit if last else min(max(ahead, self.search_radius), self.limit)

    def step(self, index: int) -> dict[str, float | str]:
        """Every particle's posterior under its half's map, both maps again, and how they compare."""
        t = self.tensors
        radius = int(t["radius"])
        if index == 0:
            t["noise"][: len(self.stack.power)] = self.stack.power  # an upper bound that this sweep replaces
        t["reach"] = torch.tensor(self._reach(index))
        before, noise = self.poses[0].clone(), t["noise"].clone()
        every = self.config.search_every
        search = bool(every) and self.config.fit_shift and index > 0 and index % every == 1 % every
        accumulators: list[Accumulator] = []
        power = torch.zeros_like(t["noise"])
        for half in HALVES:
            members = members_of(self.half_set, half)
            grid = slicing_grid(t[f"reference_{half}"], self.stack.at_radius(self._within())[0].radius)
            everywhere = self._everywhere(grid) if search else None
            parts = []
            for chosen in members.split(self.batch):
                points = sample_points(len(chosen), self.config.samples, index * len(self.stack) + int(chosen[0]))
                images, ctf = self._read(chosen)
                parts.append(self._expect(grid, chosen, images, ctf, radius, points, everywhere, first=index == 0))
                if self.defocus is not None:
                    self.defocus.update(grid, chosen, self.poses, images, self.intensity, self._precision(radius))
                    ctf = self._read_ctf(chosen)
                power += self._residual(grid, chosen, images, ctf)
            samples = PoseSamples.joined(parts)
            if (mates := len(self.symmetry)) > 1:  # each sample is inserted at all of them: fewer say as much
                samples = samples.thinned(-(-self.config.samples // mates))
            accumulators.append(self._inserted(half, samples))
        motion = self._second_onto_first()
        if motion is not None:
            accumulators[1] = self._inserted(2, samples.moved(*motion))
        self._rebuild(accumulators)
        fresh = torch.maximum(power / len(self.stack), 1e-6 * noise)
        t["noise"] = torch.where(torch.arange(len(noise)) <= t["reach"], fresh, noise)
        change = so3.distance(before, self.poses[0])
        t["pose_change"] = torch.stack([change[members_of(self.half_set, half)].median() for half in HALVES]).max()
        gain = self._gain(noise, max(1, min(radius, int(t["previous_radius"]))))
        t["previous_radius"] = t["radius"]
        t["radius"] = torch.tensor(self._next_radius(radius))
        no_gain = min(abs(gain), abs(gain + float(t["gain"])) / 2) < _LEAST_GAIN  # up and down: none
        still = no_gain or float(t["pose_change"]) < _STILL_PX / max(radius, 1)
        t["gain"] = torch.tensor(gain)
        t["settled"] |= abs(int(t["radius"]) - radius) <= 1 and index > 0 and still
        return {
            "radius": float(radius),
            "resolution_A": self.stack.box * self.stack.pixel_size / max(last_shell(t["fsc"], 0.143), 1),
            "pose_change_deg": float(torch.rad2deg(t["pose_change"])),
            "gain": gain,
            "modes": float((t["mass"] > _NO_MASS).sum(dim=1).float().mean()),
            "log_likelihood": float(t["log_likelihood"].mean()),
            **({} if self.defocus is None else self.defocus.learn()),
            **self.maps.history(),
        }

    def posed(self) -> PosedParticles:
        """Every particle's posterior under the map of the *other* half, widened by what the maps themselves do not know.

        A particle's own half holds its noise at the pose it was given. :attr:`poses` stay those of its own half.
        """
        t, parts = self.tensors, []
        grids = {half: slicing_grid(t[f"reference_{3 - half}"], self.stack.disk.radius) for half in HALVES}
        members = [(half, members_of(self.half_set, half)) for half in HALVES]
        batches = [(half, b) for half, own in members for b in own.split(self.batch)]
        disk, keep, precision = self._precision(int(t["radius"]))
        judged = [(half, b) for half, m in members for b in m[:: max(1, -(-len(m) // _JUDGED))].split(self.batch)]
        seen = ((grids[half], b, *(x[:, keep] for x in self._read(b))) for half, b in judged)
        correlation = t["fsc"].to(precision)[disk.shell]
        widening = map_widening(seen, self.poses, precision, correlation, disk, fit_shift=self.config.fit_shift)
        several = float((t["mass"] > _NO_MASS).sum(dim=1).float().mean()) > _SINGLE
        several &= self.config.search_every > 0 and self.config.fit_shift
        everywhere = {half: self._everywhere(grid) if several else None for half, grid in grids.items()}
        scores = torch.empty(2, len(self.stack))
        for half, chosen in batches:
            images, ctf = self._read(chosen)
            starts = self._starts(chosen, images, ctf, everywhere[half], *_FINAL_STARTS)
            images, ctf = images[:, keep], ctf[:, keep]
            found = local_posterior(
                grids[half],
                images,
                ctf,
                precision / widening,
                starts,
                disk,
                symmetry=self.symmetry,
                points=sample_points(len(chosen), _FINAL_SAMPLES if several else _FEW_SAMPLES, int(chosen[0])),
                modes=self.config.modes,
                iterations=self.config.iterations,
                coarse=float(self.search_radius),
                fit_shift=self.config.fit_shift,
                widen=_FINAL_WIDEN,
                sharp=0.0,
            )[0]
            predicted = forward(grids[half], found.rotations[:, 0], found.shifts[:, 0], disk, ctf)
            power = (precision * predicted.abs().square()).sum(dim=1)
            overlap = (precision * (images * predicted.conj()).real).sum(dim=1)
            strength = self.intensity[chosen].to(power.device)
            scores[:, chosen] = torch.stack([strength * overlap / power, strength * power.rsqrt()]).cpu()
            parts.append(found.in_one_unit(self.symmetry))
        order = torch.cat([chosen for _, chosen in batches]).argsort()
        fields = ("rotations", "shifts", "mass", "covariance")
        joined = (torch.cat([getattr(part, name).cpu() for part in parts])[order] for name in fields)
        return PosedParticles(PosePosterior(*joined), scores[0], scores[1], widening)

    def _read(self, chosen: Int[Tensor, " b"]) -> tuple[Complex[Tensor, "b p"], Float[Tensor, "b p"]]:
        """Images, and CTF times intensity."""
        return self.stack.images(chosen), self._read_ctf(chosen)

    def _read_ctf(self, chosen: Int[Tensor, " b"]) -> Float[Tensor, "b p"]:
        return self.stack.ctf(chosen) * self.intensity[chosen, None].to(self.stack.device)

    def _within(self) -> int | None:
        """Radius within which this sweep back-projects; None: everywhere."""
        reach = int(self.tensors["reach"])
        return None if reach == self.limit else reach

    def _precision(self, radius: int) -> tuple[FourierDisk, Columns, Float[Tensor, " q"]]:
        disk, keep = self.stack.at_radius(radius)
        return disk, keep, disk.weight / self.tensors["noise"].to(disk.weight.device)[disk.shell]

    def _expect(
        self,
        grid: SlicingGrid,
        chosen: Int[Tensor, " b"],
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        radius: int,
        points: Float[Tensor, "b k 5"],
        everywhere: GridSearch | None,
        *,
        first: bool,
    ) -> PoseSamples:
        """Modes of the particles ``chosen`` from those they had (``first``: from the candidates) and, with the slices ``everywhere``, from
        the best of these; and samples around them.
        """
        t = self.tensors
        if first:
            rotations, shifts = (x[chosen].to(images.device) for x in self.candidates)
            starts = rotations, shifts, torch.ones(shifts.shape[:2], dtype=torch.bool, device=images.device)
        else:
            starts = self._starts(chosen, images, ctf, everywhere, *_STARTS)
        disk, keep, precision = self._precision(radius)
        modes, samples, loss = local_posterior(
            grid,
            images[:, keep],
            ctf[:, keep],
            precision,
            starts,
            disk,
            symmetry=self.symmetry,
            points=points,
            modes=self.config.modes,
            iterations=self.config.iterations,
            fit_shift=self.config.fit_shift,
        )
        t["rotations"][chosen], t["shifts"][chosen], t["mass"][chosen] = (
            x.cpu() for x in (modes.rotations, modes.shifts, modes.mass)
        )
        level = 0.5 * (disk.weight * (torch.pi * disk.weight / precision).log()).sum()  # of noise alone
        t["log_likelihood"][chosen] = -(loss + level).to(torch.float32).cpu()
        return PoseSamples(
            chosen[samples.particle.cpu()], samples.rotations.cpu(), samples.shifts.cpu(), samples.weight.cpu()
        )

    def _everywhere(self, grid: SlicingGrid) -> GridSearch:
        """A whole grid of rotations and the slices of a map there."""
        order = self.config.search_order
        rotations, (disk, keep, precision) = rotation_grid(order, self.symmetry), self._precision(self.search_radius)
        slices, spacing, spread = slice_grid(grid, rotations, disk), so3.grid_spacing(order), float(self.poses[1].std())
        return GridSearch(rotations, slices, spacing, disk, keep, precision, spread, self.symmetry)

    def _starts(
        self,
        chosen: Int[Tensor, " b"],
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        everywhere: GridSearch | None,
        count: int,
        spacings: float,
    ) -> Starts:
        """The modes the particles had, and the best ``count`` of the rotations ``everywhere`` that are not so near to one of them."""
        t = self.tensors
        rotations, shifts, used = (
            x[chosen].to(images.device) for x in (t["rotations"], t["shifts"], t["mass"] > _NO_MASS)
        )
        had = rotations, shifts, used
        return had if everywhere is None else everywhere.added_to(had, images, ctf, count, spacings)

    def _residual(
        self, grid: SlicingGrid, chosen: Int[Tensor, " b"], images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]
    ) -> Float[Tensor, " k"]:
        """Power per shell of what the reference does not explain, summed over the particles."""
        disk, keep = self.stack.at_radius(self._within())
        rotations, shifts = (x[chosen].to(images.device) for x in self.poses)
        residual = images[:, keep] - forward(grid, rotations, shifts, disk, ctf[:, keep])
        return shell_mean(residual.abs().square().sum(dim=0), disk, self.limit + 2).cpu()

    def _gain(self, before: Float[Tensor, " shells"], radius: int) -> float:
        """By how many nats the mean image has become likelier at its noise level since ``before``, up to a ``radius`` both sweeps looked at."""
        disk = self.stack.at_radius(radius)[0].to(torch.device("cpu"))
        fallen = (before.double() / self.tensors["noise"].double()).log()[disk.shell]
        return float(0.5 * (disk.weight.double() * fallen).sum())

    def _inserted(self, half: int, samples: PoseSamples) -> Accumulator:
        accumulator = insert_posed(self.stack, self.intensity, samples, self.symmetry, self._within())
        self.tensors[f"half_{half}"] = unfiltered(accumulator, self.stack.box // 2 + 2)
        return accumulator

    def _second_onto_first(self) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"]] | None:
        """Turn and shift the poses of half 2 so that its map lies on that of half 1: nothing else holds them together."""
        t, mask = self.tensors, self._solvent_mask()
        motion = motion_onto(t["half_2"] * mask, t["half_1"] * mask, self.symmetry, self.limit)
        if motion is not None:
            second = self.half_set == 2
            t["rotations"][second], t["shifts"][second] = framed(t["rotations"][second], t["shifts"][second], *motion)
        return motion

    def _solvent_mask(self) -> Float[Tensor, "d d d"]:
        if self.solvent is not None:
            return self.solvent
        t = self.tensors
        return solvent_mask(t["half_1"], t["half_2"], self.mask, self.stack.pixel_size)

    def _rebuild(self, accumulators: list[Accumulator]) -> None:
        """FSC of the halves inside the solvent mask, and the references."""
        t, mask, (first, second) = self.tensors, self._solvent_mask(), accumulators
        t["fsc"] = compared(t["half_1"], t["half_2"], mask)
        t["fsc"][int(t["reach"]) + 1 :] = 0.0  # the mask smears what is there into shells that hold nothing
        t["reference_1"], t["reference_2"], t["map"] = self.maps.rebuilt(first, second, t["fsc"], mask)

    def _next_radius(self, radius: int) -> int:
        reach = last_shell(self.tensors["fsc"], self.config.fsc_radius) + 2
        return max(min(reach, self.config.most(radius), self.limit), min(radius, 4))
