"""Which digits of the test could be meant the other way up, whatever method is asked."""

import math

import torch
from torch import Tensor

from cryorbit.physics.planar import rotate_images

_UPRIGHT = torch.linspace(-math.pi / 8, math.pi / 8, 9)  # people's hands differ by that much
_OVER = math.pi + _UPRIGHT


def ambiguous(pictures: Tensor, written: Tensor) -> Tensor:
    """True for a picture (N, D, D) that, turned over, looks more like one of those ``written`` (M, D, D) than as it is.

    By the least squared distance from any of them, over nine turns of at most 22.5 degrees from half a turn, and from none.
    """
    return _nearest(pictures, written, _OVER) < _nearest(pictures, written, _UPRIGHT)


def _nearest(pictures: Tensor, written: Tensor, turns: Tensor) -> Tensor:
    flat = written.flatten(1)
    norms, found = flat.square().sum(dim=1), torch.full((len(pictures),), torch.inf)
    for turn in turns:
        for rows in torch.arange(len(pictures)).split(500):
            turned = rotate_images(pictures[rows], turn.expand(len(rows))).flatten(1)
            apart = turned.square().sum(dim=1)[:, None] + norms - 2 * turned @ flat.T
            found[rows] = torch.minimum(found[rows], apart.amin(dim=1))
    return found
