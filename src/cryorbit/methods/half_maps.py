"""Maps of two halves from posed particles: insertion, solvent mask, Wiener filter by their agreement, and one frame for both."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.groups.point import keep_axes
from cryorbit.methods.halves import HALVES, members_of
from cryorbit.metrics.align import improve_alignment
from cryorbit.metrics.fsc import last_shell, masked_fsc
from cryorbit.metrics.masks import mask_within, soft_sphere
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import (
    Accumulator,
    SlicingGrid,
    insert_slices,
    insert_symmetric,
    volume_from_accumulator,
)
from cryorbit.physics.spectrum import mean_weight
from cryorbit.poses.local import PoseSamples
from cryorbit.training.dataset import FourierStack

# Fourier pixels inserted at a time: fewer cost passes over the grid, more cost fresh pages for arrays too large to be kept
_PIXELS = 2**22
_ALIGNED_PX = 0.05  # Fourier or real pixels by which the halves may lie off each other


@dataclass(frozen=True)
class PosedImages:
    """Images at one weighted pose each: (M, P) ``images`` and ``ctf`` times intensity, (M, 3, 3), (M, 2) pixels, (M,)."""

    images: Complex[Tensor, "m p"]
    ctf: Float[Tensor, "m p"]
    rotations: Float[Tensor, "m 3 3"]
    shifts: Float[Tensor, "m 2"]
    weight: Float[Tensor, " m"]

    def inserted(
        self,
        images: Complex[Tensor, "m p"],
        symmetry: Float[Tensor, "s 3 3"] | None,
        disk: FourierDisk,
        out: Accumulator | None,
    ) -> Accumulator:
        """``images`` back-projected at every mate of these poses into ``out`` (``symmetry`` None: at these alone).

        The M-step's numerator and CTF^2 weight.
        """
        weight = self.weight[:, None]
        values = images * (self.ctf * weight) * phase_ramp(self.shifts, disk).conj()
        if symmetry is None:
            return insert_slices(values, self.ctf.square() * weight, self.rotations, disk, out=out)
        return insert_symmetric(values, self.ctf.square() * weight, self.rotations, symmetry, disk, out=out)

    def mates(self, symmetry: Float[Tensor, "s 3 3"]) -> "Iterator[PosedImages]":
        """The same at each mate of their poses.

        What a map leaves of an image must be inserted where it was left: one mate's, inserted at all, never corrects what of the map is not
        symmetric.
        """
        for element in symmetry:
            yield replace(self, rotations=self.rotations @ element)

    def predicted(self, grid: SlicingGrid, disk: FourierDisk) -> Complex[Tensor, "m p"]:
        """What a map makes of the images."""
        return forward(grid, self.rotations, self.shifts, disk, self.ctf)


def posed_images(
    stack: FourierStack, intensity: Float[Tensor, " n"], samples: PoseSamples, radius: int | None = None
) -> Iterator[PosedImages]:
    """The images of ``samples`` (``samples.particle`` counts in the stack) within ``radius`` (None: whole), a bounded number at a time."""
    keep = stack.at_radius(radius)[1]
    for part in torch.arange(len(samples.particle)).split(max(1, _PIXELS // len(stack.disk))):
        particle, repeat = samples.particle[part].unique_consecutive(return_inverse=True)
        repeat = repeat.to(stack.device)
        ctf = stack.ctf(particle)[:, keep] * intensity[particle, None].to(stack.device)
        poses = (x[part].to(stack.device) for x in (samples.rotations, samples.shifts, samples.weight))
        yield PosedImages(stack.images(particle)[:, keep][repeat], ctf[repeat], *poses)


def insert_posed(
    stack: FourierStack,
    intensity: Float[Tensor, " n"],
    samples: PoseSamples,
    symmetry: Float[Tensor, "s 3 3"],
    radius: int | None = None,
) -> Accumulator:
    """Every image at its weighted poses, back-projected within ``radius`` (None: whole)."""
    disk = stack.at_radius(radius)[0]
    out: Accumulator | None = None
    for posed in posed_images(stack, intensity, samples, radius):
        out = posed.inserted(posed.images, symmetry, disk, out)
    assert out is not None
    return out


def compared(
    first: Float[Tensor, "d d d"], second: Float[Tensor, "d d d"], mask: Float[Tensor, "d d d"]
) -> Float[Tensor, " shells"]:
    """FSC of unfiltered halves inside the mask, corrected by phase randomisation; always the same random phases."""
    return masked_fsc(first.cpu(), second.cpu(), mask.cpu(), torch.Generator().manual_seed(0)).corrected.float()


@dataclass(frozen=True)
class HalfMaps:
    """Masked references of two halves, their joint map, the FSC of the halves, and their unfiltered mean inside the sphere."""

    references: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    joint: Float[Tensor, "d d d"]
    correlation: Float[Tensor, " shells"]
    unfiltered: Float[Tensor, "d d d"]


def halves_from_poses(
    stack: FourierStack,
    rotations: Float[Tensor, "n 3 3"],
    shifts: Float[Tensor, "n 2"],
    half_set: Int[Tensor, " n"],
    *,
    mask_diameter: float,
    symmetry: Float[Tensor, "s 3 3"],
    mask: Float[Tensor, "d d d"] | None = None,
) -> HalfMaps:
    """The maps refinement would end with, were these its poses (shifts in pixels): the ceiling, when they are the true ones."""
    sphere = soft_sphere(stack.box, 0.5 * mask_diameter / stack.pixel_size, 3.0).to(stack.device)
    accumulators = []
    for half in HALVES:
        own = members_of(half_set, half)
        posed = PoseSamples(own, rotations[own], shifts[own], torch.ones(len(own)))
        accumulators.append(insert_posed(stack, torch.ones(len(stack)), posed, symmetry.to(stack.device)))
    first, second = (unfiltered(a, stack.box // 2 + 2) for a in accumulators)
    mask = solvent_mask(first, second, sphere, stack.pixel_size) if mask is None else mask.to(sphere)
    correlation = compared(first, second, mask)
    one, two, joint = wiener(accumulators[0], accumulators[1], correlation, mask)
    return HalfMaps((one, two), joint, correlation, 0.5 * (first + second) * sphere)


def unfiltered(accumulator: Accumulator, shells: int) -> Float[Tensor, "d d d"]:
    """Least squares with just enough of a prior to leave no hole."""
    return volume_from_accumulator(accumulator, 1e-3 * mean_weight(accumulator, shells))


def solvent_mask(
    first: Float[Tensor, "d d d"], second: Float[Tensor, "d d d"], sphere: Float[Tensor, "d d d"], pixel_size: float
) -> Float[Tensor, "d d d"]:
    """The molecule's own soft mask inside the sphere: what lies outside it in a reference is noise."""
    found = mask_within(sphere, 0.5 * (first + second), pixel_size)
    return sphere if found is None else sphere * found


