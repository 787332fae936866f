"""Numba kernels of the pose posterior: scores to weights and sums in two reads, few exponentials, no dense weights when few matter.

Scores come as ``even`` and ``odd`` (N, S, H): a rotation's score is ``even + odd - power + prior``, that of its half turn
in the image plane ``even - odd - power + prior``. Entries more than ``_FAR`` below the best weigh nothing in float32.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit, prange

_FAR = 16.0
_SUMS = {"reassoc", "nsz", "contract"}


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def summarise(
    even, odd, power, prior, weight_floor, top, total, squares, cross, energy, by_shift, best, best_shift, count, mass
):
    """Per image: best score and where, sum of exponentials, of their squares, of cross terms and model powers, sums by shift.

    ``count``: entries whose share of the total may exceed ``weight_floor``, ``mass``: the share they hold together.
    Sums are relative to ``exp(top)``.
    """
    n, shifts, half = even.shape
    for i in prange(n):
        high = -np.inf
        for s in range(shifts):
            for h in range(half):
                value = even[i, s, h] + abs(odd[i, s, h]) - power[i, h] + prior[s]
                if value > high:
                    high = value
                    best_shift[i] = s
                    best[i] = h if odd[i, s, h] >= 0 else h + half
        top[i] = high
        whole = second = crossed = energies = 0.0
        for s in range(shifts):
            here = 0.0
            for h in range(half):
                base = even[i, s, h] - power[i, h] + prior[s] - high
                turn = odd[i, s, h]
                if base + abs(turn) > -_FAR:
                    a, b = math.exp(base + turn), math.exp(base - turn)
                    here += a + b
                    second += a * a + b * b
                    crossed += (a + b) * even[i, s, h] + (a - b) * turn
                    energies += 2 * (a + b) * power[i, h]
            by_shift[i, s] = here
            whole += here
        total[i], squares[i], cross[i], energy[i] = whole, second, crossed / whole, energies / whole
        floor = math.log(weight_floor * whole)
        number, held = 0, 0.0
        for s in range(shifts):
            by_shift[i, s] /= whole
            for h in range(half):
                base, turn = even[i, s, h] - power[i, h] + prior[s] - high, odd[i, s, h]
                if base + abs(turn) > floor:
                    number += 1
                    held += math.exp(base + turn) + math.exp(base - turn)
        count[i], mass[i] = number, held / whole


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def list_weights(even, odd, power, prior, weight_floor, top, total, end, rows, halves, sums, differences):
    """The entries ``summarise`` counted: row (image x shift), rotation, and the sum and difference of its two weights.

    Image i owns the places ``end[i - 1]`` to ``end[i]``. Rounding may tell an entry at the floor otherwise than the count did: the places
    are never exceeded, and one left over keeps the weight 0 it came with.
    """
    n, shifts, half = even.shape
    for i in prange(n):
        at = end[i - 1] if i else 0
        floor = math.log(weight_floor * total[i])
        for s in range(shifts):
            for h in range(half):
                base = even[i, s, h] - power[i, h] + prior[s] - top[i]
                turn = odd[i, s, h]
                if base + abs(turn) > floor and at < end[i]:
                    a, b = math.exp(base + turn) / total[i], math.exp(base - turn) / total[i]
                    rows[at] = i * shifts + s
                    halves[at] = h
                    sums[at] = a + b
                    differences[at] = a - b
                    at += 1


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def add_listed(
    rows, halves, sums, differences, shifts, real, imaginary, ctf2, out_real, out_imaginary, out_weight, parts
):
    """Add the listed images to their rotations; threads share out the pixels, so none writes where another does."""
    pixels = real.shape[1]
    size = (pixels + parts - 1) // parts
    for part in prange(parts):
        first, last = part * size, min(pixels, (part + 1) * size)
        for e in range(len(rows)):
            row, half, plus, minus = rows[e], halves[e], sums[e], differences[e]
            image = row // shifts
            for p in range(first, last):
                out_real[half, p] += plus * real[row, p]
                out_imaginary[half, p] += minus * imaginary[row, p]
                out_weight[half, p] += plus * ctf2[image, p]


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def dense_weights(even, odd, power, prior, top, total):
    """Turn ``even`` and ``odd`` into the sums and differences of the two weights, in place."""
    n, shifts, half = even.shape
    for i in prange(n):
        for s in range(shifts):
            for h in range(half):
                base = even[i, s, h] - power[i, h] + prior[s] - top[i]
                turn = odd[i, s, h]
                a = b = 0.0
                if base + abs(turn) > -_FAR:
                    a, b = math.exp(base + turn) / total[i], math.exp(base - turn) / total[i]
                even[i, s, h] = a + b
                odd[i, s, h] = a - b


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def peaks(even, odd, power, prior, score, shift):
    """Best score over shifts of each rotation (N, 2 H) and the shift it has."""
    n, shifts, half = even.shape
    for i in prange(n):
        for h in range(2 * half):
            score[i, h] = -np.inf
        for s in range(shifts):
            for h in range(half):
                base = even[i, s, h] - power[i, h] + prior[s]
                for k, value in ((h, base + odd[i, s, h]), (h + half, base - odd[i, s, h])):
                    if value > score[i, k]:
                        score[i, k] = value
                        shift[i, k] = s
