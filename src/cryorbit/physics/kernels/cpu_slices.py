"""Numba kernels that read slices from a grid and add them to one, in the order of ``cpu_walk``; any float precision."""

from typing import no_type_check

import numpy as np
from numba import njit, prange

from cryorbit.physics.kernels.cpu_walk import windows


@njit(cache=True, nogil=True)
@no_type_check
def _read_run(data, out, at, s, ax, x, ay, y, az, z, k0, k1):
    """Interpolate pixels k0 .. k1 - 1 of a row into ``out[at + k]``; s = -1 conjugates."""
    kind = data.dtype.type
    one = kind(1)
    for k in range(k0, k1):
        px, py, pz = ax * kind(k) + x, ay * kind(k) + y, az * kind(k) + z
        i, j, h = np.int64(px), np.int64(py), np.int64(pz)
        tx, ty, tz = px - kind(i), py - kind(j), pz - kind(h)
        ux, uy, uz = one - tx, one - ty, one - tz
        w = uz * uy
        re = w * (ux * data[h, j, i, 0] + tx * data[h, j, i + 1, 0])
        im = w * (ux * data[h, j, i, 1] + tx * data[h, j, i + 1, 1])
        w = uz * ty
        re += w * (ux * data[h, j + 1, i, 0] + tx * data[h, j + 1, i + 1, 0])
        im += w * (ux * data[h, j + 1, i, 1] + tx * data[h, j + 1, i + 1, 1])
        w = tz * uy
        re += w * (ux * data[h + 1, j, i, 0] + tx * data[h + 1, j, i + 1, 0])
        im += w * (ux * data[h + 1, j, i, 1] + tx * data[h + 1, j, i + 1, 1])
        w = tz * ty
        re += w * (ux * data[h + 1, j + 1, i, 0] + tx * data[h + 1, j + 1, i + 1, 0])
        im += w * (ux * data[h + 1, j + 1, i, 1] + tx * data[h + 1, j + 1, i + 1, 1])
        out[at + k, 0] = re
        out[at + k, 1] = s * im


@njit(cache=True, nogil=True)
@no_type_check
def _add_run(values, weights, weighted, num, den, lo, hi, at, s, ax, x, ay, y, az, z, k0, k1):
    """Add pixels k0 .. k1 - 1 of a row to the planes lo .. hi - 1 of the grid."""
    kind = num.dtype.type
    one = kind(1)
    for k in range(k0, k1):
        px, py, pz = ax * kind(k) + x, ay * kind(k) + y, az * kind(k) + z
        i, j, h = np.int64(px), np.int64(py), np.int64(pz)
        tx, ty, tz = px - kind(i), py - kind(j), pz - kind(h)
        re, im = values[at + k, 0], s * values[at + k, 1]
        for upper in range(2):
            plane = h + upper
            if plane < lo or plane >= hi:
                continue
            wz = tz if upper == 1 else one - tz
            a, b = wz * (one - ty), wz * ty
            a0, a1, b0, b1 = a * (one - tx), a * tx, b * (one - tx), b * tx
            num[plane, j, i, 0] += a0 * re
            num[plane, j, i, 1] += a0 * im
            num[plane, j, i + 1, 0] += a1 * re
            num[plane, j, i + 1, 1] += a1 * im
            num[plane, j + 1, i, 0] += b0 * re
            num[plane, j + 1, i, 1] += b0 * im
            num[plane, j + 1, i + 1, 0] += b1 * re
            num[plane, j + 1, i + 1, 1] += b1 * im
            if weighted:
                v = weights[at + k]
                den[plane, j, i] += a0 * v
                den[plane, j, i + 1] += a1 * v
                den[plane, j + 1, i] += b0 * v
                den[plane, j + 1, i + 1] += b1 * v


@njit(cache=True, nogil=True)
@no_type_check
def _slope_run(data, gradient, out, ky, at, s, ax, x, ay, y, az, z, k0, k1):
    """Add to ``out`` (2, 3) the sums of kx and ky times Re conj(gradient) d slice / d q over pixels k0 .. k1 - 1."""
    kind = data.dtype.type
    one = kind(1)
    sx = sy = sz = 0.0
    kx_x = kx_y = kx_z = 0.0
    for k in range(k0, k1):
        px, py, pz = ax * kind(k) + x, ay * kind(k) + y, az * kind(k) + z
        i, j, h = np.int64(px), np.int64(py), np.int64(pz)
        tx, ty, tz = px - kind(i), py - kind(j), pz - kind(h)
        ux, uy, uz = one - tx, one - ty, one - tz
        gr, gi = gradient[at + k, 0], s * gradient[at + k, 1]
        # the eight corners, each projected on the incoming gradient: everything below is real
        c000 = gr * data[h, j, i, 0] + gi * data[h, j, i, 1]
        c001 = gr * data[h, j, i + 1, 0] + gi * data[h, j, i + 1, 1]
        c010 = gr * data[h, j + 1, i, 0] + gi * data[h, j + 1, i, 1]
        c011 = gr * data[h, j + 1, i + 1, 0] + gi * data[h, j + 1, i + 1, 1]
        c100 = gr * data[h + 1, j, i, 0] + gi * data[h + 1, j, i, 1]
        c101 = gr * data[h + 1, j, i + 1, 0] + gi * data[h + 1, j, i + 1, 1]
        c110 = gr * data[h + 1, j + 1, i, 0] + gi * data[h + 1, j + 1, i, 1]
        c111 = gr * data[h + 1, j + 1, i + 1, 0] + gi * data[h + 1, j + 1, i + 1, 1]
        dx = uz * (uy * (c001 - c000) + ty * (c011 - c010)) + tz * (uy * (c101 - c100) + ty * (c111 - c110))
        low0, low1 = ux * c000 + tx * c001, ux * c010 + tx * c011
        top0, top1 = ux * c100 + tx * c101, ux * c110 + tx * c111
        dy = uz * (low1 - low0) + tz * (top1 - top0)
        dz = uy * (top0 - low0) + ty * (top1 - low1)
        sx += dx
        sy += dy
        sz += dz
        kx_x += kind(k) * dx
        kx_y += kind(k) * dy
        kx_z += kind(k) * dz
    out[0, 0] += s * kx_x
    out[0, 1] += s * kx_y
    out[0, 2] += s * kx_z
    out[1, 0] += s * ky * sx
    out[1, 1] += s * ky * sy
    out[1, 2] += s * ky * sz


