"""Dense pose posterior: every image against every rotation x shift of a grid, as matrix products.

For image y with CTF c, slice s_g of the current map, shift phase e_t and noise precision w (papers/002 eq. 11; papers/003 eq. 2):
``log p(g, t | y) = sum_k w_k (Re[conj(e_tk s_gk) c_k y_k] - c_k^2 |s_gk|^2 / 2) + log prior(t) + const``. The cross term is one product of
(images x shifts, 2 pixels) with (2 pixels, rotations); the second term one of (images, pixels) with (pixels, rotations). No array of
images x rotations x shifts is ever whole: images pass in blocks that fit a budget.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.shift import phase_ramp

_BLOCK_ELEMENTS = 16_000_000
_NEGLIGIBLE = 1e-4


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

    ``numerator`` (G, P): posterior-weighted sum of CTF-multiplied, shifted-back images per rotation; ``weight`` (G, P): the same sum of
    CTF^2; ``power`` (P,): sum over images of the posterior mean of ``|y - c e s|^2``; ``log_evidence`` (B,): log sum over the grid;
    ``effective`` (B,): effective number of poses ``1 / sum w^2``; ``shift_variance``: posterior mean of ``|t|^2 / 2``;
    ``best`` (B, M): the M most probable rotations, ``best_shift`` (B, M): the shift of each, most probable first.
    """

    numerator: Complex[Tensor, "g p"]
    weight: Float[Tensor, "g p"]
    power: Float[Tensor, " p"]
    log_evidence: Float[Tensor, " b"]
    effective: Float[Tensor, " b"]
    shift_variance: float
    best: Int[Tensor, "b m"]
    best_shift: Int[Tensor, "b m"]


def expectation(
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    slices: Complex[Tensor, "g p"],
    precision: Float[Tensor, " p"],
    shifts: ShiftGrid,
    disk: FourierDisk,
    modes: int = 1,
) -> Expectation:
    """Posterior of a batch of images over rotations x shifts, and its sufficient statistics.

    Parameters
    ----------
    images, ctf
        (B, P) Fourier pixels and CTF of the batch.
    slices
        (G, P) slices of the current map at the G trial rotations, without CTF.
    precision
        (P,) pixel multiplicity over noise variance (2 or 1 over the variance of one real component pair), see ``noise_precision``.
    shifts
        Trial shifts in pixels of ``disk.box``.
    disk
        The Fourier pixels.
    modes
        How many of the most probable rotations to report per image.
    """
    count, pixels = images.shape
    rotations = slices.shape[0]
    n_shift = len(shifts.log_prior)
    device = images.device
    slice_real = torch.view_as_real(slices).reshape(rotations, 2 * pixels)
    slice_power = slices.abs().square()
    unshift = phase_ramp(shifts.points.to(device), disk).conj()
    log_prior = shifts.log_prior.to(device)
    numerator = torch.zeros(rotations, 2 * pixels, device=device)
    weight = torch.zeros(rotations, pixels, device=device)
    evidence, effective, best, best_shift = [], [], [], []
    shift_moment = 0.0
    norm2 = shifts.points.square().sum(dim=-1).to(device)
    for rows in torch.arange(count, device=device).split(max(1, _BLOCK_ELEMENTS // (rotations * n_shift))):
        y, c = images[rows], ctf[rows]
        shifted = (y * c)[:, None, :] * unshift
        shifted_real = torch.view_as_real(shifted).reshape(-1, 2 * pixels)
        score = (torch.view_as_real(shifted * precision).reshape(-1, 2 * pixels) @ slice_real.T).view(
            len(rows), n_shift, rotations
        )
        score -= (0.5 * c.square() * precision @ slice_power.T)[:, None, :]
        score += log_prior[None, :, None]
        flat = score.view(len(rows), -1)
        top = flat.amax(dim=1, keepdim=True)
        posterior = flat.sub_(top).exp_()
        total = posterior.sum(dim=1, keepdim=True)
        posterior /= total
        evidence.append((top + total.log())[:, 0])
        effective.append(1 / posterior.square().sum(dim=1))
        by_rotation = posterior.view(len(rows), n_shift, rotations)
        peak, peak_shift = by_rotation.max(dim=1)
        order = peak.topk(min(modes, rotations), dim=1).indices
        best.append(order)
        best_shift.append(peak_shift.gather(1, order))
        by_shift = by_rotation.sum(dim=2)
        shift_moment += float((by_shift * norm2).sum()) * 0.5
        weight += by_rotation.sum(dim=1).T @ c.square()
        lines = by_shift.reshape(-1) > _NEGLIGIBLE
        numerator += posterior.view(-1, rotations)[lines].T @ shifted_real[lines]
    total_numerator = torch.view_as_complex(numerator.view(rotations, pixels, 2))
    power = images.abs().square().sum(dim=0)
    power = power - 2 * (slices.conj() * total_numerator).real.sum(dim=0) + (slice_power * weight).sum(dim=0)
    return Expectation(
        total_numerator,
        weight,
        power,
        torch.cat(evidence),
        torch.cat(effective),
        shift_moment / count,
        torch.cat(best),
        torch.cat(best_shift),
    )
