"""A map on voxels: the volume every reconstruction can fall back on (papers/002 section 4)."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import slice_grid, slicing_grid


class VoxelVolume(nn.Module):
    """Real-space voxels with differentiable central slices.

    Parameters
    ----------
    box
        Side length D in pixels.
    oversampling
        Zero padding before the transform; 2 keeps the interpolation error near 1 %.

    Attributes
    ----------
    data
        (D, D, D) parameter in zyx order, zero at first.
    """

    def __init__(self, box: int, oversampling: int = 2) -> None:
        super().__init__()
        self.box = box
        self.oversampling = oversampling
        self.data = nn.Parameter(torch.zeros(box, box, box))

    @classmethod
    def from_map(cls, data: Float[Tensor, "d d d"], oversampling: int = 2) -> "VoxelVolume":
        """A volume that starts from a copy of ``data``, in its type and on its device."""
        volume = cls(data.shape[-1], oversampling)
        volume.data = nn.Parameter(data.detach().clone())
        return volume

    def density(self, mask: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """The map inside ``mask`` (0 to 1), zero outside."""
        return self.data * mask

    def forward(self, rotations: Float[Tensor, "b 3 3"], disk: FourierDisk) -> Complex[Tensor, "b p"]:
        """Central slices ``v^(R^T (kx, ky, 0))`` at the pixels of ``disk``, which must be of the same box."""
        return slice_grid(slicing_grid(self.data, disk.radius, self.oversampling), rotations, disk)
