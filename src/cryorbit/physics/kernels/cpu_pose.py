"""Numba kernel of the Gauss-Newton sums for particle poses: one pass over an image's Fourier pixels, float64 sums.

With ``v`` the slice, ``g = R grad v`` its slope in the image frame and ``e = -2 pi i v / D``, a small rotation omega
and shift s change the prediction by ``(-ky g_z, kx g_z, t, kx e, ky e)`` times CTF and phase, ``t = ky g_x - kx g_y``;
the image is brought to the model's phase instead of the model to the image's.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit, prange

from cryorbit.physics.kernels.cpu_spline import over_x, over_y, over_z, slopes, weights

_SUMS = {"reassoc", "nsz", "contract"}


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def normal_equations(data, images, ctf, precision, rotations, shifts, rows, scale, step, loss, gradient, hessian):
    """Fill ``loss`` (B,), ``gradient`` (B, 5), ``hessian`` (B, 5, 5); ``step`` is 2 pi / D; ``precision`` (B, P)."""
    kind = data.dtype.type
    one = kind(1)
    near, low = kind(0.5), kind(data.shape[0] // 2) - kind(0.5)
    sy, sz = 2 * data.shape[2], 2 * data.shape[1] * data.shape[2]
    flat = data.reshape(-1)
    slope_step = kind(step)
    for b in prange(len(rotations)):
        a, d = scale * rotations[b, 0], scale * rotations[b, 1]
        rot = scale * rotations[b]
        total = 0.0
        g0 = g1 = g2 = g3 = g4 = 0.0
        h00 = h01 = h11 = h02 = h12 = h22 = h03 = h04 = h13 = h14 = h23 = h24 = h33 = h34 = h44 = 0.0
        for r in range(len(rows)):
            fy = kind(rows[r, 3])
            at = rows[r, 0] - rows[r, 1]
            x0, y0, z0 = d[0] * fy, d[1] * fy, d[2] * fy
            start = step * (rows[r, 1] * shifts[b, 0] + rows[r, 3] * shifts[b, 1])
            turn = step * shifts[b, 0]
            pr, pi = math.cos(start), math.sin(start)
            tr, ti = math.cos(turn), math.sin(turn)
            for k in range(rows[r, 1], rows[r, 2]):
                fx = kind(k)
                x, y, z = a[0] * fx + x0, a[1] * fx + y0, a[2] * fx + z0
                s = -one if x < 0 else one
                x, y, z = s * x + near, s * y + low, s * z + low
                i, j, h = np.int64(x), np.int64(y), np.int64(z)
                tx, ty, tz = x - kind(i), y - kind(j), z - kind(h)
                wx, wy, wz, dy = weights(tx), weights(ty), weights(tz), slopes(ty)
                o = h * sz + j * sy + 2 * i
                p0, p1, p2 = over_y(flat, o, sy, wy), over_y(flat, o + sz, sy, wy), over_y(flat, o + 2 * sz, sy, wy)
                q0, q1, q2 = over_y(flat, o, sy, dy), over_y(flat, o + sz, sy, dy), over_y(flat, o + 2 * sz, sy, dy)
                line = over_z(wz, p0, p1, p2)
                vr, vi = over_x(wx, line)
                vi *= s
                # slope in the grid frame; a mate's slope is minus the conjugate
                qxr, qxi = over_x(slopes(tx), line)
                qyr, qyi = over_x(wx, over_z(wz, q0, q1, q2))
                qzr, qzi = over_x(wx, over_z(slopes(tz), p0, p1, p2))
                qxr, qyr, qzr = s * qxr, s * qyr, s * qzr
                gzr, gzi = (
                    rot[2, 0] * qxr + rot[2, 1] * qyr + rot[2, 2] * qzr,
                    rot[2, 0] * qxi + rot[2, 1] * qyi + rot[2, 2] * qzi,
                )
                jx, jy, jz = (
                    fy * rot[0, 0] - fx * rot[1, 0],
                    fy * rot[0, 1] - fx * rot[1, 1],
                    fy * rot[0, 2] - fx * rot[1, 2],
                )
                sr, si = jx * qxr + jy * qyr + jz * qzr, jx * qxi + jy * qyi + jz * qzi
                er, ei = slope_step * vi, -slope_step * vr
                # residual, at the model's phase
                f = ctf[b, at + k]
                ir, ii = images[b, at + k, 0], images[b, at + k, 1]
                rr, ri = ir * kind(pr) - ii * kind(pi) - f * vr, ir * kind(pi) + ii * kind(pr) - f * vi
                pr, pi = pr * tr - pi * ti, pr * ti + pi * tr
                w = precision[b, at + k]
                total += w * (rr * rr + ri * ri)
                w *= f
                n = w * (rr * gzr + ri * gzi)
                g0 += fy * n
                g1 -= fx * n
                g2 -= w * (rr * sr + ri * si)
                n = w * (rr * er + ri * ei)
                g3 -= fx * n
                g4 -= fy * n
                w *= f
                xx, xy, yy = fx * fx, fx * fy, fy * fy
                n = w * (gzr * gzr + gzi * gzi)
                h00 += yy * n
                h01 -= xy * n
                h11 += xx * n
                n = w * (gzr * sr + gzi * si)
                h02 -= fy * n
                h12 += fx * n
                h22 += w * (sr * sr + si * si)
                n = w * (gzr * er + gzi * ei)
                h03 -= xy * n
                h04 -= yy * n
                h13 += xx * n
                h14 += xy * n
                n = w * (sr * er + si * ei)
                h23 += fx * n
                h24 += fy * n
                n = w * (er * er + ei * ei)
                h33 += xx * n
                h34 += xy * n
                h44 += yy * n
        loss[b] = 0.5 * total
        gradient[b] = (g0, g1, g2, g3, g4)
        hessian[b, 0] = (h00, h01, h02, h03, h04)
        hessian[b, 1] = (h01, h11, h12, h13, h14)
        hessian[b, 2] = (h02, h12, h22, h23, h24)
        hessian[b, 3] = (h03, h13, h23, h33, h34)
        hessian[b, 4] = (h04, h14, h24, h34, h44)


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def losses(data, images, ctf, precision, rotations, shifts, rows, scale, step, loss):
    """Fill ``loss`` (B, K) for ``rotations`` (B, K, 3, 3) and ``shifts`` (B, K, 2)."""
    kind = data.dtype.type
    one = kind(1)
    near, low = kind(0.5), kind(data.shape[0] // 2) - kind(0.5)
    sy, sz = 2 * data.shape[2], 2 * data.shape[1] * data.shape[2]
    flat = data.reshape(-1)
    poses = rotations.shape[1]
    for n in prange(len(rotations) * poses):
        b, m = n // poses, n % poses
        a, d = scale * rotations[b, m, 0], scale * rotations[b, m, 1]
        total = 0.0
        for r in range(len(rows)):
            fy = kind(rows[r, 3])
            at = rows[r, 0] - rows[r, 1]
            x0, y0, z0 = d[0] * fy, d[1] * fy, d[2] * fy
            start = step * (rows[r, 1] * shifts[b, m, 0] + rows[r, 3] * shifts[b, m, 1])
            turn = step * shifts[b, m, 0]
            pr, pi = math.cos(start), math.sin(start)
            tr, ti = math.cos(turn), math.sin(turn)
            for k in range(rows[r, 1], rows[r, 2]):
                fx = kind(k)
                x, y, z = a[0] * fx + x0, a[1] * fx + y0, a[2] * fx + z0
                s = -one if x < 0 else one
                x, y, z = s * x + near, s * y + low, s * z + low
                i, j, h = np.int64(x), np.int64(y), np.int64(z)
                wy = weights(y - kind(j))
                o = h * sz + j * sy + 2 * i
                p0, p1, p2 = over_y(flat, o, sy, wy), over_y(flat, o + sz, sy, wy), over_y(flat, o + 2 * sz, sy, wy)
                vr, vi = over_x(weights(x - kind(i)), over_z(weights(z - kind(h)), p0, p1, p2))
                vi *= s
                f = ctf[b, at + k]
                ir, ii = images[b, at + k, 0], images[b, at + k, 1]
                rr, ri = ir * kind(pr) - ii * kind(pi) - f * vr, ir * kind(pi) + ii * kind(pr) - f * vi
                pr, pi = pr * tr - pi * ti, pr * ti + pi * tr
                total += precision[b, at + k] * (rr * rr + ri * ri)
        loss[b, m] = 0.5 * total
