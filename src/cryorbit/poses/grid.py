"""Dense pose posterior: every image against every rotation x shift of a grid, as matrix products.

For image y with CTF c, slice s_g of the current map, shift phase e_t and noise precision w (papers/002 eq. 11; papers/003 eq. 2):
``log p(g, t | y) = sum_k w_k (Re[conj(e_tk s_gk) c_k y_k] - c_k^2 |s_gk|^2 / 2) + log prior(t) + const``.

Real and imaginary parts are multiplied apart: half a turn in the image plane conjugates a slice, so the sum of the two products scores a
rotation and their difference its half turn. A grid is therefore given by one rotation of each such pair. Images pass in blocks that fit
a budget; no array of images x rotations x shifts is ever whole. The weighted sums of the M-step are matrix products while posteriors are
broad and touch only the entries that hold the mass once they are sharp (``physics/kernels``).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics import kernels
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.shift import phase_ramp

# Images x rotations x shifts at once: 8 MiB of scores, which stay in cache; on CUDA about 40 bytes each.
_BLOCK = {"cpu": 2**20, "cuda": 50 * 2**20}


@dataclass(frozen=True)
class ShiftGrid:
    """Trial shifts: ``points`` (S, 2) in pixels, ``log_prior`` (S,)."""

    points: Float[Tensor, "s 2"]
    log_prior: Float[Tensor, " s"]


def shift_grid(limit_px: float, step_px: float, sigma_px: float) -> ShiftGrid:
    """Square lattice of shifts within ``limit_px``, weighted by an isotropic Gaussian prior of ``sigma_px``; negligible points are left out."""
    if limit_px <= 0:
        return ShiftGrid(torch.zeros(1, 2), torch.zeros(1))
    count = int(limit_px / step_px)
    axis = torch.arange(-count, count + 1, dtype=torch.float32) * step_px
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    norm2 = points.square().sum(dim=-1)
    log_prior = -0.5 * norm2 / max(sigma_px, 0.25 * step_px) ** 2
    keep = (norm2 <= limit_px**2 + 1e-6) & (log_prior > -8.0)
    return ShiftGrid(points[keep], torch.log_softmax(log_prior[keep], dim=0))


@dataclass(frozen=True)
class Expectation:
    """What the M-step, the noise model and the user need of the posteriors of a batch.

    ``numerator`` (H, P): posterior-weighted sum of CTF-multiplied, shifted-back images per rotation (those of the half turn conjugated);
    ``weight`` (H, P): the same sum of CTF^2; ``power`` (P,): sum over images of the posterior mean of ``|y - c e s|^2``;
    ``log_evidence`` (B,): log mean likelihood over the grid, up to terms of the image alone; ``effective`` (B,): effective number of
    poses ``1 / sum w^2``; ``shift_variance``: posterior mean of ``|t|^2 / 2``; ``intensity`` (2, B): posterior means of the whitened
    product of image and model and of the model's power: their ratio is the factor by which the image is stronger than the model;
    ``best`` (B, M): the M most probable rotations (from H on: half turns), ``best_shift`` (B, M): the shift of each; ``matches`` (B, K): the
    largest product, over the poses of each of K groups of slices, with a model of unit power, in standard deviations of the noise: a strength
    of the image is a factor of all.
    """

    numerator: Complex[Tensor, "h p"]
    weight: Float[Tensor, "h p"]
    power: Float[Tensor, " p"]
    log_evidence: Float[Tensor, " b"]
    effective: Float[Tensor, " b"]
    shift_variance: float
    intensity: Float[Tensor, "2 b"]
    best: Int[Tensor, "b m"]
    best_shift: Int[Tensor, "b m"]
    matches: Float[Tensor, "b k"]


def with_half_turns(rotations: Float[Tensor, "h 3 3"]) -> Float[Tensor, "g 3 3"]:
    """The grid in the order of ``Expectation.best``: the rotations given, then their half turns in the image plane."""
    return torch.cat([rotations, so3.half_turn(rotations)])


def expectation(
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    slices: Complex[Tensor, "h p"],
    precision: Float[Tensor, " p"],
    shifts: ShiftGrid,
    disk: FourierDisk,
    *,
    modes: int = 1,
    sums: bool = True,
    groups: int = 0,
    backend: str | None = None,
) -> Expectation:
    """Posterior of a batch of images over rotations x shifts, and its sufficient statistics.

    Parameters
    ----------
    images, ctf
        (B, P) Fourier pixels and CTF of the batch.
    slices
        (H, P) slices of the current map, without CTF, at one rotation of each pair (R, half turn of R).
    precision
        (P,) pixel multiplicity over noise variance (2 or 1 over the variance of one real component pair).
    shifts
        Trial shifts in pixels of ``disk.box``.
    disk
        The Fourier pixels.
    modes
        How many of the most probable rotations to report per image.
    sums
        Whether ``numerator``, ``weight`` and ``power`` are wanted; zeros otherwise.
    groups
        K groups of ``H / K`` slices in a row, whose ``matches`` are wanted; 0: none are.
    backend
        Kernel backend by name; None takes that of the device.
    """
    device = images.device
    kernel = kernels.select(device, backend)
    halves, pixels = slices.shape
    n_shift = len(shifts.log_prior)
    unshift = phase_ramp(shifts.points.to(device), disk).conj()
    log_prior = shifts.log_prior.to(device) - torch.log(torch.tensor(2.0 * halves))
    weighted = slices * precision
    slice_real, slice_imag = weighted.real.contiguous(), weighted.imag.contiguous()
    slice_power = 0.5 * precision * slices.abs().square()
    out = (
        torch.zeros(halves, pixels, device=device),
        torch.zeros(halves, pixels, device=device),
        torch.zeros(halves, pixels, device=device),
    )
    parts, matches = [], []
    block = max(1, _BLOCK[device.type] // (halves * n_shift))
    for y, c in zip(images.split(block), ctf.split(block), strict=True):
        shifted = ((y * c)[:, None, :] * unshift).view(-1, pixels)
        real, imag = shifted.real.contiguous(), shifted.imag.contiguous()
        even = kernel.product(real, slice_real).view(len(y), n_shift, halves)
        odd = kernel.product(imag, slice_imag).view(len(y), n_shift, halves)
        ctf2 = c.square()
        power = kernel.product(ctf2, slice_power)
        # before the posterior, which may turn the products into weights in place
        matches.append(_matches(even, odd, power, groups) if groups else power[:, :0])
        parts.append(
            kernel.posterior(
                even, odd, power, log_prior, real, imag, ctf2, out if sums else None, min(modes, 2 * halves)
            )
        )
    evidence, effective, by_shift, cross, energy, best, best_shift = (torch.cat(p) for p in zip(*parts, strict=True))
    numerator, weight = torch.complex(out[0], out[1]), out[2]
    residual = images.abs().square().sum(dim=0) if sums else torch.zeros(pixels, device=device)
    residual = residual - 2 * (slices.conj() * numerator).real.sum(dim=0) + (slices.abs().square() * weight).sum(dim=0)
    variance = float((by_shift * shifts.points.square().sum(dim=-1).to(device)).sum()) * 0.5 / len(images)
    return Expectation(
        numerator,
        weight,
        residual,
        evidence,
        effective,
        variance,
        torch.stack([cross, energy]),
        best,
        best_shift,
        torch.cat(matches),
    )


def _matches(
    even: Float[Tensor, "n s h"], odd: Float[Tensor, "n s h"], power: Float[Tensor, "n h"], groups: int
) -> Float[Tensor, "n k"]:
    """``Expectation.matches`` of a block, from its products with all slices and half their powers."""
    best = (even + odd.abs()).amax(dim=1) / (2 * power).clamp_min(torch.finfo(power.dtype).tiny).sqrt()
    return best.unflatten(-1, (groups, -1)).amax(dim=-1)


def recounted(effective: Float[Tensor, "*n"], order: int, as_order: int) -> Float[Tensor, "*n"]:
    """Effective numbers of poses on a HEALPix grid of one order, as a coarser one counts them: each order has eight times as many."""
    return (effective / 8 ** (order - as_order)).clamp_min(1.0)


def distinct_modes(
    result: Expectation, rotations: Float[Tensor, "g 3 3"], count: int, apart: float
) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
    """Of each image's best rotations the first ``count`` that lie more than ``apart`` radian from better ones, and their shifts.

    Where fewer are far enough apart, the best of the others fill the row.
    """
    best, shift = result.best, result.best_shift
    here = rotations[best]
    angle = so3.distance(*torch.broadcast_tensors(here[:, :, None], here[:, None, :]))
    kept = torch.zeros_like(best, dtype=torch.bool)
    for m in range(best.shape[1]):
        near = (angle[:, m, :m] < apart) & kept[:, :m]
        kept[:, m] = ~near.any(dim=1)
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    return best.gather(1, order), shift.gather(1, order)


def nominate(
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    rotations: Float[Tensor, "h 3 3"],
    slices: Complex[Tensor, "h p"],
    precision: Float[Tensor, " p"],
    spread_px: float,
    disk: FourierDisk,
    *,
    count: int,
    apart: float,
) -> tuple[Float[Tensor, "b m 3 3"], Float[Tensor, "b m 2"]]:
    """The ``count`` most probable poses of each image on a whole grid, ``apart`` radian from each other where there are so many.

    Parameters
    ----------
    images, ctf, slices, precision, disk
        As for :func:`expectation`.
    rotations
        (H, 3, 3) at which ``slices`` were read.
    spread_px
        Standard deviation of the shifts in pixels; searched to three times that.
    count, apart
        See above.

    Returns
    -------
    Rotations and shifts in pixels, the most probable first.
    """
    step = 0.38 * disk.box / disk.radius
    lattice = shift_grid(3 * spread_px, min(step, max(3 * spread_px, 1e-3)), spread_px)
    modes = min(8 * count, 2 * len(rotations)) if count > 1 else 1
    found = expectation(images, ctf, slices, precision, lattice, disk, sums=False, modes=modes)
    best, best_shift = distinct_modes(found, with_half_turns(rotations), count, apart)
    return with_half_turns(rotations)[best].to(images.device), lattice.points[best_shift.cpu()].to(images.device)
