"""Ab initio by dense marginalisation: online EM over a pose grid, from a random start (the default engine).

* **volume**: voxels (oversampled Fourier accumulators of numerator and CTF^2 weight).
* **poses**: posterior over HEALPix rotations x a shift lattice, uncapped (``poses/grid.py``).
* **objective**: marginal likelihood, Gaussian noise with one variance per spectral shell.

Each step takes a random minibatch, weighs every rotation and shift by its posterior under the current map, and replaces a part of the
decayed sufficient statistics. Nothing is annealed by hand: the noise variance starts at the images' own power, so the first posteriors
are broad, and falls to the residual as the map explains the images. The Fourier radius marches outwards, faster once posteriors are sharp.

Sources: stochastic EM of the RELION/cryoSPARC school (Scheres 2012; Punjani et al. 2017); measured behaviour in docs/methods/marginal.md.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.groups.point import asymmetric_unit
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import Accumulator, insert_slices, slice_grid, slicing_grid, volume_from_accumulator
from cryorbit.physics.spectrum import mean_weight, power_spectrum, resized, shell_mean
from cryorbit.poses.grid import Expectation, ShiftGrid, expectation, shift_grid
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import FourierStack


@dataclass(frozen=True)
class MarginalConfig:
    """Settings of the ab initio engine. Radii count Fourier pixels of a box as wide as the particle, so they hold for any pixel size.

    Attributes
    ----------
    batch
        Images per step.
    order
        HEALPix order of the rotation grid (2: 4,608 rotations, 15 degrees apart).
    radius_start, radius_end
        Fourier radius at the first step and at the end, in units of 1 / particle diameter.
    march_steps
        Steps from the first radius to the last while posteriors are sharp; four times as many while they are broad.
    settle_steps
        Steps at the last radius, with slowly forgotten statistics.
    decay, settle_decay
        Factor on the old statistics at each step, while marching and while settling.
    sharp
        Posteriors count as sharp when the median effective number of poses is below this.
    shift_range
        Largest shift searched, in particle diameters; 0 searches none.
    tau_fudge
        Factor on the signal power in the Wiener prior (larger: noisier, more detailed map).
    modes
        Rotations per image handed to refinement.
    """

    batch: int = 500
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
    modes: int = 12


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
    seed
        Start and minibatches.
    """

    name = "abinitio"

    def __init__(
        self,
        stack: FourierStack,
        config: MarginalConfig,
        *,
        mask_diameter: float,
        symmetry: Float[Tensor, "s 3 3"],
        seed: int,
    ) -> None:
        self.stack, self.config, self.seed = stack, config, seed
        self.mask_diameter = mask_diameter
        device = stack.device
        self.symmetry = symmetry.to(device)
        grid = so3.healpix_grid(config.order).to(device)
        self.rotations = grid[asymmetric_unit(grid, self.symmetry)]
        self.mask = soft_sphere(stack.box, 0.5 * mask_diameter / stack.pixel_size, 3.0).to(device)
        shells = int(stack.disk.radius) + 2
        self.noise = torch.zeros(shells, device=device)
        self.march = torch.zeros(())
        self.settled = torch.zeros((), dtype=torch.int64)
        range_px = config.shift_range * mask_diameter / stack.pixel_size
        self.shift_sigma = torch.tensor(0.5 * range_px)
        self.statistics: Accumulator | None = None
        self.volume: Tensor = torch.zeros(stack.box, stack.box, stack.box, device=device)

    # -- schedule ---------------------------------------------------------------------------------------------------------------

    def radius(self) -> int:
        """Current Fourier radius in pixels of the working box."""
        c = self.config
        diameters = c.radius_start + (c.radius_end - c.radius_start) * float(self.march)
        return min(
            round(diameters * self.stack.box * self.stack.pixel_size / self.mask_diameter), int(self.stack.disk.radius)
        )

    def shifts(self) -> ShiftGrid:
        """Trial shifts: a lattice as coarse as the current resolution allows, under the current prior."""
        limit = self.config.shift_range * self.mask_diameter / self.stack.pixel_size
        step = 0.38 * self.stack.box / self.radius()
        return shift_grid(limit, min(step, max(limit, 1e-3)), float(self.shift_sigma))

    def total_steps(self) -> int:
        """Steps if posteriors stay broad throughout."""
        return 4 * self.config.march_steps + self.config.settle_steps

    def finished(self) -> bool:
        """Whether the last radius has been reached and settled at."""
        return int(self.settled) >= self.config.settle_steps

    # -- one step ---------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float | str]:
        """One minibatch: E-step, noise, M-step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        chosen = torch.randperm(len(self.stack), generator=generator)[: self.config.batch]
        radius = self.radius()
        if index == 0:
            self._start(chosen, radius, generator)
            effective = float("inf")
        else:
            result = self._expect(chosen, radius, modes=1)
            self._update_noise(result, len(chosen), radius)
            self._update_shift_prior(result)
            self._accumulate(result, radius)
            effective = float(result.effective.median())
        self._maximise(radius)
        self._advance(effective)
        resolution = self.stack.box * self.stack.pixel_size / radius
        return {
            "radius": float(radius),
            "resolution_A": resolution,
            "effective_poses": effective if math.isfinite(effective) else float(len(self.rotations)),
            "shift_sigma_A": float(self.shift_sigma) * self.stack.pixel_size,
            "noise_fraction": float(self.noise[1 : radius + 1].mean() / self.initial_noise[1 : radius + 1].mean()),
        }

    def _start(self, chosen: Int[Tensor, " b"], radius: int, generator: torch.Generator) -> None:
        """Random poses for the first batch; noise variance = power of the images."""
        images, ctf, disk = self._batch(chosen, int(self.stack.disk.radius))
        self.initial_noise = shell_mean(images.abs().square().mean(dim=0), disk, len(self.noise))
        self.noise = self.initial_noise.clone()
        images, ctf, disk = self._batch(chosen, radius)
        poses = self.rotations[torch.randint(len(self.rotations), (len(chosen),), generator=generator)]
        self.statistics = self._insert(images * ctf, ctf.square(), poses, disk, None)

    def _batch(self, chosen: Int[Tensor, " b"], radius: int) -> tuple[Tensor, Tensor, FourierDisk]:
        disk, keep = self.stack.at_radius(radius)
        return self.stack.images(chosen)[:, keep], self.stack.ctf(chosen)[:, keep], disk

    def _expect(self, chosen: Int[Tensor, " b"], radius: int, modes: int) -> Expectation:
        images, ctf, disk = self._batch(chosen, radius)
        grid = slicing_grid(self.volume, float(radius))
        slices = slice_grid(grid, self.rotations, disk)
        precision = disk.weight / self.noise[disk.shell]
        return expectation(images, ctf, slices, precision, self.shifts(), disk, modes)

    def _update_noise(self, result: Expectation, count: int, radius: int) -> None:
        disk, _ = self.stack.at_radius(radius)
        fresh = shell_mean(result.power / count, disk, len(self.noise))
        fresh = torch.maximum(fresh, 1e-4 * self.initial_noise)
        inside = torch.arange(len(self.noise), device=self.noise.device) <= radius
        self.noise = torch.where(inside, 0.7 * self.noise + 0.3 * fresh, self.noise)

    def _update_shift_prior(self, result: Expectation) -> None:
        floor = 0.1 * self.stack.box / self.radius()
        self.shift_sigma = (0.7 * self.shift_sigma**2 + 0.3 * result.shift_variance).sqrt().clamp_min(floor)

    def _accumulate(self, result: Expectation, radius: int) -> None:
        disk, _ = self.stack.at_radius(radius)
        used = result.weight.sum(dim=1) > 1e-6 * result.weight.sum() / len(self.rotations)
        decay = self.config.settle_decay if float(self.march) >= 1 else self.config.decay
        old = None if self.statistics is None else self.statistics.scaled(decay)
        self.statistics = self._insert(result.numerator[used], result.weight[used], self.rotations[used], disk, old)

    def _insert(
        self, values: Tensor, weights: Tensor, rotations: Tensor, disk: FourierDisk, out: Accumulator | None
    ) -> Accumulator:
        if out is not None:
            out = resized(out, disk.radius)
        for element in self.symmetry:
            out = insert_slices(values, weights, rotations @ element, disk, out=out)
        assert out is not None
        return out

    def _maximise(self, radius: int) -> None:
        """Map = numerator / (weight + noise / signal power), masked (Wiener; Scheres 2012 eq. 9)."""
        statistics = self.statistics
        assert statistics is not None
        shells = radius + 2
        weight = mean_weight(statistics, shells)
        if bool((self.volume == 0).all()):
            prior = 0.05 * weight
        else:
            signal = power_spectrum(slicing_grid(self.volume, float(radius)), shells)
            noise = torch.cat([self.noise, self.noise[-1:].expand(2)])[:shells]
            spread = statistics.oversampling**3  # one Fourier pixel's weight is spread over this many grid points
            prior = torch.minimum(noise / (self.config.tau_fudge * signal).clamp_min(1e-12) / spread, weight.max())
        self.volume = volume_from_accumulator(statistics, prior) * self.mask

    def _advance(self, effective: float) -> None:
        if float(self.march) >= 1:
            self.settled = self.settled + 1
        pace = 1.0 if effective < self.config.sharp else 0.25
        self.march = (self.march + pace / self.config.march_steps).clamp(max=1.0)

    def misfit(self) -> float:
        """Mean log noise variance over the Fourier pixels: minus twice the likelihood per pixel, to compare starts by; lower is better."""
        disk, _ = self.stack.at_radius(self.radius())
        return float((self.noise[disk.shell].log() * disk.weight).sum() / disk.weight.sum())

    # -- hand-over and resume ---------------------------------------------------------------------------------------------------

    def assign(
        self, chosen: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b m 3 3"], Float[Tensor, "b m 2"], Float[Tensor, " b"]]:
        """The ``config.modes`` most probable poses of the particles ``chosen``: rotations, shifts in angstrom, effective number of poses."""
        shifts = self.shifts()
        result = self._expect(chosen, self.radius(), self.config.modes)
        moved = shifts.points.to(result.best_shift.device)[result.best_shift] * self.stack.pixel_size
        return self.rotations[result.best], moved, result.effective

    def state(self) -> State:
        """Tensors that continue the run exactly."""
        statistics = self.statistics
        assert statistics is not None
        return {
            "volume": self.volume,
            "noise": self.noise,
            "initial_noise": self.initial_noise,
            "march": self.march,
            "settled": self.settled,
            "shift_sigma": self.shift_sigma,
            "numerator": statistics.numerator,
            "weight": statistics.weight,
            "statistics_radius": torch.tensor(statistics.radius),
        }

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        device = self.stack.device
        self.volume, self.noise, self.initial_noise = (
            state[k].to(device) for k in ("volume", "noise", "initial_noise")
        )
        self.march, self.settled, self.shift_sigma = state["march"], state["settled"], state["shift_sigma"]
        self.statistics = Accumulator(
            state["numerator"].to(device),
            state["weight"].to(device),
            self.stack.box,
            2,
            float(state["statistics_radius"]),
        )
