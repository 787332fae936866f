"""A map learnt by gradient together with its images' poses: by an encoder (papers/001), by a table, or with poses known.

* **volume**: voxels (``volumes/voxel.py``), by Adam.
* **poses**: ``amortized``, a network that maps each image to a pose; ``ad``, numbers of each image's own; ``tomo``, known.
* **objective**: squared residuals of the images (papers/001 eq. 11), plain or over the noise of their shell.

The two yardsticks of papers/001 Fig. 2 differ from the autoencoder in nothing but where poses come from. What was added to the paper's model,
and what each addition is worth, is in docs/methods/amortized.md; every one is a setting.
"""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from cryorbit.methods.amortized_config import AmortizedConfig, DecoderConfig, TableConfig
from cryorbit.methods.decoding import Decoding
from cryorbit.methods.pose_objectives import Objective, Observed, best_candidate, evidence_bound, refined_candidate
from cryorbit.methods.starts import Starts
from cryorbit.physics.copies import Copies
from cryorbit.physics.slicing import slicing_grid
from cryorbit.poses.density import SHIFT_SD
from cryorbit.poses.encoder import PARAMETRISATIONS, EncodedPoses, PoseEncoder, View, rotations_of
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses

_POSED = 500  # images shown to the network at a time


class Tomo(Decoding):
    """The map at known poses: what any other source of poses can at best come to (papers/001 Fig. 2, "tomo").

    Parameters as for :class:`Amortized`; ``poses`` one per particle, shifts in angstrom.
    """

    name = "tomo"

    def __init__(
        self,
        stack: FourierStack,
        config: DecoderConfig,
        *,
        poses: Poses,
        mask_diameter: float,
        members: Int[Tensor, " m"] | None = None,
        symmetry: Float[Tensor, "s 3 3"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(stack, config, mask_diameter=mask_diameter, members=members, symmetry=symmetry, seed=seed)
        self.known = poses

    def _proposed(
        self,
        chosen: Int[Tensor, " b"],
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        generator: torch.Generator | None = None,
    ) -> EncodedPoses:
        found = self.known[chosen]
        return EncodedPoses.certain(found.rotations.to(ctf), (found.shifts / self.stack.pixel_size).to(ctf))


class TablePoses(Decoding):
    """A pose of its own for every image, learnt by gradient (papers/001 Fig. 2, "AD"); shifts are taken as zero.

    Parameters as for :class:`Amortized`.
    """

    name = "ad"

    def __init__(
        self,
        stack: FourierStack,
        config: TableConfig,
        *,
        mask_diameter: float,
        members: Int[Tensor, " m"] | None = None,
        symmetry: Float[Tensor, "s 3 3"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(stack, config, mask_diameter=mask_diameter, members=members, symmetry=symmetry, seed=seed)
        self.parametrisation = config.parametrisation
        self.table = nn.Embedding(len(stack), PARAMETRISATIONS[config.parametrisation], sparse=True)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(self.table.weight.shape, generator=generator))
        self.table.to(stack.device)
        self.optimisers.append((torch.optim.SparseAdam(list(self.table.parameters())), config.pose_rate))

    def _modules(self) -> dict[str, nn.Module]:
        return {"volume": self.volume, "table": self.table}

    def poses(self, chosen: Int[Tensor, " b"]) -> Poses:
        """Of the particles ``chosen``."""
        with torch.no_grad():
            found = rotations_of(self.parametrisation, self.table(chosen.to(self.mask.device))).cpu()
        return Poses(found, torch.zeros(len(found), 2))

    def _proposed(
        self,
        chosen: Int[Tensor, " b"],
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        generator: torch.Generator | None = None,
    ) -> EncodedPoses:
        rotations = rotations_of(self.parametrisation, self.table(chosen.to(ctf.device)))
        return EncodedPoses.certain(rotations, ctf.new_zeros(len(chosen), 2))


class Amortized(Decoding):
    """The orientation autoencoder: an encoder of poses and a map, learnt together from a random start (papers/001 eq. 10, algorithm 1).

    Parameters
    ----------
    stack
        Particles as Fourier pixels.
    config
        Settings; ``starts`` and ``trial`` are those of :func:`from_starts`.
    mask_diameter
        Particle diameter in angstrom.
    members
        (M,) the particles to learn from; all if None.
    symmetry
        (S, 3, 3) point group of the map; none if None.
    seed, start
        Of batches, and with the number of the start of where the map and the network begin.
    """

    name = "amortized"

    def __init__(
        self,
        stack: FourierStack,
        config: AmortizedConfig,
        *,
        mask_diameter: float,
        members: Int[Tensor, " m"] | None = None,
        symmetry: Float[Tensor, "s 3 3"] | None = None,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(
            stack, config, mask_diameter=mask_diameter, members=members, symmetry=symmetry, seed=seed, start=start
        )
        self.config = config
        extent = mask_diameter / stack.pixel_size if config.side else math.inf
        view = View.around(stack.disk, config.side or stack.box, extent)
        self.encoder = PoseEncoder(
            view,
            parametrisation=config.parametrisation,
            heads=config.heads,
            fit_shift=config.fit_shift,
            polar=config.polar,
            normalised=config.normalised,
            he=config.he,
            bfloat16=config.bfloat16,
            seed=self.first_seed,
        ).to(stack.device)
        self.seen = view.columns(stack.disk).to(stack.device)
        self.copies, self.moved = (Copies.of(name, view.disk.to(stack.device)) for name in (config.copies, "d4"))
        self.optimisers.append((torch.optim.Adam(self.encoder.parameters()), config.encoder_rate))

    def _modules(self) -> dict[str, nn.Module]:
        return {"volume": self.volume, "encoder": self.encoder}

    def _shown(self, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]) -> Complex[Tensor, "b q"]:
        """What the network is given of the images."""
        return (images * ctf if self.config.matched else images)[:, self.seen]

    def _proposed(
        self,
        chosen: Int[Tensor, " b"],
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        generator: torch.Generator | None = None,
    ) -> EncodedPoses:
        shown = self._shown(images, ctf)
        count, drawn = len(self.copies), None
        if self.config.augmented and generator is not None:
            drawn = torch.randint(len(self.moved), (len(shown),), generator=generator).to(shown.device)
            shown = self.moved.images(shown, drawn)
        which = torch.arange(count, device=shown.device).repeat_interleave(len(shown))
        found = self.encoder(self.copies.images(shown.repeat(count, 1), which))
        rotations, shifts = self.copies.back(found.rotations, found.shifts, which)
        every = [torch.cat(x.chunk(count), dim=1) for x in (rotations, shifts, found.log_weight, found.concentration)]
        if drawn is not None:
            every[:2] = self.moved.back(every[0], every[1], drawn)
        return EncodedPoses(*every)

    def _objective(self, seen: Observed, found: EncodedPoses, index: int, generator: torch.Generator) -> Objective:
        c = self.config
        if c.objective == "elbo":
            return evidence_bound(seen, found, copies=len(self.copies), generator=generator)
        if c.gauss_newton and index >= c.gauss_newton_from * c.steps:
            return refined_candidate(
                seen,
                found,
                steps=c.gauss_newton,
                fit_shift=c.fit_shift,
                shift_sd=SHIFT_SD * self.stack.box / self.encoder.view.box,
            )
        return best_candidate(seen, found)

    def poses(self, chosen: Int[Tensor, " b"]) -> Poses:
        """Poses of the particles ``chosen``, seen in training or not: the likeliest that the network proposes; shifts in pixels."""
        radius = self.radius(self.decoder.steps)
        disk, keep = self.stack.at_radius(radius)
        self.encoder.eval()
        parts = []
        with torch.no_grad():
            grid = slicing_grid(self.map(), float(radius))
            for part in chosen.split(_POSED):
                images, ctf = self.stack.images(part), self.stack.ctf(part)
                found = self._proposed(part, images, ctf)
                seen = self._observed(grid, images[:, keep], ctf[:, keep], disk)
                losses = seen.losses(seen.squares(found.rotations, found.shifts))
                row, best = torch.arange(len(part), device=losses.device), losses.argmin(dim=1)
                parts.append((found.rotations[row, best].cpu(), found.shifts[row, best].cpu()))
        self.encoder.train()
        return Poses(torch.cat([r for r, _ in parts]), torch.cat([s for _, s in parts]))


def from_starts(
    stack: FourierStack,
    config: AmortizedConfig,
    *,
    mask_diameter: float,
    members: Int[Tensor, " m"] | None = None,
    symmetry: Float[Tensor, "s 3 3"] | None = None,
    seed: int = 0,
) -> Starts[Amortized]:
    """The autoencoder from as many random starts as ``config`` says, of which the best goes on. Parameters as for :class:`Amortized`."""

    def begun(start: int) -> Amortized:
        return Amortized(
            stack, config, mask_diameter=mask_diameter, members=members, symmetry=symmetry, seed=seed, start=start
        )

    return Starts(begun, count=config.starts, trial=config.trial)
