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

from cryorbit.groups import so3
from cryorbit.methods.amortized_config import AmortizedConfig, DecoderConfig, TableConfig, checked
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import SlicingGrid, slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.encoder import PARAMETRISATIONS, PoseEncoder, View, rotations_of
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import FourierStack
from cryorbit.training.optimiser import adam_state, load_adam, warm_cosine
from cryorbit.types import Poses
from cryorbit.volumes.voxel import VoxelVolume

_NOISE_RATE = 0.05
_LEAST_NOISE = 1e-4  # of the images' own power
_CLIP = 1.0  # norm of a step's gradient in the network
_POSED = 500  # images shown to the network at a time
_BLOB = 0.25  # standard deviation of the first map in particle diameters


class _Decoding:
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
    seed
        Of starts and batches.
    """

    name = ""

    def __init__(
        self,
        stack: FourierStack,
        config: DecoderConfig,
        *,
        mask_diameter: float,
        members: Int[Tensor, " m"] | None = None,
        seed: int = 0,
    ) -> None:
        checked(config)
        self.stack, self.decoder, self.seed, self.mask_diameter = stack, config, seed, mask_diameter
        self.members = torch.arange(len(stack)) if members is None else members
        device, diameter = stack.device, mask_diameter / stack.pixel_size
        self.mask = soft_sphere(stack.box, 0.5 * diameter, 3.0).to(device)
        self.unit = stack.box**-1.5  # spread of a voxel, where a Fourier pixel of an image has power 1
        self.volume = VoxelVolume.from_map(self._first_map(diameter))
        self.noise = stack.power.to(device).clone()
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Adam(self.volume.parameters()), config.volume_rate * self.unit)
        ]

    def _first_map(self, diameter: float) -> Float[Tensor, "d d d"]:
        """A ball with a soft rim and a little noise; only noise where the radius does not march (papers/001 algorithm 1)."""
        d = self.stack.box
        generator = torch.Generator().manual_seed(self.seed * 1_000_003)
        noise = torch.rand(d, d, d, generator=generator).to(self.mask) * self.unit
        if not self.decoder.radius_start:
            return noise
        axis = torch.arange(d, device=self.mask.device, dtype=torch.float32) - d // 2
        square = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
        return self.unit * torch.exp(-0.5 * square / (_BLOB * diameter) ** 2) + 0.1 * (noise - 0.5 * self.unit)

    # -- what a method adds -----------------------------------------------------------------------------------------------------

    def _proposed(
        self, chosen: Int[Tensor, " b"], images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]
    ) -> tuple[Float[Tensor, "b c 3 3"], Float[Tensor, "b c 2"], Float[Tensor, "b c"]]:
        """Candidate poses of the particles ``chosen`` (shifts in pixels) and the log probability that each is best."""
        raise NotImplementedError

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
        """Fourier radius of step ``index`` in pixels of the working box."""
        c, per_pixel = self.decoder, self.mask_diameter / (self.stack.box * self.stack.pixel_size)
        largest = int(self.stack.disk.radius)
        last = min(c.radius_end / per_pixel, largest) if c.radius_end else largest
        first = min(c.radius_start / per_pixel, last) if c.radius_start else last
        done = min(1.0, index / max(1.0, c.march * c.steps))
        return max(2, round(first + (last - first) * done))

    def map(self) -> Float[Tensor, "d d d"]:
        """The map as it stands, inside the sphere."""
        return (self.volume.data * self.mask).detach()

    def step(self, index: int) -> dict[str, float | str]:
        """One batch: poses, predicted images, and a step of everything that is learnt."""
        radius, pace = self.radius(index), warm_cosine(index, self.decoder.steps)
        disk, keep = self.stack.at_radius(radius)
        chosen = self._batch(index)
        images, ctf = self.stack.images(chosen), self.stack.ctf(chosen)
        for optimiser, rate in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate * pace
            optimiser.zero_grad()
        grid = slicing_grid(self.volume.data * self.mask, float(radius))
        proposed = self._proposed(chosen, images, ctf)
        losses, residuals = self._losses(grid, images[:, keep], ctf[:, keep], proposed[0], proposed[1], disk)
        loss, best = self._objective(losses, proposed[2])
        loss.backward()
        if "encoder" in (modules := self._modules()):
            nn.utils.clip_grad_norm_(modules["encoder"].parameters(), _CLIP)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        row = torch.arange(len(best), device=best.device)
        left = residuals.view(len(losses), losses.shape[1], -1)[row, best].mean(dim=0)
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

    def _losses(
        self,
        grid: SlicingGrid,
        images: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"],
        rotations: Float[Tensor, "b c 3 3"],
        shifts: Float[Tensor, "b c 2"],
        disk: FourierDisk,
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "n p"]]:
        """Mean squared residual of every image at each of its candidates, and the squared residuals (B C, P), detached."""
        count = rotations.shape[1]
        predicted = forward(
            grid, rotations.flatten(0, 1), shifts.flatten(0, 1), disk, ctf.repeat_interleave(count, dim=0)
        )
        residual = torch.view_as_real(images.repeat_interleave(count, dim=0) - predicted).square().sum(dim=-1)
        weight = disk.weight / disk.weight.sum()
        if self.decoder.likelihood == "noise":
            weight = weight / self.noise[disk.shell]
        return (residual * weight).sum(dim=1).view(-1, count), residual.detach()

    def _objective(
        self, losses: Float[Tensor, "b c"], log_weight: Float[Tensor, "b c"]
    ) -> tuple[Float[Tensor, ""], Int[Tensor, " b"]]:
        """Mean over images of the best candidate's loss, with the surprise that it was this one; and which it was."""
        best = losses.detach().argmin(dim=1)
        winner = losses.gather(1, best[:, None]).mean()
        return winner - 0.1 * winner.detach() * log_weight.gather(1, best[:, None]).mean(), best

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

        self.noise = state["noise"].to(self.noise)
        for name, module in self._modules().items():
            module.load_state_dict(part(f"{name}."))
        for i, (optimiser, _) in enumerate(self.optimisers):
            load_adam(optimiser, part(f"optimiser{i}."))


