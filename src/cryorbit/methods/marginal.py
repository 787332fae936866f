"""Ab initio by dense marginalisation: several online EM runs from random starts on each of two halves (the default engine).

* **volume**: voxels (oversampled Fourier accumulators of numerator and CTF^2 weight), one map per run.
* **poses**: posterior over HEALPix rotations x a shift lattice, uncapped (``poses/grid.py``).
* **objective**: marginal likelihood, Gaussian noise with one variance per spectral shell (``methods/online_em.py``).

The particles are split in two halves before anything else; a run sees images of one half only. The Fourier radius marches outwards, faster
once posteriors are sharp. On the way the runs of a half are compared by the likelihood of images of the *other* half, and the losers
dropped. Then the two winners are laid on each other by the poses they give the same images (both hands), and from there the radius
follows their correlation. Two runs that agree found the same molecule twice, from different images and different starts; when they
disagree, the likelier one becomes the start of both halves and the result says so.

Measured behaviour and sources in docs/methods/marginal.md.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.methods.halves import Agreement, compare, unmoved
from cryorbit.methods.online_em import Grids, OnlineEM, rotation_grid
from cryorbit.metrics.fsc import fsc
from cryorbit.metrics.masks import soft_sphere
from cryorbit.poses.grid import distinct_modes, shift_grid, with_half_turns
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses

HALVES = (1, 2)
_ROUNDS = (0.25, 0.5)  # of the march: where half of the runs are dropped, and where one is left for each half
_LAST_PAIRING = 0.85  # of the march: winners that still disagree here are joined
_RETRY = 3  # steps between attempts to pair
_SAMPLE = 400  # images by which runs are compared and laid on each other
_AGREED = 5.0  # Fourier periods per particle diameter to which two runs must correlate by 0.5 to count as one
_CAPPED_AT = 0.143  # correlation of the halves that carries the radius outwards, with _MARGIN shells to spare
_MARGIN = 2
_INTENSITY_SD = 0.2
_PATIENCE = 5  # broad steps before batches grow
_MORE_STARTS = 4  # at most, with an imposed symmetry


_SCALARS = tuple("march settled batch intensity paired joined at_pairing correlation still broad".split())


@dataclass(frozen=True)
class MarginalConfig:
    """Settings of the ab initio engine. Radii count Fourier pixels of a box as wide as the particle, so they hold for any pixel size.

    Attributes
    ----------
    starts
        Runs from random starts on each half; with a symmetry of 4 or more elements four times as many, each the cheaper for it.
    batch
        Images per run and step at first; grows by a quarter with every step that leaves posteriors broad.
    order
        HEALPix order of the rotation grid (2: 4,608 rotations, 15 degrees apart).
    radius_start, radius_end
        Fourier radius at the first step and at the end, in units of 1 / particle diameter. With an imposed symmetry of S elements the
        first is ``S**(1/4)`` times as large (not beyond the last): a symmetric map has that much less to tell at low resolution.
    march_steps
        Steps from the first radius to the last while posteriors are sharp; four times as many while they are broad.
    settle_steps
        Most steps at the last radius, with slowly forgotten statistics; fewer when the halves' correlation stands still.
    decay, settle_decay
        Factor on the old statistics at each step, while marching and while settling.
    sharp
        Posteriors count as sharp when the median effective number of poses is below this.
    shift_range
        Largest shift searched, in particle diameters; 0 searches none.
    tau_fudge
        Factor on the signal power in the Wiener prior (larger: noisier, more detailed map).
    modes
        Distinct poses per image handed to refinement.
    """

    starts: int = 2
    batch: int = 200
    order: int = 2
    radius_start: float = 4.4
    radius_end: float = 10.5
    march_steps: int = 24
    settle_steps: int = 8
    decay: float = 0.6
    settle_decay: float = 0.8
    sharp: float = 50.0
    shift_range: float = 0.1
    tau_fudge: float = 0.5
    modes: int = 6


class Marginal:
    """The engine, driven one step at a time by ``training.loop.run``.

    Parameters
    ----------
    stack
        Particles as Fourier pixels, of radius at least ``fourier_radius(config.radius_end)``.
    config
        Settings.
    mask_diameter
        Particle diameter in angstrom.
    symmetry
        (S, 3, 3) point-group rotations imposed on the map, identity alone for C1.
    half_set
        (N,) 1 or 2.
    seed
        Starts and minibatches.
    """

    name = "abinitio"

    def __init__(
        self,
        stack: FourierStack,
        config: MarginalConfig,
        *,
        mask_diameter: float,
        symmetry: Float[Tensor, "s 3 3"],
        half_set: Int[Tensor, " n"],
        seed: int,
    ) -> None:
        self.stack, self.config, self.seed = stack, config, seed
        self.mask_diameter = mask_diameter
        self.symmetry = symmetry.to(stack.device)
        self.half_set = half_set
        self.members = {half: torch.nonzero(half_set == half)[:, 0] for half in HALVES}
        self.mask = soft_sphere(stack.box, 0.5 * mask_diameter / stack.pixel_size, 3.0).to(stack.device)
        self.starts = config.starts * min(len(symmetry), _MORE_STARTS)
        self.radius_start = min(config.radius_start * len(symmetry) ** 0.25, config.radius_end)
        self.runs = {half: {start: self._new_run() for start in range(self.starts)} for half in HALVES}
        self.march = torch.zeros(())
        self.settled = torch.zeros((), dtype=torch.int64)
        self.batch = torch.tensor(float(config.batch))
        self.intensity = torch.ones(len(stack), device=stack.device)
        self.motion = unmoved(stack.box // 2 + 1)  # of map 2 onto map 1
        self.paired = torch.zeros((), dtype=torch.bool)
        self.joined = torch.zeros((), dtype=torch.bool)
        self.at_pairing = torch.zeros(
            3
        )  # periods, share of equal poses and pose difference when the winners were laid on each other
        self.correlation = torch.ones(stack.box // 2 + 1)
        self.still = torch.zeros((), dtype=torch.int64)
        self.broad = torch.zeros((), dtype=torch.int64)

    def _new_run(self) -> OnlineEM:
        return OnlineEM(self.stack, self.mask, self.symmetry, self.config.tau_fudge, 0.5 * self._shift_limit())

    # -- schedule ---------------------------------------------------------------------------------------------------------------

    def periods(self, shell: float) -> float:
        """Fourier pixels of the working box as periods per particle diameter."""
        return shell * self.mask_diameter / (self.stack.box * self.stack.pixel_size)

    def radius(self) -> int:
        """Current Fourier radius in pixels of the working box."""
        c = self.config
        periods = self.radius_start + (c.radius_end - self.radius_start) * float(self.march)
        return min(round(periods / self.periods(1.0)), int(self.stack.disk.radius), self._cap())

    def _cap(self) -> int:
        """Where the halves' correlation ends, plus a margin; never below half the march."""
        c = self.config
        least = round((self.radius_start + (c.radius_end - self.radius_start) * _ROUNDS[-1]) / self.periods(1.0))
        below = torch.nonzero(self.correlation[1:] < _CAPPED_AT)
        reach = int(below[0]) if len(below) else len(self.correlation)
        return max(reach + _MARGIN, least)

    def _shift_limit(self) -> float:
        return self.config.shift_range * self.mask_diameter / self.stack.pixel_size

    def grids(self, run: OnlineEM, radius: int, turn: Float[Tensor, "3 3"] | None = None) -> Grids:
        """Rotations (turned by ``turn``) and shifts, a lattice as coarse as the radius allows under the run's own prior."""
        limit = self._shift_limit()
        step = min(0.38 * self.stack.box / radius, max(limit, 1e-3))
        shifts = shift_grid(limit, step, float(run.shift_sigma))
        return Grids(rotation_grid(self.config.order, self.symmetry, turn), shifts, radius)

    def total_steps(self) -> int:
        """Steps if posteriors stay broad throughout."""
        return 4 * self.config.march_steps + self.config.settle_steps

    def finished(self) -> bool:
        """Whether the last radius has been reached and nothing changes there any more."""
        return int(self.settled) >= self.config.settle_steps or int(self.still) >= 3

    # -- one step ---------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float | str]:
        """One minibatch for every run of either half; then selection, pairing or the halves' correlation."""
        radius, effective = self.radius(), []
        for half in HALVES:
            for start, run in self.runs[half].items():
                generator = torch.Generator().manual_seed(((self.seed * 1_000 + start) * 2 + half) * 100_003 + index)
                members = self.members[half]
                chosen = members[torch.randperm(len(members), generator=generator)[: int(self.batch)]]
                grids = self.grids(run, radius, so3.random_rotations(1, generator)[0])
                if index == 0:
                    run.start(chosen, grids, generator)
                    continue
                intensity = self.intensity[chosen.to(self.intensity.device)] if bool(self.paired) else None
                decay = self.config.settle_decay if float(self.march) >= 1 else self.config.decay
                result = run.step(chosen, grids, decay, intensity)
                effective.append(float(result.effective.median()))
                if bool(self.paired):
                    self._update_intensity(chosen, result.intensity)
        sharpest = min(effective, default=float("inf"))
        self._select(index, radius)
        if bool(self.paired):
            self._follow(radius)
        self._advance(sharpest)
        box_a = self.stack.box * self.stack.pixel_size
        runs = [run for half in HALVES for run in self.runs[half].values()]
        noise = [float(r.noise[1 : radius + 1].mean() / r.initial_noise[1 : radius + 1].mean()) for r in runs]
        return {
            "radius": float(radius),
            "resolution_A": box_a / radius,
            "effective_poses": min(sharpest, 2.0 * len(rotation_grid(self.config.order, self.symmetry))),
            "shift_sigma_A": float(runs[0].shift_sigma) * self.stack.pixel_size,
            "noise_fraction": min(noise),
            "runs": float(len(runs)),
            "batch": float(int(self.batch)),
        }

    def _update_intensity(self, chosen: Int[Tensor, " b"], moments: Float[Tensor, "2 b"]) -> None:
        """How much stronger each image is than the map says, shrunk towards 1 (a Gaussian prior of 0.2)."""
        where = chosen.to(self.intensity.device)
        present = self.intensity[where]
        precision = _INTENSITY_SD**-2  # cross and energy are taken with the present factor in the CTF
        fresh = (moments[0] / present + precision) / (moments[1] / present.square() + precision)
        self.intensity[where] = (0.5 * present + 0.5 * fresh).clamp(0.3, 3.0)

    def intensities(self) -> Float[Tensor, " n"]:
        """Of all particles, CPU, divided by the mean of their half: only ratios within a half mean something."""
        out = self.intensity.cpu().clone()
        for half in HALVES:
            out[self.half_set == half] /= out[self.half_set == half].mean()
        return out

    def _advance(self, effective: float) -> None:
        c = self.config
        if float(self.march) >= 1:
            self.settled = self.settled + 1
        sharp = effective < c.sharp
        self.broad = self.broad + (0 if sharp else 1)
        if not sharp and int(self.broad) >= _PATIENCE:
            largest = max(len(m) for m in self.members.values())
            self.batch = torch.minimum(1.25 * self.batch, torch.tensor(float(largest)))
        self.march = (self.march + (1.0 if sharp else 0.25) / c.march_steps).clamp(max=1.0)

    # -- selection and pairing --------------------------------------------------------------------------------------------------

    def _select(self, index: int, radius: int) -> None:
        """Drop runs at the two rounds of the march, judged by images of the other half; then pair the winners."""
        if bool(self.paired) or index == 0:
            return
        alive = max(len(runs) for runs in self.runs.values())
        keep = alive
        if float(self.march) >= _ROUNDS[0]:
            keep = min(keep, max(1, math.ceil(self.starts / 2)))
        last = float(self.march) >= _ROUNDS[1]
        keep = 1 if last else keep
        if keep < alive:
            for half in HALVES:
                self._judge(half, radius)
                ranked = sorted(self.runs[half], key=lambda start: -float(self.runs[half][start].likelihood))
                self.runs[half] = {start: self.runs[half][start] for start in sorted(ranked[:keep])}
        if last and (keep < alive or index % _RETRY == 0 or float(self.march) >= _LAST_PAIRING):
            self._pair(radius)

    def sample(self, half: int) -> Int[Tensor, " b"]:
        """The images of a half by which runs are compared: always the same."""
        members = self.members[half]
        generator = torch.Generator().manual_seed(self.seed * 7 + half)
        return members[torch.randperm(len(members), generator=generator)[:_SAMPLE]]

    def _judge(self, half: int, radius: int) -> None:
        """Mean log likelihood of images of the other half, for each run of ``half``."""
        held_out = self.sample(3 - half)
        for run in self.runs[half].values():
            run.likelihood = run.log_likelihood(held_out, self.grids(run, radius)).mean().cpu()

    def winners(self) -> tuple[OnlineEM, OnlineEM]:
        """The likeliest run of each half."""
        best = [max(self.runs[half].values(), key=lambda run: float(run.likelihood)) for half in HALVES]
        return best[0], best[1]

    def _compare(self, radius: int, group: Float[Tensor, "s 3 3"] | None = None) -> Agreement:
        first, second = ((run, self.grids(run, radius)) for run in self.winners())
        chosen = torch.cat([self.sample(half) for half in HALVES])
        return compare(first, second, chosen, self.symmetry if group is None else group)

    def _pair(self, radius: int) -> None:
        """Lay the two winners on each other; if they disagree to the last, the likelier one starts both halves."""
        agreement = self._compare(radius)
        self.at_pairing = torch.tensor([self.periods(float(agreement.reach)), agreement.posed, agreement.pose_deg])
        agreed = float(self.at_pairing[0]) >= _AGREED
        if agreed:
            self.motion = agreement
        elif float(self.march) >= _LAST_PAIRING:
            first, second = self.winners()
            both = torch.cat([self.sample(half) for half in HALVES])  # each has learnt from half of these
            gain = [run.log_likelihood(both, self.grids(run, radius)).mean() for run in (first, second)]
            better, other = (first, second) if gain[0] >= gain[1] else (second, first)
            other.start_from(better)
            self.joined = torch.ones_like(self.joined)
        self.paired = torch.tensor(agreed or float(self.march) >= _LAST_PAIRING)

    def maps(self) -> tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]:
        """The two winners' maps in the frame and hand of the first."""
        first, second = self.winners()
        return first.volume, self.motion.moved(second.volume) * self.mask

    def _follow(self, radius: int) -> None:
        """The halves' correlation, and whether it still changes."""
        one, two = self.maps()
        fresh = fsc(one.cpu(), two.cpu())
        fresh[radius + 1 :] = 1.0  # not looked at yet
        if float(self.march) >= 1:
            change = float((fresh[1 : radius + 1] - self.correlation[1 : radius + 1]).abs().mean())
            self.still = self.still + 1 if change < 0.01 else torch.zeros_like(self.still)
        self.correlation = fresh

    # -- hand-over and resume ---------------------------------------------------------------------------------------------------

    def agreement(self, group: Float[Tensor, "s 3 3"] | None = None) -> Agreement:
        """How the two winners compare at the end; from now on :meth:`maps` and :meth:`assign` use this motion.

        With ``group``, rotations that leave the first map as it is, only the comparison counts equivalent poses as one.
        """
        if group is not None:
            return self._compare(self.radius(), group)
        self.motion = self._compare(self.radius())
        return self.motion

    def held_out(self, radius: int) -> Float[Tensor, " b"]:
        """Log likelihood of each image of :meth:`sample` under the winner of the other half, over the whole grid whatever the symmetry."""
        out = []
        for half, run in zip(HALVES, self.winners(), strict=True):
            grids = replace(self.grids(run, radius), rotations=rotation_grid(self.config.order, self.symmetry[:1]))
            out.append(run.log_likelihood(self.sample(3 - half), grids).cpu())
        return torch.cat(out)

    def assign(
        self, chosen: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b m 3 3"], Float[Tensor, "b m 2"], Float[Tensor, " b"]]:
        """Distinct probable poses of the particles ``chosen`` under the map of their own half, in the frame of the first.

        Rotations (most probable first), shifts in angstrom, effective number of poses.
        """
        rotations = torch.empty(len(chosen), self.config.modes, 3, 3)
        shifts = torch.empty(len(chosen), self.config.modes, 2)
        effective = torch.empty(len(chosen))
        radius = self.radius()
        for half, run in zip(HALVES, self.winners(), strict=True):
            own = torch.nonzero(self.half_set[chosen] == half)[:, 0]
            if not len(own):
                continue
            grids = self.grids(run, radius)
            every = with_half_turns(grids.rotations)
            intensity = self.intensity[chosen[own].to(self.intensity.device)]
            result = run.expect(chosen[own], grids, intensity, modes=8 * self.config.modes)
            best, best_shift = distinct_modes(
                result, every, self.config.modes, 1.2 * so3.grid_spacing(self.config.order)
            )
            found = Poses(every[best.flatten()].cpu(), grids.shifts.points[best_shift.flatten().cpu()])
            if half == 2:
                found = self.motion.framed(found)
            rotations[own] = found.rotations.view(len(own), -1, 3, 3)
            shifts[own] = found.shifts.view(len(own), -1, 2) * self.stack.pixel_size
            effective[own] = result.effective.cpu()
        return rotations, shifts, effective

    def state(self) -> State:
        """Tensors that continue the run exactly."""
        state: State = {name: getattr(self, name) for name in _SCALARS}
        m = self.motion
        state["motion"] = torch.cat([m.rotation.flatten(), m.shift, torch.tensor([float(m.mirrored)])])
        for half in HALVES:
            for start, run in self.runs[half].items():
                state |= {f"{half}.{start}.{name}": value for name, value in run.state().items()}
        return state

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        for name in _SCALARS:
            setattr(self, name, state[name])
        self.intensity = self.intensity.to(self.stack.device)
        m = state["motion"]
        self.motion = replace(
            unmoved(self.stack.box // 2 + 1), rotation=m[:9].view(3, 3), shift=m[9:12], mirrored=bool(m[12])
        )
        self.runs = {half: {} for half in HALVES}
        for half, start in sorted({tuple(map(int, key.split(".")[:2])) for key in state if "." in key}):
            run = self.runs[half][start] = self._new_run()
            prefix = f"{half}.{start}."
            run.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
