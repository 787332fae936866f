"""Means of triple products of angular orders, and their gradient, on a CPU (``physics/triples.py``).

Real and imaginary parts lie apart and a few hundred columns at a time are worked on, so that loops over columns are wide and stay in cache.
"""

from typing import no_type_check

import numpy as np
from numba import njit, prange

_WIDE = 128
_SUMS = {"reassoc", "nsz", "contract"}


@njit(cache=True, nogil=True, fastmath=_SUMS, parallel=True)
@no_type_check
def mean_triples(re, im, share, orders, out):
    """``out[j, p] = sum_n share_n y_a y_b y_(a+b)*`` of y (M + 1, J, N) float32, for a <= b <= orders, a + b <= M; ``out`` complex128."""
    last, count, columns = re.shape[0] - 1, re.shape[1], re.shape[2]
    for j in prange(count):
        wr, wi = np.empty(_WIDE, np.float32), np.empty(_WIDE, np.float32)
        for start in range(0, columns, _WIDE):
            wide = min(_WIDE, columns - start)
            here, p = slice(start, start + wide), 0
            s = share[here]
            for a in range(min(orders, last // 2) + 1):
                ar, ai = re[a, j, here], im[a, j, here]
                for n in range(wide):
                    wr[n], wi[n] = s[n] * ar[n], s[n] * ai[n]
                for b in range(a, min(orders, last - a) + 1):
                    br, bi, cr, ci = re[b, j, here], im[b, j, here], re[a + b, j, here], im[a + b, j, here]
                    real, imag = np.float32(0), np.float32(0)
                    for n in range(wide):
                        pr, pi = wr[n] * br[n] - wi[n] * bi[n], wr[n] * bi[n] + wi[n] * br[n]
                        real += pr * cr[n] + pi * ci[n]
                        imag += pi * cr[n] - pr * ci[n]
                    out[j, p] += complex(real, imag)
                    p += 1


@njit(cache=True, nogil=True, fastmath=_SUMS, parallel=True)
@no_type_check
def mean_triples_back(re, im, share, orders, grad, out_re, out_im, of_share):
    """Add the gradient of y to ``out_re``, ``out_im`` (M + 1, J, N) and, filter by filter, that of the shares to ``of_share`` (J, N).

    ``grad`` (J, P) complex64 is that of :func:`mean_triples`, derivatives by the real part plus i times those by the imaginary part.
    """
    last, count, columns = re.shape[0] - 1, re.shape[1], re.shape[2]
    for j in prange(count):
        wr, wi = np.empty(_WIDE, np.float32), np.empty(_WIDE, np.float32)
        fr, fi = np.empty(_WIDE, np.float32), np.empty(_WIDE, np.float32)
        for start in range(0, columns, _WIDE):
            wide = min(_WIDE, columns - start)
            here, p = slice(start, start + wide), 0
            s, of_s = share[here], of_share[j, here]
            for a in range(min(orders, last // 2) + 1):
                ar, ai = re[a, j, here], im[a, j, here]
                for n in range(wide):
                    wr[n], wi[n] = s[n] * ar[n], s[n] * ai[n]
                    fr[n], fi[n] = 0, 0
                for b in range(a, min(orders, last - a) + 1):
                    gr, gi = grad[j, p].real, grad[j, p].imag
                    p += 1
                    br, bi, cr, ci = re[b, j, here], im[b, j, here], re[a + b, j, here], im[a + b, j, here]
                    dr, di = out_re[a + b, j, here], out_im[a + b, j, here]
                    for n in range(wide):
                        pr, pi = wr[n] * br[n] - wi[n] * bi[n], wr[n] * bi[n] + wi[n] * br[n]
                        dr[n] += gr * pr + gi * pi
                        di[n] += gr * pi - gi * pr
                    dr, di = out_re[b, j, here], out_im[b, j, here]
                    for n in range(wide):
                        ur, ui = gr * cr[n] - gi * ci[n], gr * ci[n] + gi * cr[n]
                        dr[n] += ur * wr[n] + ui * wi[n]
                        di[n] += ui * wr[n] - ur * wi[n]
                        fr[n] += ur * br[n] + ui * bi[n]
                        fi[n] += ui * br[n] - ur * bi[n]
                dr, di = out_re[a, j, here], out_im[a, j, here]
                for n in range(wide):
                    dr[n] += s[n] * fr[n]
                    di[n] += s[n] * fi[n]
                    of_s[n] += fr[n] * ar[n] + fi[n] * ai[n]
