"""How the CPU kernels walk a grid: row by row of a slice, slab by slab of the grid.

A slab is a range of z planes small enough for a cache. Along one row of Fourier pixels the grid coordinate is
linear, so the pixels of a row that fall into a slab are one or two intervals, found by arithmetic. Every image is
walked for every slab; each slab belongs to one thread. That keeps reads in cache, and makes insertion free of races and
its sums independent of the number of threads.
"""

from typing import no_type_check

import numpy as np
from numba import njit
from numpy.typing import NDArray

# More slabs fit a nearer cache, but each costs another walk along all rows (measured: 2 MiB is slower).
SLAB_BYTES = 6 << 20
MIN_PLANES = 4


def rows_of(kx: NDArray[np.int64], ky: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows, 4) runs of neighbouring pixels: position of the first, its kx, kx past the last, ky."""
    if len(kx) == 0:
        return np.zeros((0, 4), np.int64)
    cuts = np.flatnonzero((np.diff(ky) != 0) | (np.diff(kx) != 1)) + 1
    first = np.concatenate([[0], cuts])
    last = np.concatenate([cuts, [len(kx)]])
    return np.stack([first, kx[first], kx[first] + last - first, ky[first]], axis=1).astype(np.int64)


def slab_edges(shape: tuple[int, int, int], item_bytes: int, least: int = 1) -> NDArray[np.int64]:
    """(slabs + 1,) first planes of at least ``least`` slabs, of equal load: uniform slices put ``R - |z|`` pixels on plane z."""
    planes = shape[0]
    wanted = max(least, -(-shape[0] * shape[1] * shape[2] * item_bytes // SLAB_BYTES))
    count = max(1, min(wanted, planes // MIN_PLANES))
    load = np.linspace(-1.0, 1.0, count + 1)
    half = planes / 2
    edges = np.round(half + half * np.sign(load) * (1 - np.sqrt(1 - np.abs(load)))).astype(np.int64)
    return np.unique(edges)


@njit(cache=True, nogil=True)
@no_type_check
def span(a, b, k0, k1, lo, hi):
    """The k in [k0, k1) with ``lo <= a k + b < hi``, as [i, j). Exact: an estimate, corrected by comparing."""
    if a == 0:
        if lo <= b < hi:
            return k0, k1
        return k0, k0
    e, f = (lo - b) / a, (hi - b) / a
    if a < 0:
        e, f = f, e
    i = k0 if not e > k0 else (k1 if e >= k1 else np.int64(e))
    j = k0 if not f > k0 else (k1 if f >= k1 else np.int64(f))
    kind = type(a)
    if a > 0:
        while i > k0 and a * kind(i - 1) + b >= lo:
            i -= 1
        while i < k1 and a * kind(i) + b < lo:
            i += 1
        while j > i and a * kind(j - 1) + b >= hi:
            j -= 1
        while j < k1 and a * kind(j) + b < hi:
            j += 1
    else:
        while i > k0 and a * kind(i - 1) + b < hi:
            i -= 1
        while i < k1 and a * kind(i) + b >= hi:
            i += 1
        while j > i and a * kind(j - 1) + b < lo:
            j -= 1
        while j < k1 and a * kind(j) + b >= lo:
            j += 1
    return i, max(i, j)


@njit(cache=True, nogil=True)
@no_type_check
def windows(ax, x0, az, z0, low, k0, k1, lo, hi):
    """Pixels of a row in the slab ``lo <= z < hi``: [p0, p1) read as they are, [m0, m1) read at their Friedel mate (``x
    < 0``).

    Grid coordinates along the row are ``x = ax k + x0``, ``z = az k + (z0 + low)``, and for the mates ``z = -az k +
    (low - z0)``; with ``low = c - 1/2`` the integer part of z is the lowest of the three planes read.
    """
    kind = type(ax)
    up, down = z0 + low, low - z0
    e, f = az * kind(k0), az * kind(k1 - 1)
    low, high = min(e, f), max(e, f)
    plain = high + up >= lo and low + up < hi
    mated = down - low >= lo and down - high < hi
    if not (plain or mated):
        return k0, k0, k0, k0
    i, j = span(ax, x0, k0, k1, kind(0), kind(np.inf))
    m0, m1 = (k0, i) if i > k0 else (j, k1)
    p0, p1 = span(az, up, i, j, lo, hi) if plain else (i, i)
    m0, m1 = span(-az, down, m0, m1, lo, hi) if mated else (m0, m0)
    return p0, p1, m0, m1
