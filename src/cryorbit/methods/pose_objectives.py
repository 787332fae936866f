"""What maps and encoders learnt together descend on: images against a map at the poses that were proposed for them (papers/001 eq. 10, 11).

Each objective takes a batch and its candidates and returns a loss, differentiable in map and candidates, and the mean squared residual that it
leaves per Fourier pixel.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import SlicingGrid
from cryorbit.poses.density import drawn, log_concentrated, log_mixture
from cryorbit.poses.encoder import EncodedPoses
from cryorbit.poses.table import refine_poses

Objective = tuple[Float[Tensor, ""], Float[Tensor, " p"]]
_SURPRISE = 0.1  # of the image's loss: what a candidate costs that was not expected to be the best


@dataclass(frozen=True)
class Observed:
    """A batch of images and the map they are compared with.

    Attributes
    ----------
    grid
        The map.
    images, ctf
        (B, P) Fourier pixels and CTF.
    weight
        (P,) by which a pixel's squared residual counts in an image's mean.
    disk
        The Fourier pixels.
    """

    grid: SlicingGrid
    images: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"]
    weight: Float[Tensor, " p"]
    disk: FourierDisk

    def squares(self, rotations: Float[Tensor, "b c 3 3"], shifts: Float[Tensor, "b c 2"]) -> Float[Tensor, "b c p"]:
        """Squared residuals of every image at each of its candidates (shifts in pixels)."""
        count = rotations.shape[1]
        images, ctf = (x.repeat_interleave(count, dim=0) for x in (self.images, self.ctf))
        predicted = forward(self.grid, rotations.flatten(0, 1), shifts.flatten(0, 1), self.disk, ctf)
        squares = torch.view_as_real(images - predicted).square().sum(dim=-1)
        return squares.view(-1, count, len(self.disk))

    def losses(self, squares: Float[Tensor, "b c p"]) -> Float[Tensor, "b c"]:
        """Their weighted means."""
        return (squares * self.weight).sum(dim=2)


def best_candidate(seen: Observed, found: EncodedPoses) -> Objective:
    """Mean over images of the best candidate's loss, with the surprise that it was this one (winner takes all)."""
    squares = seen.squares(found.rotations, found.shifts)
    losses = seen.losses(squares)
    row, best = torch.arange(len(losses), device=losses.device), losses.detach().argmin(dim=1)
    winner = losses[row, best].mean()
    surprise = -found.log_weight[row, best].mean()
    return winner + _SURPRISE * winner.detach() * surprise, squares.detach()[row, best].mean(dim=0)


def refined_candidate(
    seen: Observed, found: EncodedPoses, *, steps: int, fit_shift: bool, shift_sd: float
) -> Objective:
    """The map follows each image at its best candidate moved by ``steps`` Gauss-Newton steps; the candidates follow that pose.

    Semi-amortised inference (after Kim et al. 2018): the encoder proposes, each image corrects its own pose under the map as it stands. Map
    and encoder share no gradient: the first descends on the mean loss at the corrected poses, the second on minus their log density under
    its candidates.

    Parameters
    ----------
    seen, found
        Batch and candidates.
    steps
        Of Levenberg-Marquardt (:func:`~cryorbit.poses.table.refine_poses`).
    fit_shift
        Whether shifts are moved.
    shift_sd
        Pixels within which a shift counts as found.
    """
    with torch.no_grad():
        losses = seen.losses(seen.squares(found.rotations, found.shifts))
    row, best = torch.arange(len(losses), device=losses.device), losses.argmin(dim=1)
    rotations, shifts, _, _ = refine_poses(
        seen.grid,
        seen.images,
        seen.ctf,
        seen.weight * seen.disk.weight.sum(),
        found.rotations.detach()[row, best],
        found.shifts.detach()[row, best],
        seen.disk,
        iterations=steps,
        shift_only=0,
        fit_shift=fit_shift,
    )
    squares = seen.squares(rotations[:, None], shifts[:, None])
    taught = log_mixture(found, rotations, shifts, torch.eye(3).to(rotations)[None], shift_sd)
    return seen.losses(squares).mean() - taught.mean().to(squares), squares.detach()[:, 0].mean(dim=0)


def evidence_bound(seen: Observed, found: EncodedPoses, *, copies: int, generator: torch.Generator) -> Objective:
    """Minus the evidence lower bound of a mixture of isotropic matrix-Fisher densities about the candidates, per Fourier pixel.

    ``log p(y) >= sum_h w_h E_h [log p(y | R) - log q(R)]`` (Kingma and Welling 2014) with the density q of the whole mixture relative to
    uniform rotations: the expectation over heads is exact, that within a head is one draw, differentiable in rotation and concentration.
    Shifts are as proposed, without a density. Of the copies of an image the one with the highest bound counts.

    Parameters
    ----------
    seen
        Batch, weighted by the noise.
    found
        Candidates of the copies one after another; weights sum to one over each copy's.
    copies
        How many copies.
    generator
        Of the draws.
    """
    turned = drawn(found.rotations, found.concentration, generator)
    squares = seen.squares(turned, found.shifts)
    own, centres, weight, concentration = (
        x.unflatten(1, (copies, -1)) for x in (turned, found.rotations, found.log_weight, found.concentration)
    )
    cosine = 0.5 * (torch.einsum("bchij,bckij->bchk", own, centres) - 1)
    log_density = (
        weight[:, :, None] + log_concentrated(cosine, concentration[:, :, None].expand_as(cosine))
    ).logsumexp(dim=3)
    pixels = 0.5 * seen.disk.weight.sum()
    each = pixels * seen.losses(squares).unflatten(1, (copies, -1)) + log_density
    bound = (weight.exp() * each).sum(dim=2)
    row, best = torch.arange(len(bound), device=bound.device), bound.detach().argmin(dim=1)
    share = weight.detach().exp()[row, best]
    left = (share[..., None] * squares.detach().unflatten(1, (copies, -1))[row, best]).sum(dim=1).mean(dim=0)
    return (bound[row, best].mean() / pixels).to(squares), left