@njit(cache=True, nogil=True, parallel=True)
@no_type_check
def read(data, rotations, rows, edges, scale, chunks, out):
    """Slices of ``data`` (Z, Y, X, 2) into ``out`` (B, P, 2); ``scale`` is the oversampling."""
    slabs, images = len(edges) - 1, len(rotations)
    kind = data.dtype.type
    c = kind(data.shape[2] - 1)
    for task in prange(slabs * chunks):
        slab, chunk = task // chunks, task % chunks
        lo, hi = kind(edges[slab]), kind(edges[slab + 1])
        for b in range(images * chunk // chunks, images * (chunk + 1) // chunks):
            a, d = scale * rotations[b, 0], scale * rotations[b, 1]
            for r in range(len(rows)):
                ky, k0, k1 = kind(rows[r, 3]), rows[r, 1], rows[r, 2]
                x, y, z, at = d[0] * ky, d[1] * ky, d[2] * ky, rows[r, 0] - k0
                p0, p1, m0, m1 = windows(a[0], x, a[2], z, c, k0, k1, lo, hi)
                _read_run(data, out[b], at, kind(1), a[0], x, a[1], y + c, a[2], z + c, p0, p1)
                _read_run(data, out[b], at, kind(-1), -a[0], -x, -a[1], c - y, -a[2], c - z, m0, m1)


@njit(cache=True, nogil=True, parallel=True)
@no_type_check
def add(values, weights, weighted, rotations, rows, edges, scale, num, den):
    """Adjoint of ``read``: ``values`` (B, P, 2) into ``num``; if ``weighted``, ``weights`` (B, P) into ``den``."""
    kind = num.dtype.type
    c = kind(num.shape[2] - 1)
    for slab in prange(len(edges) - 1):
        first, past = edges[slab], edges[slab + 1]
        lo, hi = kind(first - 1), kind(past)
        for b in range(len(rotations)):
            a, d = scale * rotations[b, 0], scale * rotations[b, 1]
            w = b if weighted else 0
            for r in range(len(rows)):
                ky, k0, k1 = kind(rows[r, 3]), rows[r, 1], rows[r, 2]
                x, y, z, at = d[0] * ky, d[1] * ky, d[2] * ky, rows[r, 0] - k0
                p0, p1, m0, m1 = windows(a[0], x, a[2], z, c, k0, k1, lo, hi)
                _add_run(
                    values[b],
                    weights[w],
                    weighted,
                    num,
                    den,
                    first,
                    past,
                    at,
                    kind(1),
                    a[0],
                    x,
                    a[1],
                    y + c,
                    a[2],
                    z + c,
                    p0,
                    p1,
                )
                _add_run(
                    values[b],
                    weights[w],
                    weighted,
                    num,
                    den,
                    first,
                    past,
                    at,
                    kind(-1),
                    -a[0],
                    -x,
                    -a[1],
                    c - y,
                    -a[2],
                    c - z,
                    m0,
                    m1,
                )


@njit(cache=True, nogil=True, parallel=True)
@no_type_check
def slope(gradient, data, rotations, rows, edges, scale, chunks, out):
    """Gradient in the first two rows of each rotation, a float64 share for each slab, into ``out`` (slabs, B, 2, 3)."""
    slabs, images = len(edges) - 1, len(rotations)
    kind = data.dtype.type
    c = kind(data.shape[2] - 1)
    for task in prange(slabs * chunks):
        slab, chunk = task // chunks, task % chunks
        lo, hi = kind(edges[slab]), kind(edges[slab + 1])
        for b in range(images * chunk // chunks, images * (chunk + 1) // chunks):
            a, d = scale * rotations[b, 0], scale * rotations[b, 1]
            for r in range(len(rows)):
                ky, k0, k1 = kind(rows[r, 3]), rows[r, 1], rows[r, 2]
                x, y, z, at = d[0] * ky, d[1] * ky, d[2] * ky, rows[r, 0] - k0
                p0, p1, m0, m1 = windows(a[0], x, a[2], z, c, k0, k1, lo, hi)
                to = out[slab, b]
                _slope_run(data, gradient[b], to, ky, at, kind(1), a[0], x, a[1], y + c, a[2], z + c, p0, p1)
                _slope_run(data, gradient[b], to, ky, at, kind(-1), -a[0], -x, -a[1], c - y, -a[2], c - z, m0, m1)
