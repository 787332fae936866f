"""Posterior of a particle's pose around a few modes: Gauss-Newton to each, then weighted samples of all.

Importance sampling from the normal distribution of the Gauss-Newton matrix, a little widened; where that is narrower than a Fourier pixel's
reach the mode itself stands for it (Laplace). All sums are over the modes of one particle, never over particles.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.metrics.align import framed
from cryorbit.physics.fourier import FourierDisk, disk_subset, fourier_disk
from cryorbit.physics.posing import pose_losses
from cryorbit.physics.slicing import SlicingGrid
from cryorbit.poses.posterior import PosePosterior
from cryorbit.poses.table import refine_poses

_PRIOR = (0.3, 3.0)  # radian, pixels: proposals are no wider, whatever an image leaves open
SHARP_PX = (
    0.25  # of standard deviation at the rim of the disk, below which a map is hardly blurred if a mode is one pose
)
_WORSE = 15.0  # of log likelihood below the best, where a mode is dropped
_LOOK = 2  # Gauss-Newton steps before starts are compared, at the coarse radius and again at the full one
_ONE_PX = 1.0  # at the rim of the disk or of shift, within which two modes are one
_SAME = 4.0  # squared standard deviations within which two modes are one
_GOLDEN = 0.5 * (math.sqrt(5) - 1)
_MASS = 0.95  # of a particle's posterior that its samples hold


@dataclass(frozen=True)
class PoseSamples:
    """Weighted poses of particles, in one list.

    Attributes
    ----------
    particle
        (S,) which particle, ascending.
    rotations, shifts
        (S, 3, 3) and (S, 2) pixels.
    weight
        (S,) sums to one over each particle.
    """

    particle: Int[Tensor, " s"]
    rotations: Float[Tensor, "s 3 3"]
    shifts: Float[Tensor, "s 2"]
    weight: Float[Tensor, " s"]

    @staticmethod
    def joined(parts: "list[PoseSamples]") -> "PoseSamples":
        """One list of all."""
        return PoseSamples(
            torch.cat([p.particle for p in parts]),
            torch.cat([p.rotations for p in parts]),
            torch.cat([p.shifts for p in parts]),
            torch.cat([p.weight for p in parts]),
        )

    def rows(self, keep: Bool[Tensor, " s"]) -> "PoseSamples":
        """Those of the list that ``keep`` says."""
        return PoseSamples(self.particle[keep], self.rotations[keep], self.shifts[keep], self.weight[keep])

    def moved(self, rotation: Float[Tensor, "3 3"], shift: Float[Tensor, "3"]) -> "PoseSamples":
        """The same poses of a map that was turned by ``rotation`` and then shifted by ``shift`` pixels."""
        return PoseSamples(self.particle, *framed(self.rotations, self.shifts, rotation, shift), self.weight)

    def thinned(self, most: int) -> "PoseSamples":
        """At most so many of each particle, each as often as its weight says (systematic resampling): means stay what they were on average.

        Where a particle's positions begin is a function of its number alone, and evenly spread over particles.
        """
        _, own, count = self.particle.unique_consecutive(return_inverse=True, return_counts=True)
        last = count.cumsum(0) - 1
        upto = self.weight.double().cumsum(0)
        before = upto - self.weight
        begin, end = before[last - count + 1], upto[last]
        offset = (self.particle.double() * _GOLDEN) % 1
        lower, upper = ((most * (x - begin[own]) / (end - begin)[own] - offset).ceil() for x in (before, upto))
        drawn = upper - lower
        return replace(self, weight=(drawn / most).to(self.weight)).rows(drawn > 0)


def sample_points(particles: int, count: int, seed: int) -> Float[Tensor, "b k 5"]:
    """Standard normal points in five dimensions for each particle, evenly spread (scrambled Sobol) and in opposite pairs.

    Every particle gets the same points with axes flipped at random: a few points alike for all would move all images alike.
    """
    uniform = torch.quasirandom.SobolEngine(5, scramble=True, seed=seed).draw((count + 1) // 2, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
    signs = torch.randint(0, 2, (particles, 1, 5), generator=torch.Generator().manual_seed(seed)).to(half) * 2 - 1
    return torch.cat([half, -half])[:count] * signs


def local_posterior(
    grid: SlicingGrid,
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    precision: Float[Tensor, " p"],
    starts: tuple[Float[Tensor, "b c 3 3"], Float[Tensor, "b c 2"], Bool[Tensor, "b c"]],
    disk: FourierDisk,
    *,
    symmetry: Float[Tensor, "s 3 3"],
    points: Float[Tensor, "b k 5"],
    modes: int,
    iterations: int,
    coarse: float = math.inf,
    fit_shift: bool = True,
    widen: float = 1.2,
    sharp: float = SHARP_PX,
) -> tuple[PosePosterior, PoseSamples, Float[Tensor, " b"]]:
    """Refine every start, keep the distinct modes, weigh them and sample them.

    Parameters
    ----------
    grid, images, ctf, precision, disk, iterations, fit_shift
        As for :func:`~cryorbit.poses.table.refine_poses`.
    starts
        Rotations, shifts in pixels, and which of them to use (at least one per particle).
    symmetry
        (S, 3, 3) rotations under which poses are equivalent.
    points
        From :func:`sample_points`.
    modes
        How many are kept.
    coarse
        Fourier radius in pixels at which several starts of a particle are looked at before the full one: from farther away than fine detail
        reaches, they come to their mode there.
    widen
        Standard deviations of the proposal over those of the Gauss-Newton matrix: tails must be covered.
    sharp
        Standard deviation in pixels, at the rim of the disk or of shift, up to which the mode stands for its samples.

    Returns
    -------
    The heaviest modes, samples of all of them (particles counted within the batch) and the best loss (B,). A mode's covariance is the
    inverse of its Gauss-Newton matrix, scaled to the spread of its samples.
    """
    count = len(images)
    owner, slot = torch.nonzero(starts[2], as_tuple=True)
    alone = bool((starts[2].sum(dim=1) == 1).all())
    y, c = (images, ctf) if alone else (images[owner], ctf[owner])
    rotations, shifts, left = starts[0][owner, slot], starts[1][owner, slot], iterations
    look = not alone and iterations > _LOOK  # first, after which most starts can be told to be hopeless
    if look:
        looks: list[tuple[FourierDisk, Int[Tensor, " q"] | slice, float]] = [(disk, slice(None), 3 * _WORSE)]
        if coarse < disk.radius:
            near = fourier_disk(disk.box, coarse).to(disk.weight.device)
            looks.insert(0, (near, disk_subset(disk, near), _WORSE))
        for part, columns, hopeless in looks:
            rotations, shifts, loss, _ = refine_poses(
                grid,
                y[:, columns],
                c[:, columns],
                precision[columns],
                rotations,
                shifts,
                part,
                iterations=_LOOK,
                fit_shift=fit_shift,
            )
            keep = loss < _best(loss, owner, count)[owner] + hopeless
            owner, rotations, shifts = owner[keep], rotations[keep], shifts[keep]
            y, c = images[owner], ctf[owner]
        left = iterations - _LOOK
    rotations, shifts, loss, hessian = refine_poses(
        grid,
        y,
        c,
        precision,
        rotations,
        shifts,
        disk,
        iterations=left,
        shift_only=0 if look else 1,
        fit_shift=fit_shift,
    )
    best = _best(loss, owner, count)
    if not alone:
        repeated = _repeated(owner, rotations, shifts, loss, hessian, disk.radius, symmetry)
        keep = (loss < best[owner] + _WORSE) & ~repeated
        owner, rotations, shifts, loss, hessian = (x[keep] for x in (owner, rotations, shifts, loss, hessian))
        y, c = images[owner], ctf[owner]
    prior = torch.tensor([_PRIOR[0] ** -2] * 3 + [_PRIOR[1] ** -2] * 2, dtype=hessian.dtype, device=hessian.device)
    if not fit_shift:
        hessian = torch.nn.functional.pad(hessian[:, :3, :3], (0, 2, 0, 2))
        prior[3:] = 1e12
    covariance = torch.linalg.inv(hessian + torch.diag_embed(prior))
    variance = covariance.diagonal(dim1=1, dim2=2)
    reach = torch.maximum(disk.radius * variance[:, :3].mean(dim=1).sqrt(), variance[:, 3:].mean(dim=1).sqrt())
    wide = torch.nonzero(reach > sharp)[:, 0]
    narrow = torch.nonzero(reach <= sharp)[:, 0]
    volume = 0.5 * torch.linalg.slogdet(covariance)[1]
    # sampled modes, then those that one pose stands for
    factor = widen * torch.linalg.cholesky(covariance[wide])
    own = points.to(factor)[owner[wide]]
    offsets = torch.einsum("bij,bkj->bki", factor, own)
    drawn_r = so3.exp(offsets[..., :3].to(rotations.dtype)) @ rotations[wide, None]
    drawn_s = shifts[wide, None] + offsets[..., 3:].to(shifts.dtype)
    drawn = pose_losses(grid, y[wide], c[wide], precision, drawn_r, drawn_s, disk)
    # likelihood and the prior that kept the proposal from spreading, over the proposal's density
    target = -drawn - 0.5 * (offsets.square() * prior).sum(dim=-1)
    count_k = points.shape[1]
    over = volume[wide, None] + 0.5 * own.square().sum(dim=-1) + 5 * math.log(widen) - math.log(count_k)
    sampled = target + over
    log_weight = torch.cat([sampled.flatten(), volume[narrow] - loss[narrow]])
    free = 5 if fit_shift else 3
    square = (
        own[..., :free].square().mean(dim=2)
    )  # of the same points, had they the weights of the normal distribution: few tell it too
    normal = 0.5 * (1 - widen**2) * own.square().sum(dim=-1)
    spread = (sampled.softmax(dim=1) * square).sum(dim=1) / (normal.softmax(dim=1) * square).sum(dim=1)
    covariance[wide] *= spread[:, None, None]
    mode = torch.cat([wide.repeat_interleave(count_k), narrow])
    weight = _normalised(log_weight, owner[mode], count)
    mass = weight.new_zeros(len(owner)).index_add(0, mode, weight)
    samples = _samples(
        owner[mode],
        torch.cat([drawn_r.flatten(0, 1), rotations[narrow]]),
        torch.cat([drawn_s.flatten(0, 1), shifts[narrow]]),
        weight,
        count,
    )
    return _heaviest(owner, (rotations, shifts, mass, covariance), count, modes), samples, best


def _repeated(
    owner: Int[Tensor, " r"],
    rotations: Float[Tensor, "r 3 3"],
    shifts: Float[Tensor, "r 2"],
    loss: Float[Tensor, " r"],
    hessian: Float[Tensor, "r 5 5"],
    radius: float,
    symmetry: Float[Tensor, "s 3 3"],
) -> Bool[Tensor, " r"]:
    """Rows that have come to where a better row of the same particle is."""
    out = torch.zeros(len(owner), dtype=torch.bool, device=owner.device)
    index = torch.arange(len(owner), device=owner.device)
    for lag in range(1, int(torch.bincount(owner).max())):  # rows of a particle follow each other
        first, second = index[:-lag], index[lag:]
        pair = owner[first] == owner[second]
        first, second = first[pair], second[pair]
        mates = rotations[first, None] @ symmetry.to(rotations)
        turns = so3.log(rotations[second, None].expand_as(mates) @ mates.mT)
        turn = turns[torch.arange(len(turns), device=turns.device), turns.norm(dim=2).argmin(dim=1)]
        step = torch.cat([turn, shifts[second] - shifts[first]], dim=1)
        pixels = torch.maximum(radius * step[:, :3].norm(dim=1), step[:, 3:].norm(dim=1))
        spread = torch.einsum("bi,bij,bj->b", step.to(hessian), hessian[first], step.to(hessian))
        near = (pixels < _ONE_PX) | (spread < _SAME)
        out[torch.where(loss[second] < loss[first], first, second)[near]] = True
    return out


def _normalised(log_weight: Float[Tensor, " s"], owner: Int[Tensor, " s"], count: int) -> Float[Tensor, " s"]:
    """Weights that sum to one over each particle."""
    top = log_weight.new_full((count,), -torch.inf).scatter_reduce(0, owner, log_weight, "amax")
    weight = (log_weight - top[owner]).exp()
    return _shares(weight, owner, count)


def _shares(weight: Float[Tensor, " s"], owner: Int[Tensor, " s"], count: int) -> Float[Tensor, " s"]:
    return weight / weight.new_zeros(count).index_add(0, owner, weight)[owner]


def _best(loss: Float[Tensor, " r"], owner: Int[Tensor, " r"], count: int) -> Float[Tensor, " b"]:
    """The lowest loss of each particle."""
    return loss.new_full((count,), torch.inf).scatter_reduce(0, owner, loss, "amin")


def _by_particle(
    weight: Float[Tensor, " s"], owner: Int[Tensor, " s"], count: int
) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """Order by particle and falling weight; and where in that order each row's particle begins."""
    order = torch.argsort(weight, descending=True, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    begin = torch.searchsorted(owner[order], torch.arange(count, device=owner.device))
    return order, begin[owner[order]]


def _samples(
    owner: Int[Tensor, " s"],
    rotations: Float[Tensor, "s 3 3"],
    shifts: Float[Tensor, "s 2"],
    weight: Float[Tensor, " s"],
    count: int,
) -> PoseSamples:
    """Those that matter, by particle, their weights made to sum to one again."""
    order, begin = _by_particle(weight, owner, count)
    ranked = weight[order]
    before = ranked.cumsum(0) - ranked
    kept = order[before - before[begin] < _MASS]  # counted from the particle's own first
    owner = owner[kept]
    weight = _shares(weight[kept], owner, count)
    return PoseSamples(owner, rotations[kept], shifts[kept], weight.to(rotations.dtype))


def _heaviest(
    owner: Int[Tensor, " r"],
    found: tuple[Float[Tensor, "r 3 3"], Float[Tensor, "r 2"], Float[Tensor, " r"], Float[Tensor, "r 5 5"]],
    count: int,
    modes: int,
) -> PosePosterior:
    """The modes of most mass, which is made to sum to one; where a particle has fewer, copies of nothing."""
    rotations, shifts, mass, covariance = found
    order, begin = _by_particle(mass, owner, count)
    rank = torch.arange(len(order), device=owner.device) - begin
    order, rank = order[rank < modes], rank[rank < modes]
    owner = owner[order]
    out_r = torch.eye(3, device=owner.device).to(rotations.dtype).expand(count, modes, 3, 3).clone()
    out_s = shifts.new_zeros(count, modes, 2)
    out_m = shifts.new_zeros(count, modes)
    out_c = torch.eye(5, device=owner.device).to(shifts.dtype).expand(count, modes, 5, 5).clone()
    out_r[owner, rank], out_s[owner, rank], out_m[owner, rank] = rotations[order], shifts[order], mass[order].to(out_m)
    out_c[owner, rank] = covariance[order].to(out_c)
    return PosePosterior(out_r, out_s, out_m / out_m.sum(dim=1, keepdim=True), out_c)
