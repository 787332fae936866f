"""An image seen at unknown in-plane angles (papers/004 section 3): the 2-D alignment problem."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from cryorbit.groups.so2 import SO2


def rotate_images(images: Float[Tensor, "b d d"], angle: Float[Tensor, " b"]) -> Float[Tensor, "b d d"]:
    """Turn each image by its angle about the centre pixel ``D // 2``: ``(g . v)(x) = v(g^T x)``.

    Cubic interpolation (exact at multiples of 90 degrees), zero outside the image; differentiable in both arguments.

    Parameters
    ----------
    images
        (B, D, D) images in yx order.
    angle
        (B,) angles in radian; positive turns x towards y.
    """
    d = images.shape[-1]
    axis = torch.arange(d, dtype=images.dtype, device=images.device) - d // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    target = torch.stack([x, y], dim=-1).reshape(1, d * d, 2)
    source = target @ SO2().matrix(angle.to(images.dtype))  # row vectors: x^T g = (g^T x)^T
    normalised = (source + d // 2) * (2 / (d - 1)) - 1
    sampled = grid_sample(
        images[:, None], normalised.reshape(-1, d, d, 2), mode="bicubic", padding_mode="zeros", align_corners=True
    )
    return sampled[:, 0]


@dataclass(frozen=True)
class Planar:
    """Orbit model of in-plane rotations of one image, measured whole.

    Attributes
    ----------
    group
        SO(2).
    """

    group: SO2 = SO2()  # noqa: RUF009 (it has no state)

    def observe(self, signal: Float[Tensor, "d d"], g: Float[Tensor, " b"]) -> Float[Tensor, "b p"]:
        """Turned copies of the image ``signal``, one per row, flattened in yx order."""
        return rotate_images(signal.expand(len(g), -1, -1), g).flatten(1)
