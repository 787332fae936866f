"""A map plus a neural field that corrects it: a coordinate network on the voxels of the particle (papers/003 section 4.2, papers/001).

The field lives in real space, where papers/003 eq. 33 puts it in Fourier space. Fitted to one half map of 4AKE from nothing (64 px, -10 dB, 60
steps), a real field of 128 x 2 came to a mean FSC with the truth of 0.75, eq. 33 of no less cost in Fourier space to 0.37: a molecule
fills a small part of the box, a real field is asked only there, and the mask and Hermitian symmetry hold without being learnt.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from cryorbit.metrics.masks import soft_sphere
from cryorbit.networks.fouriernet import Siren
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import slice_grid, slicing_grid

_FREQUENCY = 1.0  # radian per pixel and axis of the first waves: most of them lie below Nyquist's pi
_RATE, _WARM_UP = 2e-2, 5  # Adam's, and steps over which it rises


class NeuralVolume(nn.Module):
    """Density ``base + unit * field(position)`` on D^3 voxels, with differentiable central slices.

    Parameters
    ----------
    box
        Side length D in pixels.
    oversampling
        Zero padding before the transform, as for ``VoxelVolume``.
    width, depth
        Of the network.
    seed
        Of its start: two halves must not share it, or their fields would agree where they are wrong.

    Attributes
    ----------
    base
        (D, D, D) map in zyx order that the field is added to, kept as it is; zero at first.
    unit
        () density that one unit of the network's output stands for: as given, or the spread of the map it started from; of an empty volume,
        that of noise with transform values about 1.
    field
        Position in pixels (x, y, z) from the centre to density; zero at first.
    """

    base: Tensor
    unit: Tensor

    def __init__(self, box: int, oversampling: int = 2, *, width: int = 128, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.box = box
        self.oversampling = oversampling
        self.register_buffer("base", torch.zeros(box, box, box))
        self.register_buffer("unit", torch.tensor(box**-1.5))
        generator = torch.Generator().manual_seed(seed)
        self.field = Siren(3, 1, width=width, depth=depth, frequency=_FREQUENCY, generator=generator)

    @classmethod
    def from_map(
        cls,
        data: Float[Tensor, "d d d"],
        oversampling: int = 2,
        *,
        width: int = 128,
        depth: int = 2,
        seed: int = 0,
        unit: float | None = None,
    ) -> "NeuralVolume":
        """A volume that starts as a copy of ``data``, in its type and on its device; ``unit`` is the spread of ``data`` if None."""
        volume = cls(data.shape[-1], oversampling, width=width, depth=depth, seed=seed).to(data)
        volume.base.copy_(data.detach())
        spread = data.detach().std() if unit is None else volume.unit.new_tensor(unit)
        volume.unit.copy_(spread.clamp_min(torch.finfo(data.dtype).tiny))
        return volume

    def density(self, mask: Float[Tensor, "d d d"] | None = None) -> Float[Tensor, "d d d"]:
        """The map inside ``mask`` (0 to 1; the sphere in the box if None), zero outside; differentiable in the field."""
        inside = (soft_sphere(self.box, self.box / 2, 0.0) if mask is None else mask).to(self.base)
        where = torch.nonzero(inside)
        position = (where.flip(1) - self.box // 2).to(self.base)
        values = self.unit * self.field(position)[:, 0]
        return inside * self.base.index_put(tuple(where.T), values, accumulate=True)

    def forward(self, rotations: Float[Tensor, "b 3 3"], disk: FourierDisk) -> Complex[Tensor, "b p"]:
        """Central slices ``v^(R^T (kx, ky, 0))`` at the pixels of ``disk``, which must be of the same box."""
        return slice_grid(slicing_grid(self.density(), disk.radius, self.oversampling), rotations, disk)

    def approach(self, target: Float[Tensor, "d d d"], mask: Float[Tensor, "d d d"], steps: int) -> None:
        """Move the field by ``steps`` gradient steps (Adam) towards ``target`` inside ``mask``; the same start, the same end."""
        optimiser = torch.optim.Adam(self.field.parameters(), lr=_RATE, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda done: min(1.0, (done + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done / steps))
        )
        target = mask * target
        for _ in range(steps):
            loss = (self.density(mask) - target).square().sum() / self.unit.square()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
