"""A map learnt by gradient from images at poses that someone proposes: what the autoencoder and its yardsticks have in common.

Batches, the marching radius, the noise of every shell and Adam's steps are here; ``methods/amortized.py`` says where poses come from.
"""

from dataclasses import replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from cryorbit.methods.amortized_config import DecoderConfig, checked
from cryorbit.methods.pose_objectives import Objective, Observed, best_candidate
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import SlicingGrid, slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.encoder import EncodedPoses
from cryorbit.training.checkpoint import State, fitted
from cryorbit.training.dataset import FourierStack
from cryorbit.training.optimiser import adam_state, load_adam, warm_cosine
from cryorbit.volumes.neural import NeuralVolume
from cryorbit.volumes.voxel import VoxelVolume

_NOISE_RATE = 0.05
_LEAST_NOISE = 1e-4  # of the images' own power
_CLIP = 1.0  # norm of a step's gradient in the network
_APART = 15_485_863  # between the seeds of two starts; a generator sees 32 bits of a seed
_BLOB = 0.25  # standard deviation of the first map in particle diameters


class Decoding:
    """The map, and a step of it: what the three methods have in common.

    Parameters
    ----------
    stack
        Particles as Fourier pixels.
    config
        Settings.
    mask_diameter
        Particle diameter in angstrom.
    members
        (M,) the particles to learn from; all if None.
    symmetry
        (S, 3, 3) point group of the map: at every step each image counts at one of its S equivalent poses, drawn anew. No symmetry if None.
    seed
        Of starts and batches.
    start
        Which of the starts from this seed: the batches, and copies drawn of images, are the same for all.
    """

    name = ""

    def __init__(
        self,
        stack: FourierStack,
        config: DecoderConfig,
        *,
        mask_diameter: float,
        members: Int[Tensor, " m"] | None = None,
        symmetry: Float[Tensor, "s 3 3"] | None = None,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        checked(config)
        self.stack, self.decoder, self.seed, self.mask_diameter = stack, config, seed, mask_diameter
        self.first_seed = seed + start * _APART  # of what the map and what proposes poses begin with
        self.members = torch.arange(len(stack)) if members is None else members
        self.symmetry = (torch.eye(3)[None] if symmetry is None else symmetry).to(stack.device)
        device, diameter = stack.device, mask_diameter / stack.pixel_size
        self.mask = soft_sphere(stack.box, 0.5 * diameter, 3.0).to(device)
        self.unit = stack.box**-1.5  # spread of a voxel, where a Fourier pixel of an image has power 1
        self.volume, rate = self._first_volume(diameter)
        self.noise = stack.power.to(device).clone()
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Adam(self.volume.parameters()), rate)
        ]

    def _first_volume(self, diameter: float) -> tuple[VoxelVolume | NeuralVolume, float]:
        """And how far Adam's steps in it go."""
        c, start = self.decoder, self._first_map(diameter)
        if c.volume == "neural":
            return NeuralVolume.from_map(start, width=c.field_width, seed=self.first_seed, unit=self.unit), c.field_rate
        return VoxelVolume.from_map(start), c.volume_rate * self.unit

    def _first_map(self, diameter: float) -> Float[Tensor, "d d d"]:
        """A ball with a soft rim and a little noise; only noise where the radius does not march (papers/001 algorithm 1)."""
        d = self.stack.box
        generator = torch.Generator().manual_seed(self.first_seed * 1_000_003)
        noise = torch.rand(d, d, d, generator=generator).to(self.mask) * self.unit
        if not self.decoder.radius_start:
            return noise
        axis = torch.arange(d, device=self.mask.device, dtype=torch.float32) - d // 2
        square = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
        return self.unit * torch.exp(-0.5 * square / (_BLOB * diameter) ** 2) + 0.1 * (noise - 0.5 * self.unit)

    # -- what a method adds -----------------------------------------------------------------------------------------------------

    def _proposed(
        self,
        chosen: Int[Tensor, " b"],
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        generator: torch.Generator | None = None,
    ) -> EncodedPoses:
        """Candidate poses of the particles ``chosen``; a ``generator`` where what is drawn in training may be."""
        raise NotImplementedError

    def _objective(self, seen: Observed, found: EncodedPoses, index: int, generator: torch.Generator) -> Objective:
        """What step ``index`` descends on; what is drawn for it comes from the ``generator``."""
        return best_candidate(seen, found)

    def _modules(self) -> dict[str, nn.Module]:
        """What is learnt, by name."""
        return {"volume": self.volume}

    # -- the loop ---------------------------------------------------------------------------------------------------------------

    def total_steps(self) -> int:
        """As configured."""
        return self.decoder.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def radius(self, index: int) -> int:
        """Fourier radius of step ``index`` in pixels of the working box; doubling it takes the same number of steps wherever it stands."""
        c, per_pixel = self.decoder, self.mask_diameter / (self.stack.box * self.stack.pixel_size)
        largest = int(self.stack.disk.radius)
        last = min(c.radius_end / per_pixel, largest) if c.radius_end else largest
        first = min(c.radius_start / per_pixel, last) if c.radius_start else last
        done = min(1.0, index / max(1.0, c.march * c.steps))
        return max(2, round(first * (last / first) ** done))

    def map(self) -> Float[Tensor, "d d d"]:
        """The map as it stands, inside the sphere."""
        return self.volume.density(self.mask).detach()

    def step(self, index: int) -> dict[str, float | str]:
        """One batch: poses, predicted images, and a step of everything that is learnt."""
        radius, pace = self.radius(index), warm_cosine(index, self.decoder.steps)
        disk, keep = self.stack.at_radius(radius)
        chosen = self._batch(index)
        images, ctf = self.stack.images(chosen), self.stack.ctf(chosen)
        for optimiser, rate in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate * pace
            optimiser.zero_grad()
        grid = slicing_grid(self.volume.density(self.mask), float(radius))
        seen = self._observed(grid, images[:, keep], ctf[:, keep], disk)
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 - 1 - index)
        found = self._equivalent(self._proposed(chosen, images, ctf, generator), generator)
        loss, left = self._objective(seen, found, index, generator)
        loss.backward()
        if "encoder" in (modules := self._modules()):
            nn.utils.clip_grad_norm_(modules["encoder"].parameters(), _CLIP)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self._follow_noise(left, disk, radius)
        share = float((disk.weight * left).sum() / (disk.weight * images[:, keep].abs().square().mean(dim=0)).sum())
        extent = self.stack.box * self.stack.pixel_size
        return {
            "loss": float(loss.detach()),
            "unexplained": share,
            "radius": float(radius),
            "resolution_A": extent / radius,
        }

    def _batch(self, index: int) -> Int[Tensor, " b"]:
        """Every image once in each pass, in an order of the pass's own; the last of a pass begins the next."""
        count, size = len(self.members), min(self.decoder.batch, len(self.members))
        place, rows = index * size, []
        while size:
            epoch, at = divmod(place, count)
            generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + epoch)
            rows.append(torch.randperm(count, generator=generator)[at : at + size])
            size, place = size - len(rows[-1]), place + len(rows[-1])
        return self.members[torch.cat(rows)]

    def _equivalent(self, found: EncodedPoses, generator: torch.Generator) -> EncodedPoses:
        """Poses at which a map of this symmetry looks the same, one element of the group for each image."""
        if len(self.symmetry) == 1:
            return found
        which = torch.randint(len(self.symmetry), (len(found.rotations),), generator=generator)
        return replace(found, rotations=found.rotations @ self.symmetry[which.to(self.symmetry.device), None])

    def _observed(
        self, grid: SlicingGrid, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"], disk: FourierDisk
    ) -> Observed:
        weight = disk.weight / disk.weight.sum()
        if self.decoder.likelihood == "noise":
            weight = weight / self.noise[disk.shell]
        return Observed(grid, images, ctf, weight, disk)

    def _follow_noise(self, power: Float[Tensor, " p"], disk: FourierDisk, radius: int) -> None:
        fresh = shell_mean(power, disk, len(self.noise))
        floor = _LEAST_NOISE * self.stack.power.to(self.noise)
        inside = torch.arange(len(self.noise), device=self.noise.device) <= radius
        mixed = torch.maximum((1 - _NOISE_RATE) * self.noise + _NOISE_RATE * fresh, floor)
        self.noise = torch.where(inside, mixed, self.noise)

    # -- resume -----------------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Everything a resumed run needs."""
        state: State = {"noise": self.noise}
        for name, module in self._modules().items():
            state |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        for i, (optimiser, _) in enumerate(self.optimisers):
            state |= {f"optimiser{i}.{k}": v for k, v in adam_state(optimiser).items()}
        return state

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""

        def part(prefix: str) -> State:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.noise = fitted(state, {"noise": self.noise.shape})["noise"].to(self.noise)
        for name, module in self._modules().items():
            module.load_state_dict(part(f"{name}."))
        for i, (optimiser, _) in enumerate(self.optimisers):
            load_adam(optimiser, part(f"optimiser{i}."))
