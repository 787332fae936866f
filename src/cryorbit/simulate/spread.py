"""Non-uniform Fourier sums by spreading points on a finer periodic grid (the NUFFT of type 1), in two and three
dimensions.

Each point is spread with the "exponential of semicircle" kernel of Barnett, Magland and af Klinteberg (SIAM J. Sci.
Comput. 41, 2019, C479), ``phi(z) = exp(beta (sqrt(1 - z^2) - 1))`` over ``WIDTH`` grid points; the transform of the
grid, divided by the kernel's, is the sum.
"""

import math
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, prange
from scipy.fft import next_fast_len
from torch import Tensor

OVERSAMPLING = 1.5
WIDTH = 7
_BETA = 0.97 * math.pi * WIDTH * (1 - 0.5 / OVERSAMPLING)


def fine_side(box: int) -> int:
    """Side of the even, quickly transformed grid used for frequencies below ``box / 2``."""
    side = 2 * next_fast_len(math.ceil(OVERSAMPLING * box / 2), real=True)
    return max(side, 2 * WIDTH + 2)


def kernel_transform(frequencies: Int[Tensor, "*b"], side: int) -> Float[Tensor, "*b"]:
    """One-dimensional transform of the spreading kernel at integer frequencies of a grid of ``side`` points."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(64))
    kernel = torch.exp(_BETA * (torch.sqrt(1 - nodes**2) - 1)) * weights * (WIDTH / 2)
    angle = (math.pi * WIDTH / side) * frequencies.to(torch.float64)[..., None] * nodes
    return (torch.cos(angle) * kernel).sum(-1)


@njit(inline="always")
@no_type_check
def _taps(x, side, index, value):
    first = math.ceil(x - 0.5 * WIDTH)
    for t in range(WIDTH):
        z = (first + t - x) * (2.0 / WIDTH)
        value[t] = math.exp(_BETA * (math.sqrt(max(0.0, 1.0 - z * z)) - 1.0))
        index[t] = (first + t) % side


@njit(parallel=True, cache=True, fastmath=True, nogil=True)
@no_type_check
def spread_images(rotations, positions, coefficients, out):
    """Add to ``out`` (B, C, M, M) float32 the points ``(R r)[:2]`` of B rotations, with C float32 coefficients for
    each point.

    ``positions`` (A, 3) are xyz in grid points from the centre ``M // 2``; the grid is periodic. ``out`` is changed
    in place.
    """
    side = out.shape[-1]
    channels = coefficients.shape[1]
    for b in prange(rotations.shape[0]):
        ix, iy = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64)
        vx, vy = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
        r = rotations[b]
        for a in range(positions.shape[0]):
            p = positions[a]
            _taps(r[0, 0] * p[0] + r[0, 1] * p[1] + r[0, 2] * p[2] + side // 2, side, ix, vx)
            _taps(r[1, 0] * p[0] + r[1, 1] * p[1] + r[1, 2] * p[2] + side // 2, side, iy, vy)
            for c in range(channels):
                for j in range(WIDTH):
                    line = out[b, c, iy[j]]
                    v = vy[j] * coefficients[a, c]
                    for i in range(WIDTH):
                        line[ix[i]] += v * vx[i]


@njit(cache=True, fastmath=True, nogil=True)
@no_type_check
def spread_volume(positions, coefficients, out):
    """Add points with one coefficient each to ``out`` (M, M, M) float32; ``positions`` as in :func:`spread_images`."""
    side = out.shape[-1]
    ix, iy, iz = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64)
    vx, vy, vz = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for a in range(positions.shape[0]):
        _taps(positions[a, 0] + side // 2, side, ix, vx)
        _taps(positions[a, 1] + side // 2, side, iy, vy)
        _taps(positions[a, 2] + side // 2, side, iz, vz)
        for k in range(WIDTH):
            for j in range(WIDTH):
                v = vz[k] * vy[j] * coefficients[a]
                for i in range(WIDTH):
                    out[iz[k], iy[j], ix[i]] += v * vx[i]
