"""One online EM run from a random start: a map, its statistics and its noise model. ``methods/marginal.py`` runs several of them.

The noise variance starts at the images' own power, so the first posteriors are broad, and falls to the residual as the map explains the
images: nothing is annealed by hand. Stochastic EM of the RELION/cryoSPARC school (Scheres 2012; Punjani et al. 2017).
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.groups.point import asymmetric_unit
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import (
    Accumulator,
    half_width,
    insert_symmetric,
    slice_grid,
    slicing_grid,
    volume_from_accumulator,
)
from cryorbit.physics.spectrum import followed_noise, mean_weight, power_spectrum, resized, shell_mean
from cryorbit.poses.grid import Expectation, ShiftGrid, expectation, with_half_turns
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses

_NOISE_RATE = 0.3
_NOISE_ROUNDS = 3  # of fitting it to given images
_INTENSITY_SD = 0.2
_START_PRIOR = 0.05  # of the mean weight, while there is no map to take a signal power from
_OWN = ("volume", "noise", "initial_noise", "shift_sigma", "likelihood", "intensity")
_SUMS = ("numerator", "weight")


@dataclass(frozen=True)
class Grids:
    """What a step searches: ``rotations`` (H, 3, 3), one of each pair of half turns, ``shifts`` and the Fourier ``radius``."""

    rotations: Float[Tensor, "h 3 3"]
    shifts: ShiftGrid
    radius: int


def rotation_grid(
    order: int, symmetry: Float[Tensor, "s 3 3"], turn: Float[Tensor, "3 3"] | None = None
) -> Float[Tensor, "h 3 3"]:
    """HEALPix rotations of ``order`` after ``turn`` of the molecule, half of each in-plane pair, one asymmetric unit."""
    grid = so3.half_grid(order).to(symmetry.device)
    if turn is not None:
        grid = grid @ turn.to(grid)
    return grid[asymmetric_unit(grid, symmetry)]


class OnlineEM:
    """A run over the images of one half set.

    Parameters
    ----------
    stack
        Particles as Fourier pixels.
    mask
        (D, D, D) soft mask of the map.
    symmetry
        (S, 3, 3) rotations imposed on the map.
    tau_fudge
        Factor on the signal power in the Wiener prior.
    shift_sigma
        First standard deviation of the shifts in pixels.
    """

    def __init__(
        self,
        stack: FourierStack,
        mask: Float[Tensor, "d d d"],
        symmetry: Float[Tensor, "s 3 3"],
        tau_fudge: float,
        shift_sigma: float,
    ) -> None:
        self.stack, self.mask, self.symmetry, self.tau_fudge = stack, mask, symmetry, tau_fudge
        device = stack.device
        self.volume: Tensor = torch.zeros(stack.box, stack.box, stack.box, device=device)
        self.noise = torch.zeros(int(stack.disk.radius) + 2, device=device)
        self.initial_noise = self.noise.clone()
        self.shift_sigma = torch.tensor(shift_sigma)
        self.likelihood = torch.tensor(float("-inf"))
        self.intensity = torch.ones(len(stack), device=device)  # how much stronger each image is than the map
        self.statistics: Accumulator | None = None

    def batch(self, chosen: Int[Tensor, " b"], radius: int) -> tuple[Tensor, Tensor, FourierDisk]:
        """Images and CTF of the particles ``chosen`` inside ``radius``."""
        disk, keep = self.stack.at_radius(radius)
        return self.stack.images(chosen)[:, keep], self.stack.ctf(chosen)[:, keep], disk

    def intensity_of(self, chosen: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Of the particles ``chosen``."""
        return self.intensity[chosen.to(self.intensity.device)]

    def expect(
        self,
        chosen: Int[Tensor, " b"],
        grids: Grids,
        intensity: Float[Tensor, " b"] | None = None,
        *,
        modes: int = 1,
        sums: bool = False,
    ) -> Expectation:
        """Posteriors of the particles ``chosen`` under the present map; ``intensity`` is how much stronger than the map each is."""
        images, ctf, disk = self.batch(chosen, grids.radius)
        if intensity is not None:
            ctf = ctf * intensity[:, None]
        slices = slice_grid(slicing_grid(self.volume, float(grids.radius)), grids.rotations, disk)
        precision = disk.weight / self.noise[disk.shell]
        return expectation(images, ctf, slices, precision, grids.shifts, disk, modes=modes, sums=sums)

    def log_likelihood(self, chosen: Int[Tensor, " b"], grids: Grids) -> Float[Tensor, " b"]:
        """Log density of each image under map, noise and pose prior, in nats, up to a constant of the pixels inside the radius."""
        images, _, disk = self.batch(chosen, grids.radius)
        evidence = self.expect(chosen, grids).log_evidence
        variance = self.noise[disk.shell]
        quadratic = (images.abs().square() * (disk.weight / variance)).sum(dim=1)
        return evidence - 0.5 * quadratic - 0.5 * (disk.weight * variance.log()).sum()

    def with_map(self, volume: Float[Tensor, "d d d"]) -> "OnlineEM":
        """This run with another map."""
        changed = copy.copy(self)
        changed.volume = volume
        return changed

    def with_noise_of(self, chosen: Int[Tensor, " b"], grids: Grids) -> "OnlineEM":
        """This run with the noise spectrum that makes the images ``chosen`` likeliest, as runs of different ages are to be compared."""
        changed = copy.copy(self)
        disk, _ = self.stack.at_radius(grids.radius)
        for _ in range(_NOISE_ROUNDS):
            changed._update_noise(changed.expect(chosen, grids, sums=True).power / len(chosen), disk, grids.radius, 1.0)
        return changed

    def top_poses(self, chosen: Int[Tensor, " b"], grids: Grids) -> tuple[Poses, Float[Tensor, " b"]]:
        """The most probable pose of each particle, on the grid (shifts in pixels of the working box, float64), and how many it keeps."""
        result = self.expect(chosen, grids)
        rotations = with_half_turns(grids.rotations)[result.best[:, 0]].cpu().double()
        return Poses(rotations, grids.shifts.points[result.best_shift[:, 0].cpu()].double()), result.effective.cpu()

    def start(self, chosen: Int[Tensor, " b"], grids: Grids, generator: torch.Generator) -> None:
        """Random poses for the first batch, unless there is a map to weigh poses by; noise variance = power of the images."""
        self.take_noise(chosen)
        if bool((self.volume != 0).any()):
            self.step(chosen, grids, decay=0.0)
            return
        images, ctf, disk = self.batch(chosen, grids.radius)
        every = with_half_turns(grids.rotations)
        poses = every[torch.randint(len(every), (len(chosen),), generator=generator)]
        self._insert(images * ctf, ctf.square(), poses, disk)
        self._maximise(grids.radius)

    def take_noise(self, chosen: Int[Tensor, " b"]) -> None:
        """Noise variance = power of the images ``chosen``: all that a map yet to come may explain."""
        images, _, disk = self.batch(chosen, int(self.stack.disk.radius))
        self.initial_noise = shell_mean(images.abs().square().mean(dim=0), disk, len(self.noise))
        self.noise = self.initial_noise.clone()

    def start_from(self, other: "OnlineEM") -> None:
        """Take over another run's map and noise model, but none of its statistics: they hold images of the other half."""
        self.volume, self.noise, self.shift_sigma = other.volume.clone(), other.noise.clone(), other.shift_sigma.clone()
        if self.statistics is not None:
            self.statistics = self.statistics.scaled(0.0)

    def step(self, chosen: Int[Tensor, " b"], grids: Grids, decay: float, *, intensities: bool = False) -> Expectation:
        """E-step on the particles ``chosen``, noise and shift prior, M-step with the old statistics times ``decay``.

        With ``intensities`` each image is weighed with its own, which is then estimated anew.
        """
        result = self.expect(chosen, grids, self.intensity_of(chosen) if intensities else None, sums=True)
        if intensities:
            mean = 0.5 * (self.intensity_of(chosen) + self.fresh_intensity(chosen, result))
            self.intensity[chosen.to(self.intensity.device)] = mean
        disk, _ = self.stack.at_radius(grids.radius)
        self._update_noise(result.power / len(chosen), disk, grids.radius, _NOISE_RATE)
        floor = 0.1 * self.stack.box / grids.radius
        self.shift_sigma = (
            ((1 - _NOISE_RATE) * self.shift_sigma**2 + _NOISE_RATE * result.shift_variance).sqrt().clamp_min(floor)
        )
        if self.statistics is not None:
            self.statistics = self.statistics.scaled(decay)
        used = result.weight.sum(dim=1) > 1e-6 * result.weight.sum() / len(grids.rotations)
        self._insert(result.numerator[used], result.weight[used], grids.rotations[used], disk)
        self._maximise(grids.radius)
        return result

    def fresh_intensity(self, chosen: Int[Tensor, " b"], result: Expectation) -> Float[Tensor, " b"]:
        """How much stronger than the map the particles ``chosen`` are, by posteriors taken with their present intensities.

        Shrunk towards 1 (a Gaussian prior of 0.2).
        """
        present, precision = self.intensity_of(chosen), _INTENSITY_SD**-2
        cross, energy = result.intensity
        return ((cross / present + precision) / (energy / present.square() + precision)).clamp(0.3, 3.0)

    def _update_noise(self, power: Float[Tensor, " p"], disk: FourierDisk, radius: int, rate: float) -> None:
        self.noise = followed_noise(self.noise, self.initial_noise, power, disk, radius, rate)

    def _insert(self, values: Tensor, weights: Tensor, rotations: Tensor, disk: FourierDisk) -> None:
        out = None if self.statistics is None else resized(self.statistics, disk.radius)
        self.statistics = insert_symmetric(values, weights, rotations, self.symmetry, disk, out=out)

    def _maximise(self, radius: int) -> None:
        """Map = numerator / (weight + noise / signal power), masked (Wiener; Scheres 2012 eq. 9)."""
        statistics = self.statistics
        assert statistics is not None
        shells = radius + 2
        weight = mean_weight(statistics, shells)
        if bool((self.volume == 0).all()):
            prior = _START_PRIOR * weight
        else:
            signal = power_spectrum(slicing_grid(self.volume, float(radius)), shells)
            spread = statistics.oversampling**3  # one Fourier pixel's weight is spread over this many grid points
            prior = torch.minimum(
                self.noise[:shells] / (self.tau_fudge * signal).clamp_min(1e-12) / spread, weight.max()
            )
        self.volume = volume_from_accumulator(statistics, prior) * self.mask

    def state(self) -> State:
        """Tensors that continue the run exactly."""
        s = self.statistics
        assert s is not None
        sums = {"numerator": s.numerator, "weight": s.weight, "radius": torch.tensor(s.radius)}
        return {name: getattr(self, name) for name in _OWN} | sums

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        radius = float(state["radius"])
        c = half_width(radius, 2)
        shapes = {name: getattr(self, name).shape for name in _OWN} | dict.fromkeys(
            _SUMS, (2 * c + 1, 2 * c + 1, c + 2)
        )
        moved = {k: v.to(self.stack.device) if v.ndim else v for k, v in fitted(state, shapes).items()}
        numerator, weight = (moved.pop(name) for name in _SUMS)
        self.statistics = Accumulator(numerator, weight, self.stack.box, 2, radius)
        for name, value in moved.items():
            setattr(self, name, value)
