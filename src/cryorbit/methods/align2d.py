"""2-D classes by dense marginalisation: online EM over (class, in-plane angle, shift), the engine of ``abinitio`` on SO(2).

* **picture**: K class averages (oversampled Fourier sums of numerator and CTF^2 weight).
* **poses**: posterior over classes x angles x a shift lattice, uncapped (``poses/grid.py``; a class at an angle is what a slice is there).
* **objective**: marginal likelihood with equal weights of the classes, Gaussian noise with one variance per spectral shell.

The mixture of Sigworth (1998, J. Struct. Biol. 122) and Scheres et al. (2005, J. Mol. Biol. 348), with the schedule of ``methods/marginal.py``:
minibatches, old sums forgotten by a factor, noise that starts at the images' own power, a Fourier radius that marches outwards. Two things keep
classes from dying out: their weights are not estimated (a mixture with weights starves small classes), and one that holds next to nothing is
given half of the largest. The Wiener prior takes its signal power from all classes together, so a small class is not flattened for being small.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.groups.so2 import SO2
from cryorbit.metrics.junk import incoherent_evidence
from cryorbit.metrics.masks import soft_disc
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.spectrum import followed_noise, shell_mean
from cryorbit.physics.turning import (
    OVERSAMPLING,
    Planes,
    averages,
    empty_planes,
    insert_turned,
    plane_power,
    planes_of,
    resized_planes,
    turned,
)
from cryorbit.poses.grid import ShiftGrid, expectation, shift_grid
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack

_NOISE_RATE = 0.3
_START_PRIOR = 0.05  # of the mean weight, while there is no picture to take a signal power from
_STARVED = 0.15  # of the mean share of a class
_OWN = ("pictures", "noise", "initial_noise", "shift_sigma", "march", "settled")
_SUMS = ("numerator", "weight")
_BLANK, _SURELY = 1e-6, 1e3  # share of the images' power below which an image shows nothing; its junk score in nats
_TOLD = 1e-5  # of the matches: a smaller difference is rounding


@dataclass(frozen=True)
class Align2DConfig:
    """Settings of the 2-D engine. Radii count Fourier pixels of a box as wide as the particle, so they hold for any pixel size.

    Attributes
    ----------
    classes
        How many; 0: one for 100 particles, at most 50.
    batch
        Images in a step, or 40 for each class where that is more.
    radius_start, radius_end
        Fourier radius at the first step and at the end, in units of 1 / particle diameter.
    march_steps
        Steps from the first radius to the last.
    settle_steps
        Steps at the last radius, with slowly forgotten sums.
    decay, settle_decay
        Factor on the old sums at each step, while marching and while settling.
    shift_range
        Largest shift searched, in particle diameters; 0 searches none.
    tau_fudge
        Factor on the signal power in the Wiener prior.
    """

    classes: int = 0
    batch: int = 1000
    radius_start: float = 3.0
    radius_end: float = 12.0
    march_steps: int = 24
    settle_steps: int = 6
    decay: float = 0.6
    settle_decay: float = 0.8
    shift_range: float = 0.1
    tau_fudge: float = 1.0


@dataclass(frozen=True)
class Assignment:
    """The most probable class and pose of each image.

    Attributes
    ----------
    which, angles, shifts
        (B,) class, (B,) radian, (B, 2) pixels of the working box.
    effective
        (B,) effective number of classes x angles.
    gain
        (B,) log marginal likelihood over that of noise alone, nats.
    junk
        (B,) log likelihood of something with a particle's power but not its shape, less ``gain``: positive where that explains more.
    features
        (B, K) as of :func:`invariant_features`.
    """

    which: Int[Tensor, " b"]
    angles: Float[Tensor, " b"]
    shifts: Float[Tensor, "b 2"]
    effective: Float[Tensor, " b"]
    gain: Float[Tensor, " b"]
    junk: Float[Tensor, " b"]
    features: Float[Tensor, "b k"]


def invariant_features(matches: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """How a particle looks and not how it is turned, shifted or how strong it is: its best match with every class over angles and shifts, less
    their mean, at unit length. Which frequencies are compared is up to its CTF. Zeros where all classes match alike, as a single one does."""
    away = (matches - matches.mean(dim=1, keepdim=True)).double()
    length = away.norm(dim=1, keepdim=True)
    told = length > _TOLD * matches.abs().amax(dim=1, keepdim=True)
    return torch.where(told, away / length, 0.0).to(matches)


class _Compared(NamedTuple):
    """Images and what they are compared with, as ``poses.grid`` takes them."""

    images: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"]
    pictures: Complex[Tensor, "h p"]
    precision: Float[Tensor, " p"]
    shifts: ShiftGrid
    disk: FourierDisk


class Align2D:
    """The engine; a ``training.loop.Method``.

    Parameters
    ----------
    stack
        Particles as Fourier pixels; its radius should cover ``radius_end``.
    config
        Settings.
    mask_diameter
        Particle diameter in angstrom.
    seed
        Starts and minibatches.
    """

    name = "align2d"

    def __init__(self, stack: FourierStack, config: Align2DConfig, *, mask_diameter: float, seed: int) -> None:
        self.stack, self.config, self.seed, self.mask_diameter = stack, config, seed, mask_diameter
        self.classes = config.classes or min(50, max(1, len(stack) // 100))
        self.batch = min(max(config.batch, 40 * self.classes), len(stack))
        device = stack.device
        self.mask = soft_disc(stack.box, 0.5 * mask_diameter / stack.pixel_size).to(device)
        self.pictures: Tensor = torch.zeros(self.classes, stack.box, stack.box, device=device)
        self.noise = torch.zeros(int(stack.disk.radius) + 2, device=device)
        self.initial_noise = self.noise.clone()
        self.shift_sigma = torch.tensor(0.5 * self._shift_limit())
        self.march, self.settled = torch.tensor(0.0), torch.tensor(0)
        self.numerator: Planes | None = None
        self.weight: Planes | None = None

    # -- schedule ---------------------------------------------------------------------------------------------------------------

    def radius(self) -> int:
        """Present Fourier radius in pixels of the working box."""
        c = self.config
        periods = c.radius_start + (c.radius_end - c.radius_start) * float(self.march)
        return max(2, min(round(periods * self.stack.box * self.stack.pixel_size / self.mask_diameter), self._last()))

    def _last(self) -> int:
        return int(min(self.stack.disk.radius, (self.stack.box - 1) // 2))

    def _shift_limit(self) -> float:
        return self.config.shift_range * self.mask_diameter / self.stack.pixel_size

    def total_steps(self) -> int:
        """March, settle, and the random start."""
        return 1 + self.config.march_steps + self.config.settle_steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def angles(self, radius: int, offset: float = 0.0) -> Float[Tensor, " a"]:
        """Half a turn of in-plane angles, a radian over the periods in a particle apart; the other half are their half turns."""
        periods = radius * self.mask_diameter / (self.stack.box * self.stack.pixel_size)
        count = max(6, math.ceil(math.pi * periods))
        return ((torch.arange(count) + offset) * (math.pi / count)).to(self.stack.device)

    # -- E-step -----------------------------------------------------------------------------------------------------------------

    def _batch(self, chosen: Int[Tensor, " b"], radius: int) -> tuple[Tensor, Tensor, FourierDisk]:
        disk, keep = self.stack.at_radius(radius)
        return self.stack.images(chosen)[:, keep], self.stack.ctf(chosen)[:, keep], disk

    def _shifts(self, radius: int) -> ShiftGrid:
        limit = self._shift_limit()
        return shift_grid(limit, min(0.38 * self.stack.box / radius, max(limit, 1e-3)), float(self.shift_sigma))

    def _compared(self, chosen: Int[Tensor, " b"], radius: int, angles: Float[Tensor, " a"]) -> _Compared:
        """What is compared: the particles ``chosen`` with every class at every angle, class k at angle a in place ``k * A + a``."""
        images, ctf, disk = self._batch(chosen, radius)
        pictures = turned(planes_of(self.pictures, float(radius)), angles, disk).flatten(0, 1)
        return _Compared(images, ctf, pictures, disk.weight / self.noise[disk.shell], self._shifts(radius), disk)

    def assign(self, chosen: Int[Tensor, " b"]) -> Assignment:
        """Most probable class, angle and shift of the particles ``chosen`` under the present averages."""
        radius = self.radius()
        angles = self.angles(radius)
        compared = self._compared(chosen, radius, angles)
        result = expectation(*compared, sums=False, groups=self.classes)
        count, best = len(angles), result.best[:, 0]
        half = best >= self.classes * count
        index = torch.where(half, best - self.classes * count, best)
        angle = angles[index % count] + torch.where(half, math.pi, 0.0)
        disk = compared.disk
        signal = plane_power(planes_of(self.pictures, float(radius)), len(self.noise)).mean(0)
        power = compared.images.abs().square().sum(dim=1)
        blank = power < _BLANK * self.initial_noise[disk.shell].sum()
        incoherent = incoherent_evidence(
            compared.images, compared.ctf, self.noise[disk.shell], signal[disk.shell], disk
        )
        return Assignment(
            index // count,
            SO2().compose(angle, torch.zeros_like(angle)),
            compared.shifts.points.to(angle)[result.best_shift[:, 0]],
            result.effective,
            result.log_evidence,
            torch.where(blank, _SURELY, incoherent - result.log_evidence),
            invariant_features(result.matches),
        )

    # -- one step ---------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float | str]:
        """One minibatch; the first is put at random classes and poses."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        chosen = torch.randperm(len(self.stack), generator=generator)[: self.batch]
        radius, c = self.radius(), self.config
        angles = self.angles(radius, float(torch.rand((), generator=generator)))
        if self.numerator is None:
            self._start(chosen, radius, generator)
            effective = float(2 * self.classes * len(angles))
            occupied = float(self.classes)
        else:
            compared = self._compared(chosen, radius, angles)
            result, disk = expectation(*compared), compared.disk
            self.noise = followed_noise(
                self.noise, self.initial_noise, result.power / len(chosen), disk, radius, _NOISE_RATE
            )
            floor = 0.1 * self.stack.box / radius
            self.shift_sigma = (
                ((1 - _NOISE_RATE) * self.shift_sigma**2 + _NOISE_RATE * result.shift_variance).sqrt().clamp_min(floor)
            )
            self._forget(c.settle_decay if float(self.march) >= 1 else c.decay, radius)
            self._insert(result.numerator, result.weight, angles, disk)
            self._maximise(radius)
            occupied = self._revive(radius, generator) if float(self.march) < 1 else self._occupied()
            effective = float(result.effective.median())
            if float(self.march) >= 1:
                self.settled = self.settled + 1
            self.march = (self.march + 1.0 / c.march_steps).clamp(max=1.0)
        return {
            "radius": float(radius),
            "resolution_A": self.stack.box * self.stack.pixel_size / radius,
            "effective_poses": effective,
            "classes": occupied,
            "shift_sigma_A": float(self.shift_sigma) * self.stack.pixel_size,
            "noise_fraction": float(self.noise[1 : radius + 1].mean() / self.initial_noise[1 : radius + 1].mean()),
        }

    def _start(self, chosen: Int[Tensor, " b"], radius: int, generator: torch.Generator) -> None:
        images, _, disk = self._batch(chosen, int(self.stack.disk.radius))
        self.initial_noise = shell_mean(images.abs().square().mean(dim=0), disk, len(self.noise))
        self.noise = self.initial_noise.clone()
        images, ctf, disk = self._batch(chosen, radius)
        angles = SO2().random(len(chosen), generator).to(images.device)
        which = torch.arange(len(chosen), device=images.device) % self.classes
        self._forget(0.0, radius)
        assert self.numerator is not None
        assert self.weight is not None
        self.numerator = insert_turned(self.numerator, images * ctf, angles, which, disk)
        self.weight = insert_turned(self.weight, ctf.square(), angles, which, disk)
        self._maximise(radius)

    def _forget(self, factor: float, radius: int) -> None:
        """Old sums times ``factor``, on planes for ``radius``."""
        if self.numerator is None or self.weight is None:
            like = torch.zeros((), device=self.stack.device)
            self.numerator = empty_planes(self.classes, self.stack.box, float(radius), like.to(torch.complex64))
            self.weight = empty_planes(self.classes, self.stack.box, float(radius), like)
        old = (resized_planes(self.numerator, float(radius)), resized_planes(self.weight, float(radius)))
        self.numerator, self.weight = (Planes(p.data * factor, p.box, p.radius) for p in old)

    def _insert(
        self,
        values: Complex[Tensor, "h p"],
        weights: Float[Tensor, "h p"],
        angles: Float[Tensor, " a"],
        disk: FourierDisk,
    ) -> None:
        assert self.numerator is not None
        assert self.weight is not None
        every = angles.repeat(self.classes)
        which = torch.arange(self.classes, device=angles.device).repeat_interleave(len(angles))
        self.numerator = insert_turned(self.numerator, values, every, which, disk)
        self.weight = insert_turned(self.weight, weights, every, which, disk)

    def _maximise(self, radius: int) -> None:
        """Average = numerator / (weight + noise / signal power), masked (Wiener; Scheres 2012 eq. 9)."""
        assert self.numerator is not None
        assert self.weight is not None
        shells = radius + 2
        weight = plane_power(Planes(self.weight.data.clamp_min(0).sqrt(), self.weight.box, self.weight.radius), shells)
        if bool((self.pictures == 0).all()):
            prior = _START_PRIOR * weight.mean(0, keepdim=True)
        else:
            signal = plane_power(planes_of(self.pictures, float(radius)), shells).mean(0, keepdim=True)
            noise = torch.cat([self.noise, self.noise[-1:].expand(2)])[:shells]
            spread = OVERSAMPLING**2  # one Fourier pixel's weight is spread over this many points
            prior = torch.minimum(noise / (self.config.tau_fudge * signal).clamp_min(1e-12) / spread, weight.max())
        self.pictures = averages(self.numerator, self.weight, prior) * self.mask

    def shares(self) -> Float[Tensor, " k"]:
        """Share of the sums' weight that each class holds."""
        assert self.weight is not None
        total = self.weight.data.sum(1)
        return total / total.sum()

    def _occupied(self) -> float:
        return float((self.shares() > _STARVED / self.classes).sum())

    def _revive(self, radius: int, generator: torch.Generator) -> float:
        """Give half of the largest class to one that holds next to nothing; how many classes had their own."""
        assert self.numerator is not None
        assert self.weight is not None
        shares = self.shares()
        starved = torch.nonzero(shares < _STARVED / self.classes)[:, 0]
        numerator, weight = self.numerator.data.clone(), self.weight.data.clone()
        for empty in starved.tolist():
            largest = int(shares.argmax())
            part = 0.5 * numerator[largest]
            # at the level of the noise in a sum of this weight, so that the two can part
            scatter = torch.randn(2, *part.shape, generator=generator).to(part.device)
            shell = self.numerator.norm().round().to(torch.int64).clamp(max=len(self.noise) - 1)
            level = (0.25 * weight[largest] * self.noise[shell]).sqrt()
            noise = torch.complex(scatter[0] * level, scatter[1] * level)
            numerator[empty], numerator[largest] = part + noise, part - noise
            weight[empty] = weight[largest] = 0.5 * weight[largest]
            shares[empty] = shares[largest] = 0.5 * shares[largest]
        if len(starved):
            self.numerator = Planes(numerator, self.numerator.box, self.numerator.radius)
            self.weight = Planes(weight, self.weight.box, self.weight.radius)
            self._maximise(radius)
        return float(self.classes - len(starved))

    # -- resume -----------------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Tensors that continue the run exactly."""
        assert self.numerator is not None
        assert self.weight is not None
        sums = {"numerator": self.numerator.data, "weight": self.weight.data}
        return {name: getattr(self, name) for name in _OWN} | sums | {"radius": torch.tensor(self.numerator.radius)}

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        radius = float(state["radius"])
        grid = empty_planes(self.classes, self.stack.box, radius, self.pictures).data.shape
        shapes = {name: getattr(self, name).shape for name in _OWN} | dict.fromkeys(_SUMS, grid)
        moved = {k: v.to(self.stack.device) if v.ndim else v for k, v in fitted(state, shapes).items()}
        self.numerator, self.weight = (Planes(moved.pop(name), self.stack.box, radius) for name in _SUMS)
        for name, value in moved.items():
            setattr(self, name, value)
