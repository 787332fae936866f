"""Real-space projector: rotate by trilinear interpolation, then sum along z (papers/002 eq. 4-8). The slow reference.

It costs ``D^3`` reads for each image, where :mod:`cryorbit.physics.slicing` needs ``D^2``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError


def rotate_volume(volume: Float[Tensor, "d d d"], rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "d d d"]:
    """The map turned about its centre voxel, ``(R.v)(x) = v(R^T x)`` (papers/002 eq. 4 and 5); zero outside the box.

    Parameters
    ----------
    volume
        (D, D, D) real map, centre at ``D // 2``, D at least 2.
    rotation
        (3, 3) rotation matrix on xyz columns.

    Returns
    -------
    (D, D, D) map, differentiable in both arguments (papers/002 eq. 6 and 7).
    """
    box = volume.shape[-1]
    if box < 2:
        raise DataError("DATA110", f"a map to rotate needs at least 2 voxels along a side, found {box}")
    axis = torch.arange(box, dtype=volume.dtype, device=volume.device) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    source = torch.stack([x, y, z], dim=-1) @ rotation.to(volume.dtype)  # rows times R: R^T x
    unit = 2 * (source + box // 2) / (box - 1) - 1
    return torch.nn.functional.grid_sample(volume[None, None], unit[None], mode="bilinear", align_corners=True)[0, 0]


def project_realspace(volume: Float[Tensor, "d d d"], rotations: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b d d"]:
    """Projections along z of the rotated map (papers/002 eq. 8); differentiable in both arguments.

    Parameters
    ----------
    volume
        (D, D, D) real map. What turns out of the box is lost: keep the molecule inside the inscribed sphere.
    rotations
        (B, 3, 3) rotation matrices.
    """
    if len(rotations) == 0:
        return volume.new_zeros(0, *volume.shape[-2:])
    return torch.stack([rotate_volume(volume, r).sum(dim=0) for r in rotations])