class Tomo(_Decoding):
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
        seed: int = 0,
    ) -> None:
        super().__init__(stack, config, mask_diameter=mask_diameter, members=members, seed=seed)
        self.known = poses

    def _proposed(
        self, chosen: Int[Tensor, " b"], images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]
    ) -> tuple[Float[Tensor, "b c 3 3"], Float[Tensor, "b c 2"], Float[Tensor, "b c"]]:
        found = self.known[chosen]
        shifts = found.shifts[:, None] / self.stack.pixel_size
        return found.rotations[:, None].to(ctf), shifts.to(ctf), ctf.new_zeros(len(chosen), 1)


class TablePoses(_Decoding):
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
        seed: int = 0,
    ) -> None:
        super().__init__(stack, config, mask_diameter=mask_diameter, members=members, seed=seed)
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
        self, chosen: Int[Tensor, " b"], images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]
    ) -> tuple[Float[Tensor, "b c 3 3"], Float[Tensor, "b c 2"], Float[Tensor, "b c"]]:
        rotations = rotations_of(self.parametrisation, self.table(chosen.to(ctf.device)))
        return rotations[:, None], ctf.new_zeros(len(chosen), 1, 2), ctf.new_zeros(len(chosen), 1)


class Amortized(_Decoding):
    """The orientation autoencoder: an encoder of poses and a map, learnt together from a random start (papers/001 eq. 10, algorithm 1).

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
    seed
        Of starts and batches.
    """

    name = "amortized"

    def __init__(
        self,
        stack: FourierStack,
        config: AmortizedConfig,
        *,
        mask_diameter: float,
        members: Int[Tensor, " m"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(stack, config, mask_diameter=mask_diameter, members=members, seed=seed)
        self.config = config
        extent = mask_diameter / stack.pixel_size if config.side else math.inf
        view = View.around(stack.disk, config.side or stack.box, extent)
        self.encoder = PoseEncoder(
            view,
            parametrisation=config.parametrisation,
            heads=config.heads,
            fit_shift=config.fit_shift,
            normalised=config.normalised,
            he=config.he,
            bfloat16=config.bfloat16,
            seed=seed,
        ).to(stack.device)
        self.seen = view.columns(stack.disk).to(stack.device)
        self.optimisers.append((torch.optim.Adam(self.encoder.parameters()), config.encoder_rate))

    def _modules(self) -> dict[str, nn.Module]:
        return {"volume": self.volume, "encoder": self.encoder}

    def _shown(self, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]) -> Complex[Tensor, "b q"]:
        """What the network is given of the images."""
        return (images * ctf if self.config.matched else images)[:, self.seen]

    def _proposed(
        self, chosen: Int[Tensor, " b"], images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]
    ) -> tuple[Float[Tensor, "b c 3 3"], Float[Tensor, "b c 2"], Float[Tensor, "b c"]]:
        shown = self._shown(images, ctf)
        if not self.config.symmetrised:
            found = self.encoder(shown)
            return found.rotations, found.shifts, found.log_weight
        both = self.encoder(torch.cat([shown, shown.conj().resolve_conj()]))  # turned by 180 degrees: the conjugate
        rotations, turned = both.rotations.chunk(2)
        shifts, moved = both.shifts.chunk(2)
        return (
            torch.cat([rotations, so3.half_turn(turned)], dim=1),
            torch.cat([shifts, -moved], dim=1),
            torch.cat(both.log_weight.chunk(2), dim=1),
        )

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
                rotations, shifts, _ = self._proposed(part, images, ctf)
                losses, _ = self._losses(grid, images[:, keep], ctf[:, keep], rotations, shifts, disk)
                row, best = torch.arange(len(part), device=losses.device), losses.argmin(dim=1)
                parts.append((rotations[row, best].cpu(), shifts[row, best].cpu()))
        self.encoder.train()
        return Poses(torch.cat([r for r, _ in parts]), torch.cat([s for _, s in parts]))
