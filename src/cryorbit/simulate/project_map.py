"""Projections of a map by central slices: faster than per atom, with the slices' interpolation error."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk, fourier_disk
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.types import Volume

_LARGE_BOX = 192


class MapProjector:
    """Images of a map; same interface as :class:`cryorbit.simulate.project_atoms.AtomProjector`.

    Parameters
    ----------
    volume
        The map. Frequencies at and past Nyquist are left out of the images.
    oversampling
        Zero padding before the transform; by default 3, and 2 for boxes over 192 px, whose padded transform would not
        fit small machines.
    """

    def __init__(self, volume: Volume, oversampling: int | None = None) -> None:
        self.box = volume.box
        self.pixel_size = volume.pixel_size
        self.disk: FourierDisk = fourier_disk(volume.box)
        self._data = volume.data.to(torch.float32)
        factor = oversampling or (3 if volume.box <= _LARGE_BOX else 2)
        self._grid = slicing_grid(self._data, self.disk.radius, factor)

    def __call__(self, rotations: Float[Tensor, "b 3 3"]) -> Complex[Tensor, "b p"]:
        """Centred, unnormalised transforms of the projections on ``disk``, complex64."""
        return slice_grid(self._grid, rotations, self.disk)

    def volume(self) -> Float[Tensor, "d d d"]:
        """The map itself, float32, zyx."""
        return self._data
