"""Numba kernels that read slices from a grid and add them to one, in the order of ``cpu_walk``; any float precision.

Grids and slices come as arrays of floats with real and imaginary part in the last axis. Positions handed to the
``_run`` functions point at the lowest of the three points read along each axis (see ``cpu_spline``).
"""

from typing import no_type_check

import numpy as np
from numba import njit, prange

from cryorbit.physics.kernels.cpu_spline import over_x, over_y, over_z, slopes, weights
from cryorbit.physics.kernels.cpu_walk import windows


@njit(cache=True, nogil=True)
@no_type_check
def _read_run(flat, sy, sz, out, at, s, ax, x, ay, y, az, z, k0, k1):
    """Interpolate pixels k0 .. k1 - 1 of a row into ``out[at + k]``; s = -1 conjugates."""
    kind = flat.dtype.type
    for k in range(k0, k1):
        px, py, pz = ax * kind(k) + x, ay * kind(k) + y, az * kind(k) + z
        i, j, h = np.int64(px), np.int64(py), np.int64(pz)
        wx, wy, wz = weights(px - kind(i)), weights(py - kind(j)), weights(pz - kind(h))
        o = h * sz + j * sy + 2 * i
        low, mid, top = over_y(flat, o, sy, wy), over_y(flat, o + sz, sy, wy), over_y(flat, o + 2 * sz, sy, wy)
        re, im = over_x(wx, over_z(wz, low, mid, top))
        out[at + k, 0] = re
        out[at + k, 1] = s * im


@njit(cache=True, nogil=True)
@no_type_check
def _add_run(values, weigh, weighted, num, den, sy, sz, lo, hi, at, s, ax, x, ay, y, az, z, k0, k1):
    """Add pixels k0 .. k1 - 1 of a row to the planes lo .. hi - 1 of the grid."""
    kind = num.dtype.type
    for k in range(k0, k1):
        px, py, pz = ax * kind(k) + x, ay * kind(k) + y, az * kind(k) + z
        i, j, h = np.int64(px), np.int64(py), np.int64(pz)
        w0, w1, w2 = weights(px - kind(i))
        wy, wz = weights(py - kind(j)), weights(pz - kind(h))
        re, im = values[at + k, 0], s * values[at + k, 1]
        a0, b0, a1, b1, a2, b2 = w0 * re, w0 * im, w1 * re, w1 * im, w2 * re, w2 * im
        v = weigh[at + k] if weighted else kind(0)
        v0, v1, v2 = w0 * v, w1 * v, w2 * v
        for n in range(max(0, lo - h), min(3, hi - h)):
            for m in range(3):
                w = wz[n] * wy[m]
                o = np.uintp((h + n) * sz + (j + m) * sy + 2 * i)
                num[o] += w * a0
                num[o + np.uintp(1)] += w * b0
                num[o + np.uintp(2)] += w * a1
                num[o + np.uintp(3)] += w * b1
                num[o + np.uintp(4)] += w * a2
                num[o + np.uintp(5)] += w * b2
                if weighted:
                    o //= np.uintp(2)
                    den[o] += w * v0
                    den[o + np.uintp(1)] += w * v1
                    den[o + np.uintp(2)] += w * v2


@njit(cache=True, nogil=True)
@no_type_check
def _slope_run(flat, sy, sz, gradient, out, ky, at, s, ax, x, ay, y, az, z, k0, k1):
    """Add to ``out`` (2, 3) the sums of kx and ky times Re conj(gradient) d slice / d q over pixels k0 .. k1 - 1."""
    kind = flat.dtype.type
    sum_x = sum_y = sum_z = 0.0
    kx_x = kx_y = kx_z = 0.0
    for k in range(k0, k1):
        px, py, pz = ax * kind(k) + x, ay * kind(k) + y, az * kind(k) + z
        i, j, h = np.int64(px), np.int64(py), np.int64(pz)
        fx, fy, fz = px - kind(i), py - kind(j), pz - kind(h)
        wx, wy, wz, ty = weights(fx), weights(fy), weights(fz), slopes(fy)
        gr, gi = gradient[at + k, 0], s * gradient[at + k, 1]
        o = h * sz + j * sy + 2 * i
        low, mid, top = over_y(flat, o, sy, wy), over_y(flat, o + sz, sy, wy), over_y(flat, o + 2 * sz, sy, wy)
        re, im = over_x(slopes(fx), over_z(wz, low, mid, top))
        dx = gr * re + gi * im
        re, im = over_x(wx, over_z(slopes(fz), low, mid, top))
        dz = gr * re + gi * im
        low, mid, top = over_y(flat, o, sy, ty), over_y(flat, o + sz, sy, ty), over_y(flat, o + 2 * sz, sy, ty)
        re, im = over_x(wx, over_z(wz, low, mid, top))
        dy = gr * re + gi * im
        sum_x += dx
        sum_y += dy
        sum_z += dz
        kx_x += kind(k) * dx
        kx_y += kind(k) * dy
        kx_z += kind(k) * dz
    out[0, 0] += s * kx_x
    out[0, 1] += s * kx_y
    out[0, 2] += s * kx_z
    out[1, 0] += s * ky * sum_x
    out[1, 1] += s * ky * sum_y
    out[1, 2] += s * ky * sum_z


