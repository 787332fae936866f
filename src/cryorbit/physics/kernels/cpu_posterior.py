"""Numba kernels of the pose posterior: scores to weights and sums, few exponentials, no dense weights when few matter.

Scores come as ``even`` and ``odd`` (N, S, H): a rotation's score is ``even + odd - power + prior``, that of its half turn
in the image plane ``even - odd - power + prior``. The rotations are read in runs of ``_RUN``: the first pass notes each run's best score,
the later ones skip the runs whose best lies more than ``_FAR`` below the image's (they weigh nothing in float32). Inside a run nothing
branches, so that the compiler turns each loop, exponentials included, into vector instructions.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit, prange

_FAR = np.float32(16.0)
_RUN = 64
_SUMS = {"reassoc", "nsz", "contract"}
_VECTOR = _SUMS | {"nnan"}

_LOWEST, _BIAS, _MANTISSA_BITS = np.float32(-80.0), np.int32(127), np.int32(23)
_LOG2_E, _HALF, _ONE = np.float32(1.44269504), np.float32(0.5), np.float32(1.0)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6 = (np.float32(1.0 / math.factorial(n)) for n in range(2, 7))


@njit(cache=True, inline="always", fastmath=_VECTOR)
@no_type_check
def exponential(x):
    """``exp(x)`` for ``x`` of 0 or less, float32, within 3e-7; below -80 that of -80."""
    x = max(x, _LOWEST)
    n = np.floor(x * _LOG2_E + _HALF)
    f = x - n * _LN2_HIGH - n * _LN2_LOW
    fraction = ((((_E6 * f + _E5) * f + _E4) * f + _E3) * f + _E2) * f * f + f + _ONE
    power_of_two = np.int32(np.int32(np.int32(n) + _BIAS) << _MANTISSA_BITS)
    return fraction * power_of_two.view(np.float32)


@njit(cache=True, nogil=True, fastmath=_VECTOR)
@no_type_check
def _best_of_runs(even, odd, power, prior, out):
    """Best score of each run of rotations at one shift."""
    half = len(even)
    for c in range(len(out)):
        high = np.float32(-np.inf)
        for h in range(c * _RUN, min((c + 1) * _RUN, half)):
            value = even[h] + abs(odd[h]) - power[h]
            if value > high:
                high = value
        out[c] = high + prior


@njit(cache=True, nogil=True, fastmath=_VECTOR)
@no_type_check
def _sums_of_run(even, odd, power, offset, first, last):
    """Of the weights ``exp(score)``: their sum, that of their squares, of cross terms and of half the model powers."""
    whole = second = crossed = energies = np.float32(0)
    for h in range(first, last):
        base, turn = even[h] - power[h] + offset, odd[h]
        a, b = exponential(base + turn), exponential(base - turn)
        whole += a + b
        second += a * a + b * b
        crossed += (a + b) * even[h] + (a - b) * turn
        energies += (a + b) * power[h]
    return whole, second, crossed, energies


@njit(cache=True, nogil=True, fastmath=_VECTOR)
@no_type_check
def _above(even, odd, power, offset, floor, first, last):
    """How many entries of a run lie above ``floor``, and the sum of their weights."""
    number, held = np.int32(0), np.float32(0)
    for h in range(first, last):
        base, turn = even[h] - power[h] + offset, odd[h]
        if base + abs(turn) > floor:
            number += np.int32(1)
            held += exponential(base + turn) + exponential(base - turn)
    return number, held


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
    runs = (half + _RUN - 1) // _RUN
    for i in prange(n):
        crest = np.empty((shifts, runs), np.float32)
        highest = np.float32(-np.inf)
        at = run = 0
        for s in range(shifts):
            _best_of_runs(even[i, s], odd[i, s], power[i], prior[s], crest[s])
            for c in range(runs):
                if crest[s, c] > highest:
                    highest, at, run = crest[s, c], s, c
        best_shift[i] = at
        high = np.float32(-np.inf)
        for h in range(run * _RUN, min((run + 1) * _RUN, half)):
            value = even[i, at, h] + abs(odd[i, at, h]) - power[i, h] + prior[at]
            if value > high:
                high = value
                best[i] = h if odd[i, at, h] >= 0 else h + half
        top[i] = high
        whole = second = crossed = energies = 0.0
        for s in range(shifts):
            here = 0.0
            for c in range(runs):
                if crest[s, c] - high > -_FAR:
                    first, last = c * _RUN, min((c + 1) * _RUN, half)
                    part = _sums_of_run(even[i, s], odd[i, s], power[i], prior[s] - high, first, last)
                    here += part[0]
                    second += part[1]
                    crossed += part[2]
                    energies += part[3]
            by_shift[i, s] = here
            whole += here
        total[i], squares[i], cross[i], energy[i] = whole, second, crossed / whole, 2 * energies / whole
        floor = np.float32(math.log(weight_floor * whole))
        number, held = 0, 0.0
        for s in range(shifts):
            by_shift[i, s] /= whole
            for c in range(runs):
                if crest[s, c] - high > floor:
                    first, last = c * _RUN, min((c + 1) * _RUN, half)
                    more, weight = _above(even[i, s], odd[i, s], power[i], prior[s] - high, floor, first, last)
                    number += more
                    held += weight
        count[i], mass[i] = number, held / whole


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def list_weights(even, odd, power, prior, weight_floor, top, total, end, rows, halves, sums, differences):
    """The entries ``summarise`` counted: row (image x shift), rotation, and the sum and difference of its two weights.

    Image i owns the places ``end[i - 1]`` to ``end[i]``. Rounding may tell an entry at the floor otherwise than the count did: the places
    are never exceeded, and one left over keeps the weight 0 it came with.
    """
    n, shifts, half = even.shape
    runs = (half + _RUN - 1) // _RUN
    for i in prange(n):
        crest = np.empty(runs, np.float32)
        at = end[i - 1] if i else 0
        high, floor, scale = np.float32(top[i]), np.float32(math.log(weight_floor * total[i])), 1.0 / total[i]
        for s in range(shifts):
            _best_of_runs(even[i, s], odd[i, s], power[i], prior[s], crest)
            for c in range(runs):
                if crest[c] - high <= floor:
                    continue
                for h in range(c * _RUN, min((c + 1) * _RUN, half)):
                    base, turn = even[i, s, h] - power[i, h] + (prior[s] - high), odd[i, s, h]
                    if base + abs(turn) > floor and at < end[i]:
                        a, b = exponential(base + turn) * scale, exponential(base - turn) * scale
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


@njit(cache=True, nogil=True, fastmath=_VECTOR)
@no_type_check
def _weigh(even, odd, power, offset, scale):
    for h in range(len(even)):
        base, turn = even[h] - power[h] + offset, odd[h]
        a, b = exponential(base + turn) * scale, exponential(base - turn) * scale
        even[h] = a + b
        odd[h] = a - b


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def dense_weights(even, odd, power, prior, top, total):
    """Turn ``even`` and ``odd`` into the sums and differences of the two weights, in place."""
    n, shifts, _ = even.shape
    for i in prange(n):
        high, scale = np.float32(top[i]), np.float32(1.0 / total[i])
        for s in range(shifts):
            _weigh(even[i, s], odd[i, s], power[i], prior[s] - high, scale)


@njit(cache=True, nogil=True, parallel=True, fastmath=_SUMS)
@no_type_check
def peaks(even, odd, power, prior, score, shift):
    """Best score over shifts of each rotation (N, 2 H) and the shift it has."""
    n, shifts, half = even.shape
    for i in prange(n):
        score[i] = -np.inf
        for s in range(shifts):
            for h in range(half):
                base = even[i, s, h] - power[i, h] + prior[s]
                for k, value in ((h, base + odd[i, s, h]), (h + half, base - odd[i, s, h])):
                    if value > score[i, k]:
                        score[i, k] = value
                        shift[i, k] = s