def wiener_prior(
    accumulator: Accumulator, correlation: Float[Tensor, " shells"], *, halves: int = 1
) -> Float[Tensor, " s"]:
    """Prior weight per shell of the sums of one half, or of both: mean weight over the SNR the FSC implies (Scheres 2012 eq. 9).

    ``correlation`` is taken for chance past the shell where it first falls below 0.143.
    """
    trusted = torch.where(torch.arange(len(correlation)) > last_shell(correlation, 0.143), 0.0, correlation)
    filled = torch.cat([trusted, trusted[-1:]]).clamp(1e-3, 0.999)
    filled[0] = 0.999
    ssnr = (filled / (1 - filled)).to(accumulator.weight.device)
    return mean_weight(accumulator, len(ssnr)) / (halves * ssnr)


def wiener(
    first: Accumulator,
    second: Accumulator,
    correlation: Float[Tensor, " shells"],
    mask: Float[Tensor, "d d d"],
) -> tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"], Float[Tensor, "d d d"]]:
    """The two references, masked, and the joint map, each under the prior its halves' FSC implies."""
    one, two = (volume_from_accumulator(a, wiener_prior(a, correlation)) * mask for a in (first, second))
    both = first + second
    return one, two, volume_from_accumulator(both, wiener_prior(both, correlation, halves=2))


def motion_onto(
    moving: Float[Tensor, "d d d"], still: Float[Tensor, "d d d"], symmetry: Float[Tensor, "s 3 3"], limit: int
) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"]] | None:
    """Small rotation and shift (pixels) that lay one masked map on the other; None where it already lies there."""
    start = torch.eye(3), torch.zeros(3), False
    rotation, shift, _ = improve_alignment(moving, still, start, rounds=1)
    rotation, shift = keep_axes(rotation, shift, symmetry.cpu())
    angle = float(so3.distance(rotation, torch.eye(3)))
    return None if angle * limit < _ALIGNED_PX and float(shift.norm()) < _ALIGNED_PX else (rotation, shift)
