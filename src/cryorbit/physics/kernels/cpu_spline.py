"""Quadratic B-spline arithmetic shared by the CPU kernels, on the numbers of a grid in one row: (re, im) of x, then y, z.

The three neighbours of a point along x lie next to each other, so sums over z and y work on six numbers at a time and
x comes last. Positions are given from the lowest of the three points read: its index is the integer part, and the
fraction f in [0, 1) is ``t + 1/2``.
"""

from typing import no_type_check

import numpy as np
from numba import njit

_FUSED = {"contract"}


@njit(cache=True, nogil=True)
@no_type_check
def weights(f):
    """Of the three points along an axis."""
    half = type(f)(0.5)
    up = half * f * f
    f = type(f)(1) - f
    down = half * f * f
    return down, type(f)(1) - down - up, up


@njit(cache=True, nogil=True)
@no_type_check
def slopes(f):
    """Derivatives of the weights."""
    one = type(f)(1)
    return f - one, one - f - f, f


@njit(cache=True, nogil=True, fastmath=_FUSED)
@no_type_check
def over_y(flat, at, step, w):
    """Weighted sum of three rows of three complex numbers, as six floats; rows start at ``at``, ``step`` floats apart."""
    a, b, c = np.uintp(at), np.uintp(at + step), np.uintp(at + 2 * step)
    u1, u2, u3, u4, u5 = np.uintp(1), np.uintp(2), np.uintp(3), np.uintp(4), np.uintp(5)
    return (
        w[0] * flat[a] + w[1] * flat[b] + w[2] * flat[c],
        w[0] * flat[a + u1] + w[1] * flat[b + u1] + w[2] * flat[c + u1],
        w[0] * flat[a + u2] + w[1] * flat[b + u2] + w[2] * flat[c + u2],
        w[0] * flat[a + u3] + w[1] * flat[b + u3] + w[2] * flat[c + u3],
        w[0] * flat[a + u4] + w[1] * flat[b + u4] + w[2] * flat[c + u4],
        w[0] * flat[a + u5] + w[1] * flat[b + u5] + w[2] * flat[c + u5],
    )


@njit(cache=True, nogil=True, fastmath=_FUSED)
@no_type_check
def over_z(w, a, b, c):
    """Weighted sum of three times six floats."""
    return (
        w[0] * a[0] + w[1] * b[0] + w[2] * c[0],
        w[0] * a[1] + w[1] * b[1] + w[2] * c[1],
        w[0] * a[2] + w[1] * b[2] + w[2] * c[2],
        w[0] * a[3] + w[1] * b[3] + w[2] * c[3],
        w[0] * a[4] + w[1] * b[4] + w[2] * c[4],
        w[0] * a[5] + w[1] * b[5] + w[2] * c[5],
    )


@njit(cache=True, nogil=True, fastmath=_FUSED)
@no_type_check
def over_x(w, a):
    """Weighted sum of three complex numbers: real and imaginary part."""
    return w[0] * a[0] + w[1] * a[2] + w[2] * a[4], w[0] * a[1] + w[1] * a[3] + w[2] * a[5]
