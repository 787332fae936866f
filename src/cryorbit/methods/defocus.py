"""Per-particle defocus beside the poses of a refinement: what it is now, and how widely it spreads around that of the file."""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.physics.fourier import Columns, FourierDisk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import SlicingGrid, slice_grid
from cryorbit.poses.defocus import defocus_posterior
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack


class DefocusSearch:
    """Offsets of the particles' defocus, searched at each particle's heaviest pose once per sweep.

    Parameters
    ----------
    stack
        Particles; their CTF follows what is found (``stack.defocus_offset``).
    reach
        Largest offset, angstrom. The prior begins with a third of it as its standard deviation, which is then learned from all particles.
    """

    def __init__(self, stack: FourierStack, reach: float) -> None:
        self.stack, self.reach = stack, reach
        self.tensors: State = {
            "defocus": stack.defocus_offset,
            "defocus_sd": torch.zeros(len(stack)),
            "defocus_mean": torch.zeros(len(stack)),
            "defocus_sigma": torch.tensor(reach / 3),
        }

    @property
    def sigma(self) -> float:
        """Standard deviation of the offsets, angstrom."""
        return float(self.tensors["defocus_sigma"])

    def state(self) -> State:
        """Everything a resumed run needs."""
        return dict(self.tensors)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`; other tensors in ``state`` are ignored."""
        self.tensors = fitted(state, {name: x.shape for name, x in self.tensors.items()})
        self.stack.defocus_offset = self.tensors["defocus"]

    def update(
        self,
        grid: SlicingGrid,
        chosen: Int[Tensor, " b"],
        poses: tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"]],
        images: Complex[Tensor, "b p"],
        intensity: Float[Tensor, " n"],
        within: tuple[FourierDisk, Columns, Float[Tensor, " q"]],
    ) -> None:
        """Search the particles ``chosen``, whose images are given, ``within`` a disk, its columns in the images and its precision.

        ``poses`` (shifts in pixels) and ``intensity`` are those of all particles.
        """
        disk, keep, precision = within
        rotations, shifts, strength = (x[chosen].to(images.device) for x in (*poses, intensity))
        predicted = slice_grid(grid, rotations, disk) * phase_ramp(shifts, disk)
        gamma, gain, rate = self.stack.ctf_phase(chosen)
        found = defocus_posterior(
            images[:, keep],
            predicted,
            gamma[:, keep],
            gain[:, keep] * strength[:, None],
            precision,
            rate,
            disk,
            reach=self.reach,
            sigma=self.sigma,
        )
        for name, value in (("defocus", found.best), ("defocus_mean", found.mean), ("defocus_sd", found.sd)):
            self.tensors[name][chosen] = value.cpu()

    def learn(self) -> dict[str, float]:
        """The prior's width that makes all particles most probable (one step of expectation-maximisation); what to write down of it."""
        t = self.tensors
        second = t["defocus_mean"].square() + t["defocus_sd"].square()
        t["defocus_sigma"] = torch.tensor(max(math.sqrt(float(second.mean())), 1e-3 * self.reach))
        return {"defocus_sigma_A": self.sigma}
