"""Class averages at full resolution, from given classes and poses: continuous poses refined on two halves, each against its own averages.

The classes stay as they are. In each sweep every half's images are averaged (CTF-weighted, Wiener), and every image is fitted to the average
that its own half made, up to the frequency where the halves still agree. Poses and classes start from references that both halves made: up to
their radius the Fourier ring correlation holds what both remember of them, even of noise; beyond it halves share nothing but the molecule.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.metrics.fsc import frc, last_shell
from cryorbit.metrics.masks import soft_disc
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.spectrum import shell_mean
from cryorbit.physics.turning import Planes, averages, empty_planes, insert_turned, plane_power, planes_of
from cryorbit.poses.planar import predicted, refine_planar
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack

HALVES = (1, 2)
_BATCH = 500
_PIXELS = 8_000_000  # Fourier pixels worked on at a time
_AGREED = 0.143
_MARGIN = 2  # shells beyond
_LEAST_SSNR = 1e-3
_ITERATIONS = 4
_TENSORS = ("angles", "shifts", "noise", "pictures", "correlation")


@dataclass(frozen=True)
class ClassAveragesConfig:
    """Settings: ``sweeps`` refinements of all poses before the last averages."""

    sweeps: int = 2


class ClassAverages:
    """A ``training.loop.Method``: one step is one sweep over all particles, the last one averages only.

    Parameters
    ----------
    stack
        Particles to Nyquist.
    config
        Settings.
    classes
        Number of classes K.
    which, angles, shifts_px
        (N,) class, (N,) radian, (N, 2) pixels of the stack's box.
    half_set
        (N,) 1 or 2.
    mask_diameter
        Particle diameter in angstrom.
    """

    name = "averages"

    def __init__(
        self,
        stack: FourierStack,
        config: ClassAveragesConfig,
        *,
        classes: int,
        which: Int[Tensor, " n"],
        angles: Float[Tensor, " n"],
        shifts_px: Float[Tensor, "n 2"],
        half_set: Int[Tensor, " n"],
        mask_diameter: float,
    ) -> None:
        self.stack, self.config, self.classes = stack, config, classes
        self.which, self.half_set = which, half_set
        self.angles, self.shifts = angles.clone(), shifts_px.clone()
        self.batch = max(16, min(_BATCH, _PIXELS // len(stack.disk)))
        self.mask = soft_disc(stack.box, min(0.5 * mask_diameter / stack.pixel_size, 0.5 * stack.box - 3)).to(
            stack.device
        )
        self.shells = stack.box // 2 + 1
        self.noise = torch.zeros(0)
        self.pictures = torch.zeros(classes, stack.box, stack.box)
        self.correlation = torch.zeros(classes, self.shells)

    def total_steps(self) -> int:
        """Sweeps, and the last averages."""
        return self.config.sweeps + 1

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """Average both halves; then, except in the last step, fit every pose to the averages of its own half."""
        if not len(self.noise):
            power = self.stack.power
            self.noise = torch.cat([power, power[-1:].expand(max(0, self.shells + 1 - len(power)))])
        numerators, weights = self._sums()
        raw = [self._filtered(n, w, self._flat_prior(w)) for n, w in zip(numerators, weights, strict=True)]
        self.correlation = torch.stack([frc(a, b) for a, b in zip(raw[0].cpu(), raw[1].cpu(), strict=True)]).float()
        moved = 0.0
        if index < self.config.sweeps:
            moved = self._refine(
                [self._filtered(n, w, self._prior(w, halves=True)) for n, w in zip(numerators, weights, strict=True)]
            )
        else:
            both = (numerators[0] + numerators[1], weights[0] + weights[1])
            self.pictures = self._filtered(*both, self._prior(both[1], halves=False)).cpu()
        return {
            "resolution_A": self.stack.box * self.stack.pixel_size / max(1, self._reach()),
            "pose_change_deg": moved,
        }

    # -- averages ---------------------------------------------------------------------------------------------------------------

    def _sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """Numerators and weights (K, G) of both halves at the present poses."""
        disk = self.stack.disk.to(self.stack.device)
        like = torch.zeros((), device=self.stack.device)
        numerator, weight = (
            empty_planes(2 * self.classes, self.stack.box, disk.radius, x) for x in (like.to(torch.complex64), like)
        )
        for chosen in torch.arange(len(self.stack)).split(self.batch):
            images, ctf, angles, shifts, which = self._of(chosen)
            row = which + self.classes * (self.half_set[chosen] - 1).to(which.device)
            values = images * ctf * phase_ramp(shifts, disk).conj()
            numerator = insert_turned(numerator, values, angles, row, disk)
            weight = insert_turned(weight, ctf.square(), angles, row, disk)
        return list(numerator.data.split(self.classes)), list(weight.data.split(self.classes))

    def _of(self, chosen: Int[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        device = self.stack.device
        posed = (self.angles[chosen].to(device), self.shifts[chosen].to(device), self.which[chosen].to(device))
        return self.stack.images(chosen), self.stack.ctf(chosen), *posed

    def _planes(self, data: Tensor) -> Planes:
        return Planes(data, self.stack.box, float(self.stack.disk.radius))

    def _mean_weight(self, weight: Tensor) -> Float[Tensor, "k shells"]:
        return plane_power(self._planes(weight.clamp_min(0).sqrt()), self.shells)

    def _flat_prior(self, weight: Tensor) -> Float[Tensor, "k shells"]:
        """As little as keeps what no image has measured at zero: FRC is to compare averages, not priors."""
        return 1e-2 * self._mean_weight(weight) + 1e-6

    def _prior(self, weight: Tensor, *, halves: bool) -> Float[Tensor, "k shells"]:
        """What makes ``weight / (weight + prior)`` the Wiener filter of the correlation: ``weight / SSNR``; all is cut past its first fall."""
        mean = self._mean_weight(weight)
        curve = self.correlation.to(mean.device).clamp(0.0, 0.999)
        kept = torch.stack([torch.arange(self.shells) <= last_shell(c, _AGREED) for c in self.correlation]).to(
            mean.device
        )
        ssnr = curve / (1 - curve) * (1.0 if halves else 2.0)
        return mean / torch.where(kept, ssnr, 0.0).clamp_min(_LEAST_SSNR) + 1e-6

    def _filtered(self, numerator: Tensor, weight: Tensor, prior: Tensor) -> Float[Tensor, "k d d"]:
        return averages(self._planes(numerator), self._planes(weight), prior) * self.mask

    # -- poses ------------------------------------------------------------------------------------------------------------------

    def radius(self) -> int:
        """How far poses are fitted: where the halves of the median class still agree, and a margin."""
        return int(min(max(4, self._reach() + _MARGIN), self.stack.disk.radius, (self.stack.box - 1) // 2))

    def _reach(self) -> int:
        return sorted(last_shell(curve, _AGREED) for curve in self.correlation)[self.classes // 2]

    def _refine(self, halves: list[Tensor]) -> float:
        disk, keep = self.stack.at_radius(self.radius())
        planes = [planes_of(pictures, disk.radius) for pictures in halves]
        precision = disk.weight / self.noise[disk.shell.cpu()].to(disk.weight)
        residual, count = torch.zeros(len(disk), device=self.stack.device), 0
        before = self.angles.clone()
        for half, plane in zip(HALVES, planes, strict=True):
            for chosen in torch.nonzero(self.half_set == half)[:, 0].split(self.batch):
                images, ctf, angles, shifts, which = self._of(chosen)
                images, ctf = images[:, keep], ctf[:, keep]
                angles, shifts = refine_planar(
                    plane, which, images, ctf, precision, angles, shifts, disk, iterations=_ITERATIONS
                )
                left = images - predicted(plane, which, ctf, angles, shifts, disk)
                residual, count = residual + left.abs().square().sum(0), count + len(chosen)
                self.angles[chosen], self.shifts[chosen] = angles.cpu(), shifts.cpu()
        self._update_noise(residual / count, disk)
        turn = self.angles - before
        return float(torch.rad2deg(torch.atan2(turn.sin(), turn.cos()).abs().median()))

    def _update_noise(self, residual: Float[Tensor, " p"], disk: FourierDisk) -> None:
        fresh = shell_mean(residual, disk, len(self.noise)).cpu()
        inside = torch.arange(len(self.noise)) <= disk.radius
        self.noise = torch.where(inside & (fresh > 0), fresh, self.noise)

    # -- resume -----------------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Tensors that continue the run exactly."""
        return {name: getattr(self, name).clone() for name in _TENSORS}

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        shapes = {name: getattr(self, name).shape for name in _TENSORS} | {"noise": (self.shells + 1,)}
        for name, value in fitted(state, shapes).items():
            setattr(self, name, value)