@njit(cache=True, nogil=True, parallel=True)
@no_type_check
def read(data, rotations, rows, edges, scale, chunks, out):
    """Slices of ``data`` (Z, Y, X, 2) into ``out`` (B, P, 2); ``scale`` is the oversampling."""
    slabs, images = len(edges) - 1, len(rotations)
    kind = data.dtype.type
    low = kind(data.shape[0] // 2) - kind(0.5)
    near, one = kind(0.5), kind(1)
    sy, sz = 2 * data.shape[2], 2 * data.shape[1] * data.shape[2]
    flat = data.reshape(-1)
    for task in prange(slabs * chunks):
        slab, chunk = task // chunks, task % chunks
        lo, hi = kind(edges[slab]), kind(edges[slab + 1])
        for b in range(images * chunk // chunks, images * (chunk + 1) // chunks):
            a, d = scale * rotations[b, 0], scale * rotations[b, 1]
            for r in range(len(rows)):
                ky, k0, k1 = kind(rows[r, 3]), rows[r, 1], rows[r, 2]
                x, y, z, at = d[0] * ky, d[1] * ky, d[2] * ky, rows[r, 0] - k0
                p0, p1, m0, m1 = windows(a[0], x, a[2], z, low, k0, k1, lo, hi)
                _read_run(flat, sy, sz, out[b], at, one, a[0], x + near, a[1], y + low, a[2], z + low, p0, p1)
                _read_run(flat, sy, sz, out[b], at, -one, -a[0], near - x, -a[1], low - y, -a[2], low - z, m0, m1)


@njit(cache=True, nogil=True, parallel=True)
@no_type_check
def add(values, weigh, weighted, rotations, rows, edges, scale, num, den):
    """Adjoint of ``read``: ``values`` (B, P, 2) into ``num``; if ``weighted``, ``weigh`` (B, P) into ``den``."""
    kind = num.dtype.type
    low = kind(num.shape[0] // 2) - kind(0.5)
    near, one = kind(0.5), kind(1)
    sy, sz = 2 * num.shape[2], 2 * num.shape[1] * num.shape[2]
    into, beside = num.reshape(-1), den.reshape(-1)
    for slab in prange(len(edges) - 1):
        first, past = edges[slab], edges[slab + 1]
        lo, hi = kind(first - 2), kind(past)
        for b in range(len(rotations)):
            a, d = scale * rotations[b, 0], scale * rotations[b, 1]
            v, w = values[b], weigh[b if weighted else 0]
            for r in range(len(rows)):
                ky, k0, k1 = kind(rows[r, 3]), rows[r, 1], rows[r, 2]
                x, y, z, at = d[0] * ky, d[1] * ky, d[2] * ky, rows[r, 0] - k0
                p0, p1, m0, m1 = windows(a[0], x, a[2], z, low, k0, k1, lo, hi)
                for sign, i, j in ((one, p0, p1), (-one, m0, m1)):
                    _add_run(
                        v,
                        w,
                        weighted,
                        into,
                        beside,
                        sy,
                        sz,
                        first,
                        past,
                        at,
                        sign,
                        sign * a[0],
                        sign * x + near,
                        sign * a[1],
                        sign * y + low,
                        sign * a[2],
                        sign * z + low,
                        i,
                        j,
                    )


@njit(cache=True, nogil=True, parallel=True)
@no_type_check
def slope(gradient, data, rotations, rows, edges, scale, chunks, out):
    """Gradient in the first two rows of each rotation, a float64 share for each slab, into ``out`` (slabs, B, 2, 3)."""
    slabs, images = len(edges) - 1, len(rotations)
    kind = data.dtype.type
    low = kind(data.shape[0] // 2) - kind(0.5)
    near, one = kind(0.5), kind(1)
    sy, sz = 2 * data.shape[2], 2 * data.shape[1] * data.shape[2]
    flat = data.reshape(-1)
    for task in prange(slabs * chunks):
        slab, chunk = task // chunks, task % chunks
        lo, hi = kind(edges[slab]), kind(edges[slab + 1])
        for b in range(images * chunk // chunks, images * (chunk + 1) // chunks):
            a, d = scale * rotations[b, 0], scale * rotations[b, 1]
            for r in range(len(rows)):
                ky, k0, k1 = kind(rows[r, 3]), rows[r, 1], rows[r, 2]
                x, y, z, at = d[0] * ky, d[1] * ky, d[2] * ky, rows[r, 0] - k0
                p0, p1, m0, m1 = windows(a[0], x, a[2], z, low, k0, k1, lo, hi)
                to, g = out[slab, b], gradient[b]
                _slope_run(flat, sy, sz, g, to, ky, at, one, a[0], x + near, a[1], y + low, a[2], z + low, p0, p1)
                _slope_run(flat, sy, sz, g, to, ky, at, -one, -a[0], near - x, -a[1], low - y, -a[2], low - z, m0, m1)
