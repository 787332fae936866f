"""Poses of images under a known map: proposed by an encoder in one pass, or searched for; then a Gauss-Newton step.

Nothing is learnt here: the map, its noise and the encoder are given, images come in batches.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk, disk_subset, fourier_disk
from cryorbit.physics.posing import pose_losses
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.poses.encoder import PoseEncoder
from cryorbit.poses.grid import nominate
from cryorbit.poses.table import refine_poses

_CANDIDATES = 3  # of the search that are refined
_PRIOR = (0.3, 3.0)  # radian, pixels: what an image leaves open


@dataclass(frozen=True)
class Assigned:
    """Poses of a batch and what is known of each.

    Attributes
    ----------
    rotations, shifts
        (B, 3, 3) and (B, 2) pixels.
    spread
        (B, 2) standard deviations that the Gauss-Newton matrix leaves: radian (root mean square angle) and pixels.
    strength
        (B,) of the image relative to the map: near 1 where the pose is right.
    features
        (B, F) numbers that a confidence may be fitted to.
    proposed
        (B, 3, 3) rotations before the Gauss-Newton step.
    """

    rotations: Float[Tensor, "b 3 3"]
    shifts: Float[Tensor, "b 2"]
    spread: Float[Tensor, "b 2"]
    strength: Float[Tensor, " b"]
    features: Float[Tensor, "b f"]
    proposed: Float[Tensor, "b 3 3"]

    @staticmethod
    def joined(parts: "list[Assigned]") -> "Assigned":
        """One set of all."""
        return Assigned(**{f.name: torch.cat([getattr(p, f.name).cpu() for p in parts]) for f in fields(Assigned)})

    def replaced(self, rows: Bool[Tensor, " b"], by: "Assigned") -> "Assigned":
        """With the poses ``by`` of the ``rows``; features and proposals stay."""
        fresh = {}
        for name in ("rotations", "shifts", "spread", "strength"):
            fresh[name] = getattr(self, name).clone()
            fresh[name][rows] = getattr(by, name).to(fresh[name])
        return replace(self, **fresh)


class Assigner:
    """Poses under one map.

    Parameters
    ----------
    encoder
        Taught this map.
    volume
        (D, D, D), transform values on the scale of the images'.
    noise
        (S,) variance of a Fourier pixel in each shell.
    disk
        Fourier pixels that images come in.
    coarse
        Fourier radius in pixels of the candidates' comparison, of the first Gauss-Newton step and of the search.
    fine
        Fourier radius of the steps after the first.
    grid
        (H, 3, 3) rotations of the search, one of each pair of half turns.
    spacing
        Radian between them.
    shift_sd
        Standard deviation of shifts in pixels, as far as the search looks.
    steps
        Gauss-Newton steps, of which the first is at ``coarse``.
    """

    def __init__(
        self,
        encoder: PoseEncoder,
        volume: Float[Tensor, "d d d"],
        noise: Float[Tensor, " s"],
        disk: FourierDisk,
        *,
        coarse: float,
        fine: float,
        grid: Float[Tensor, "h 3 3"],
        spacing: float,
        shift_sd: float,
        steps: int = 2,
    ) -> None:
        self.encoder, self.disk, self.steps = encoder.eval(), disk.to(volume.device), steps
        self.rotations, self.spacing, self.shift_sd = grid, spacing, shift_sd
        self.slicing = slicing_grid(volume, max(coarse, fine))
        self.radii = []
        for radius in (coarse, fine):
            part = fourier_disk(disk.box, radius).to(volume.device)
            self.radii.append((part, disk_subset(self.disk, part), part.weight / noise.to(part.weight)[part.shell]))
        self.seen = disk_subset(self.disk, encoder.view.disk.to(volume.device))

    @cached_property
    def _slices(self) -> Complex[Tensor, "h p"]:
        """Of the whole grid; only a search needs them."""
        return slice_grid(self.slicing, self.rotations, self.radii[0][0])

    @torch.no_grad()
    def encoded(self, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]) -> Assigned:
        """One pass of the encoder, the likeliest of its candidates, and Gauss-Newton steps.

        Features: strength, log weight and log concentration of the candidate, and how far the steps moved it.
        """
        found = self.encoder((images * ctf)[:, self.seen])
        disk, keep, precision = self.radii[0]
        losses = pose_losses(
            self.slicing, images[:, keep], ctf[:, keep], precision, found.rotations, found.shifts, disk
        )
        row, best = torch.arange(len(images), device=images.device), (losses - found.log_weight).argmin(dim=1)
        start = found.rotations[row, best]
        done = self._refined(images, ctf, start, found.shifts[row, best])
        own = [found.log_weight[row, best], found.concentration[row, best].log()]
        moved = (so3.distance(done.rotations, start) + 1e-3).log()
        return Assigned(
            done.rotations,
            done.shifts,
            done.spread,
            done.strength,
            torch.cat([done.features, torch.stack([*own, moved], dim=1).float()], dim=1),
            start,
        )

    @torch.no_grad()
    def searched(self, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]) -> Assigned:
        """The best of a whole grid of rotations and shifts, refined; the only feature is strength."""
        disk, keep, precision = self.radii[0]
        rotations, shifts = nominate(
            images[:, keep],
            ctf[:, keep],
            self.rotations,
            self._slices,
            precision,
            self.shift_sd,
            disk,
            count=_CANDIDATES,
            apart=self.spacing,
        )
        count = rotations.shape[1]
        y, c = (x[:, keep].repeat_interleave(count, dim=0) for x in (images, ctf))
        turned, moved, loss, _ = refine_poses(
            self.slicing, y, c, precision, rotations.flatten(0, 1), shifts.flatten(0, 1), disk, iterations=4
        )
        best = loss.view(-1, count).argmin(dim=1) + count * torch.arange(len(images), device=images.device)
        return self._refined(images, ctf, turned[best], moved[best])

    def _refined(
        self,
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        rotations: Float[Tensor, "b 3 3"],
        shifts: Float[Tensor, "b 2"],
    ) -> Assigned:
        start, hessian = rotations, None
        for (disk, keep, precision), count in zip(self.radii, (min(self.steps, 1), self.steps - 1), strict=True):
            if hessian is None or count > 0:
                rotations, shifts, _, hessian = refine_poses(
                    self.slicing,
                    images[:, keep],
                    ctf[:, keep],
                    precision,
                    rotations,
                    shifts,
                    disk,
                    iterations=max(count, 0),
                    shift_only=0,
                )
        disk, keep, precision = self.radii[0]
        predicted = forward(self.slicing, rotations, shifts, disk, ctf[:, keep])
        power = (precision * predicted.abs().square()).sum(dim=1)
        strength = (precision * (images[:, keep] * predicted.conj()).real).sum(dim=1) / power
        assert hessian is not None
        prior = torch.tensor([_PRIOR[0] ** -2] * 3 + [_PRIOR[1] ** -2] * 2).to(hessian)
        variance = torch.linalg.inv(hessian + torch.diag_embed(prior)).diagonal(dim1=1, dim2=2)
        spread = torch.stack([variance[:, :3].sum(dim=1).sqrt(), variance[:, 3:].sum(dim=1).sqrt()], dim=1)
        features = strength[:, None].float()
        return Assigned(rotations, shifts, spread.float(), strength, features, start)
