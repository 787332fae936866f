"""Ab initio by dense marginalisation: several online EM runs from random starts on each of two halves (the default engine).

* **volume**: voxels (oversampled Fourier accumulators of numerator and CTF^2 weight), one map per run.
* **poses**: posterior over HEALPix rotations x a shift lattice, uncapped (``poses/grid.py``).
* **objective**: marginal likelihood, Gaussian noise with one variance per spectral shell (``methods/online_em.py``).

The particles are split in two halves before anything else; a run sees images of one half only. The Fourier radius marches outwards, faster
once posteriors are sharp. On the way the runs of a half are compared by the likelihood of images of the *other* half, and the losers
dropped. Then the two winners are laid on each other by the poses they give the same images (both hands), and from there the radius
follows their correlation. Two runs that agree found the same molecule twice, from different images and different starts. Two that end
with different poses of the same images did not: fresh starts then challenge them, in up to ``heats`` rounds. When even the maps still
disagree, the likelier one becomes the start of both halves and the result says so. Measured behaviour, sources: docs/methods/marginal.md.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.methods.halves import HALVES, SURE, Agreement, compare, members_of, unmoved
from cryorbit.methods.marginal_config import MarginalConfig
from cryorbit.methods.online_em import Grids, OnlineEM, rotation_grid
from cryorbit.methods.symmetric import SymmetryTest, find_symmetry, group_of, symmetrised, tested
from cryorbit.metrics.fsc import fsc, last_shell
from cryorbit.metrics.masks import soft_sphere
from cryorbit.metrics.symmetry import SymmetryFinding, no_symmetry
from cryorbit.poses.grid import recounted, shift_grid
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import FourierStack

_ROUNDS = (0.25, 0.5)  # of the march: where half of the runs are dropped, and where one is left for each half
_LAST_PAIRING = 0.85  # of the march: a last attempt to pair, and where halves that were joined go on
_RETRY = 3  # steps between attempts to pair
_EXTENSIONS = 3  # of a heat's settling, at most, while its halves pose images differently
_AT_ONCE, _LARGEST = 2_000, 10_000  # images of a half at a time in these, and however broad posteriors stay
_SAMPLE = 400  # images by which runs are compared and laid on each other
_AGREED = 5.0  # Fourier periods per particle diameter to which two runs must correlate by 0.5 to count as one
_CAPPED_AT = 0.143  # correlation of the halves that carries the radius outwards, with _MARGIN shells to spare
_MARGIN = 2
_PATIENCE = 5  # broad steps before batches grow
_REACH = 2.5  # standard deviations of the shifts to be searched
_WIDEST = 2.0  # times ``shift_range`` to which the search may grow
_MORE_STARTS = 4  # at most, with an imposed symmetry

_SCALARS = (
    "march settled batch heat done paired joined at_pairing correlation still broad extended alike spread".split()
)


class Marginal:
    """The engine, driven one step at a time by ``training.loop.run``.

    Parameters
    ----------
    stack
        Particles as Fourier pixels, up to the last of ``config.radii``.
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
        self.members = {half: members_of(half_set, half) for half in HALVES}
        self.largest = torch.tensor(float(min(_LARGEST, max(len(m) for m in self.members.values()))))
        self.mask = soft_sphere(stack.box, 0.5 * mask_diameter / stack.pixel_size, 3.0).to(stack.device)
        self.starts = config.starts * min(len(symmetry), _MORE_STARTS)
        self.first, self.last = config.radii(len(symmetry))
        self.joined, self.done = (torch.zeros((), dtype=torch.bool) for _ in range(2))
        self.at_pairing = torch.zeros(3)  # periods, share of equal poses, their difference before halves were joined
        self.motion = unmoved(stack.box // 2 + 1)  # of map 2 onto map 1
        self.best: dict[int, dict[int, OnlineEM]] = {half: {} for half in HALVES}  # of the heats before this one
        self._begin(0)

    def _begin(self, heat: int) -> None:
        """Fresh starts on both halves, at the first radius."""
        starts = range(heat * self.starts, (heat + 1) * self.starts)
        self.runs = {half: {start: self._new_run() for start in starts} for half in HALVES}
        self.heat = torch.tensor(heat)
        self._march_from(0.0)

    def _march_from(self, march: float) -> None:
        self.march = torch.tensor(march)
        self.batch = self.largest.clamp(max=self.config.batch)
        self.settled, self.still, self.broad, self.extended = (torch.zeros((), dtype=torch.int64) for _ in range(4))
        self.alike, self.spread = (
            torch.zeros(()),
            torch.tensor(1e9),
        )  # images posed alike and effective poses as the heat last settled on
        self.paired = torch.zeros((), dtype=torch.bool)
        self.correlation = torch.ones(self.stack.box // 2 + 1)

    def begin_at(self, maps: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]) -> None:
        """Maps for the very first start of each half, each of its own half's images alone, in place of random poses."""
        for half, volume in zip(HALVES, maps, strict=True):
            self.runs[half][0].volume = volume.to(self.mask) * self.mask

    def _new_run(self) -> OnlineEM:
        return OnlineEM(self.stack, self.mask, self.symmetry, self.config.tau_fudge, self._shift_range() / _REACH)

    def periods(self, shell: float) -> float:
        """Fourier pixels of the working box as periods per particle diameter."""
        return shell * self.mask_diameter / (self.stack.box * self.stack.pixel_size)

    def radius(self) -> int:
        """Current Fourier radius in pixels of the working box."""
        periods = self.first + (self.last - self.first) * float(self.march)
        return min(round(periods / self.periods(1.0)), int(self.stack.disk.radius), self._cap())

    def _cap(self) -> int:
        """Where the halves' correlation ends, plus a margin; never below half the march."""
        least = round((self.first + (self.last - self.first) * _ROUNDS[-1]) / self.periods(1.0))
        return max(last_shell(self.correlation, _CAPPED_AT) + _MARGIN, least)

    def order(self) -> int:
        """HEALPix order of the rotation grid at this point of the march."""
        return self.config.order_of(len(self.symmetry) if float(self.march) >= _ROUNDS[-1] else 1)

    def _shift_range(self) -> float:
        return self.config.shift_range * self.mask_diameter / self.stack.pixel_size

    def shifts_cut(self) -> bool:
        """Whether shifts spread more widely than is ever searched."""
        return any(_REACH * float(run.shift_sigma) > _WIDEST * self._shift_range() for run in self.winners())

    def grids(self, run: OnlineEM, radius: int, turn: Float[Tensor, "3 3"] | None = None) -> Grids:
        """Rotations (turned by ``turn``) and shifts, a lattice as coarse as the radius allows under the run's own prior."""
        least = self._shift_range()
        limit = min(max(least, _REACH * float(run.shift_sigma)), _WIDEST * least)
        step = min(0.38 * self.stack.box / radius, max(limit, 1e-3))
        shifts = shift_grid(limit, step, float(run.shift_sigma))
        return Grids(rotation_grid(self.order(), self.symmetry, turn), shifts, radius)

    def total_steps(self) -> int:
        """Steps if posteriors stay broad throughout and the halves never agree."""
        return self.config.most_steps(_LAST_PAIRING, _EXTENSIONS)

    def finished(self) -> bool:
        """Whether the halves agree, or every heat has been run and the winners been joined."""
        return bool(self.done)

    def step(self, index: int) -> dict[str, float | str]:
        """One minibatch for every run of either half; then selection, pairing or the halves' correlation; at last the verdict on a heat."""
        radius, order, heat, effective = self.radius(), self.order(), int(self.heat), []
        for half in HALVES:
            for start, run in self.runs[half].items():
                generator = torch.Generator().manual_seed(((self.seed * 1_000 + start) * 2 + half) * 100_003 + index)
                members = self.members[half]
                chosen = members[torch.randperm(len(members), generator=generator)[: int(self.batch)]]
                grids = self.grids(run, radius, so3.random_rotations(1, generator)[0])
                if run.statistics is None:
                    run.start(chosen, grids, generator)
                    continue
                decay = self.config.settle_decay if float(self.march) >= 1 else self.config.decay
                if int(self.extended):  # sums of every image once
                    decay = min(decay, max(0.0, 1 - float(self.batch) / len(members)))
                result = run.step(chosen, grids, decay, intensities=bool(self.paired))
                effective.append(float(recounted(result.effective.median(), order, self.config.order)))
        sharpest = min(effective, default=float("inf"))
        self._select(index, radius)
        if bool(self.paired):
            self._follow(radius)
        runs = [run for half in HALVES for run in self.runs[half].values()]
        self._advance(sharpest, order)
        noise = [float(r.noise[1 : radius + 1].mean() / r.initial_noise[1 : radius + 1].mean()) for r in runs]
        return {
            "radius": float(radius),
            "resolution_A": self.stack.box * self.stack.pixel_size / radius,
            "effective_poses": min(sharpest, 2.0 * len(rotation_grid(self.config.order, self.symmetry))),
            "shift_sigma_A": float(runs[0].shift_sigma) * self.stack.pixel_size,
            "noise_fraction": min(noise),
            "runs": float(len(runs)),
            "heat": float(heat),
            "batch": float(int(self.batch)),
        }

    def _advance(self, effective: float, order: int) -> None:
        c = self.config
        if float(self.march) >= 1:
            self.settled = self.settled + 1
        slow = effective * 8 ** (order - c.order) >= c.sharp  # a finer grid has more to settle
        self.broad = self.broad + (1 if slow else 0)
        if slow and int(self.broad) >= _PATIENCE:
            self.batch = torch.minimum(1.25 * self.batch, self.largest)
        self.march = (self.march + (0.25 if slow else 1.0) / c.march_steps).clamp(max=1.0)
        if int(self.settled) >= c.settle_steps or (int(self.still) >= 3 and not int(self.extended)):
            sharp = effective < c.sharp or int(self.extended) > 0
            found = self._extend() if sharp and not bool(self.joined) else None
            if int(self.settled):
                self._end_heat(sharp, found)

    def _extend(self) -> Agreement:
        """How the halves compare; where they pose images differently, and settling on helps or has not been tried, the heat settles on.

        Few images a step come to rest where many would still sharpen poses: two structures may be one that neither half has found yet.
        """
        plain = self.agreement()
        found = self._up_to_symmetry(plain)
        gains = int(self.extended) < _EXTENSIONS and plain.gains_on(float(self.alike), float(self.spread))
        if gains and found.posed < SURE:
            self.alike, self.spread = torch.tensor(plain.posed), torch.tensor(plain.effective)
            self.extended, self.settled, self.still = self.extended + 1, 0 * self.settled, 0 * self.still
            self.batch = torch.maximum(self.batch, self.largest.clamp(max=_AT_ONCE))
        return found

    def _select(self, index: int, radius: int) -> None:
        """Drop runs at the two rounds of the march, judged by images of the other half; then pair the winners."""
        if bool(self.paired):
            return
        alive = max(len(runs) for runs in self.runs.values())
        keep = min(alive, max(1, math.ceil(self.starts / 2))) if float(self.march) >= _ROUNDS[0] else alive
        last = float(self.march) >= _ROUNDS[1]
        keep = 1 if last else keep
        if keep < alive:
            for half in HALVES:
                self._judge(half, radius)
                ranked = sorted(self.runs[half], key=lambda start: -float(self.runs[half][start].likelihood))
                self.runs[half] = {start: self.runs[half][start] for start in sorted(ranked[:keep])}
        late = _LAST_PAIRING <= float(self.march) < _LAST_PAIRING + 1 / self.config.march_steps
        if last and (keep < alive or index % _RETRY == 0 or late):
            self._pair(radius)

    def sample(self, half: int) -> Int[Tensor, " b"]:
        """The images of a half by which runs are compared: always the same."""
        members = self.members[half]
        generator = torch.Generator().manual_seed(self.seed * 7 + half)
        return members[torch.randperm(len(members), generator=generator)[:_SAMPLE]]

    def _judge(self, half: int, radius: int, *, refit: bool = False) -> None:
        """Mean log likelihood of images of the other half, for each run of ``half``; ``refit`` the noise where their ages differ."""
        held_out = self.sample(3 - half)
        for run in self.runs[half].values():
            grids = self.grids(run, radius)
            judged = run.with_noise_of(held_out, grids) if refit else run
            run.likelihood = judged.log_likelihood(held_out, grids).mean().cpu()

    def winners(self) -> tuple[OnlineEM, OnlineEM]:
        """The likeliest run of each half."""
        best = [max(self.runs[half].values(), key=lambda run: float(run.likelihood)) for half in HALVES]
        return best[0], best[1]

    def _compare(self, radius: int, group: Float[Tensor, "s 3 3"] | None = None) -> Agreement:
        first, second = ((run, self.grids(run, radius)) for run in self.winners())
        chosen = self.sample(HALVES[0]), self.sample(HALVES[1])
        return compare(first, second, chosen, self.symmetry if group is None else group, self.config.order)

    def _pair(self, radius: int) -> None:
        """Lay the two winners on each other, if they are maps of one molecule."""
        agreement = self._compare(radius)
        if self.periods(float(agreement.reach)) >= _AGREED:
            self.motion, self.paired = agreement, torch.ones_like(self.paired)

    def _up_to_symmetry(self, agreement: Agreement) -> Agreement:
        """The same with equivalent poses as one, where that makes of like maps one structure."""
        if agreement.posed >= SURE or self.periods(float(agreement.reach)) < _AGREED:
            return agreement
        test = None if (found := self.found_symmetry()).name == "C1" else self.test_symmetry(found)
        return test.agreement if test and test.allowed and test.agreement.posed >= SURE else agreement

    def _end_heat(self, sharp: bool, found: Agreement | None) -> None:
        """Keep the best run of each half; fresh starts if their poses differ (``found``, if known), and in the end one map for both."""
        contested = any(self.best.values())
        if contested:
            self._march_from(1.0)  # to the full radius, whatever the correlation of this heat's winners
            for half in HALVES:
                self.runs[half] |= self.best[half]
                self._judge(half, self.radius(), refit=True)
            found = None
        for half, run in zip(HALVES, self.winners(), strict=True):
            self.runs[half] = {start: other for start, other in self.runs[half].items() if other is run}
        beaten = contested and self.runs == self.best  # by both earlier winners
        last = beaten or not sharp or int(self.heat) + 1 >= self.config.heats
        found = self._up_to_symmetry(self.agreement()) if found is None else found
        if not bool(self.paired):
            self._follow(self.radius())
        periods = self.periods(float(found.reach))
        self.best = {half: {} for half in HALVES}
        if bool(self.joined) or found.posed >= SURE or (last and periods >= _AGREED):
            self.done = torch.ones_like(self.done)
        elif last:
            self.at_pairing = torch.tensor([periods, found.posed, found.pose_deg])
            self._join()
        else:
            self.best = self.runs
            self._begin(int(self.heat) + 1)

    def _join(self) -> None:
        """Start both halves from the likelier winner, late in the march."""
        first, second = self.winners()
        both = torch.cat([self.sample(half) for half in HALVES])  # each has learnt from half of these
        grids = [self.grids(run, self.radius()) for run in (first, second)]
        refitted = [run.with_noise_of(both, g) for run, g in zip((first, second), grids, strict=True)]
        gain = [run.log_likelihood(both, g).mean() for run, g in zip(refitted, grids, strict=True)]
        better, other = (first, second) if gain[0] >= gain[1] else (second, first)
        other.start_from(better)
        self.motion = unmoved(self.stack.box // 2 + 1)
        self._march_from(_LAST_PAIRING)
        self.paired, self.joined = torch.ones_like(self.paired), torch.ones_like(self.joined)

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

    def take_over(self, maps: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]) -> None:
        """Maps of the halves that another method learnt become the last heat's runs, half way in the march, many images at a time."""
        self.heat = torch.tensor(self.config.heats - 1)
        self._march_from(_ROUNDS[-1])
        self.batch = self.largest.clamp(max=_AT_ONCE)
        for half, volume in zip(HALVES, maps, strict=True):
            run, chosen = self._new_run(), self.members[half][: int(self.batch)]
            run.take_noise(chosen)
            grids = self.grids(run, self.radius())
            run = run.with_map(volume.to(self.mask) * self.mask).with_noise_of(chosen, grids)
            run.step(chosen, grids, decay=0.0)
            self.runs[half] = {0: run}

    def agreement(self) -> Agreement:
        """How the two winners compare at the end; from now on :meth:`maps` and ``assign`` use this motion."""
        self.motion = self._compare(self.radius())
        return self.motion

    def found_symmetry(self) -> SymmetryFinding:
        """Point group of the two winners' maps, as they were last laid on each other; C1 for an engine that imposes one."""
        if len(self.symmetry) > 1:
            return no_symmetry()
        return find_symmetry(self.maps(), self.motion.fsc, self.mask_diameter, self.stack.pixel_size)

    def test_symmetry(self, found: SymmetryFinding) -> SymmetryTest:
        """What images of the other half say of each half's map averaged over ``found``; after :meth:`agreement`."""
        radius, gains = self.radius(), []
        for half, run, volume in zip(HALVES, self.winners(), self.maps(), strict=True):
            chosen, grids = self.sample(3 - half), self.grids(run, radius)
            averaged = run.with_map(symmetrised(volume, found, self.stack.pixel_size))
            ours, plain = (
                changed.with_noise_of(chosen, grids).log_likelihood(chosen, grids)
                for changed in (averaged, run.with_map(volume))
            )
            gains.append((ours - plain).cpu())
        return tested(found, torch.cat(gains), self.motion, self._compare(radius, group_of(found)))

    def state(self) -> State:
        """Tensors that continue the run exactly."""
        state: State = {name: getattr(self, name) for name in _SCALARS}
        state["motion"] = self.motion.packed
        for kind, halves in (("runs", self.runs), ("best", self.best)):
            for half, runs in halves.items():
                for start, run in runs.items():
                    if run.statistics is not None:  # else a start of a heat not begun yet
                        state |= {f"{kind}.{half}.{start}.{name}": value for name, value in run.state().items()}
        return state

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        for name in _SCALARS:
            setattr(self, name, state[name])
        self.motion = unmoved(self.stack.box // 2 + 1).with_motion(state["motion"])
        self.runs, self.best = {half: {} for half in HALVES}, {half: {} for half in HALVES}
        for kind, half, start in sorted(
            {(k, int(h), int(n)) for k, h, n, *_ in (key.split(".") for key in state if "." in key)}
        ):
            run = self._new_run()
            prefix = f"{kind}.{half}.{start}."
            run.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            (self.runs if kind == "runs" else self.best)[half][start] = run
        if not any(self.runs.values()):
            self._begin(int(self.heat))
