"""An encoder taught a known structure: by a finished run's posteriors, and by images drawn from its map.

* **volume**: a finished run's map, kept as it is.
* **poses**: an encoder of several weighted candidates (``poses/encoder.py``).
* **objective**: log density of the pose under the mixture of candidates (``poses/density.py``): of a pose drawn from the particle's
  posterior, so that all its modes count by their mass; and of the true pose of an image drawn from the map, with the CTF of a particle and
  the run's noise, shifts and strengths. There is no end of the latter, so nothing is learnt by heart. At last, if asked, end to end as well:
  the residual of the image at its best candidate (papers/001 eq. 11).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from cryorbit.errors import ConfigError
from cryorbit.groups import so3
from cryorbit.methods.pose_objectives import Observed
from cryorbit.physics.cryoem import forward
from cryorbit.physics.slicing import slicing_grid
from cryorbit.poses.density import SHIFT_SD, cosines, log_mixture
from cryorbit.poses.encoder import PoseEncoder, View
from cryorbit.poses.posterior import PosePosterior
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import FourierStack
from cryorbit.training.optimiser import adam_state, load_adam, warm_cosine

_CLIP = 1.0  # norm of a step's gradient
_WEAKEST = 0.3  # strength of an image drawn


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of the teaching.

    Attributes
    ----------
    steps, batch
        Adam steps, and images in each.
    rate
        Highest step.
    side
        Pixels across 1.25 particle diameters that the encoder sees.
    heads
        Candidate poses per image, with ``polar`` from each direction.
    polar
        Convolve over rings about the centre, and propose ``heads`` poses from each of 8 directions of the plane, which turn with the image.
    synthetic
        Share of each batch that is drawn from the map; the rest are the run's own particles.
    bfloat16
        Convolve in bfloat16 where the device has instructions for it, elsewhere in float32.
    end_to_end
        Share of the steps, the last ones, in which the log likelihood of each image at its best candidate is climbed too.
    """

    steps: int = 3000
    batch: int = 64
    rate: float = 1e-3
    side: int = 24
    heads: int = 4
    polar: bool = False
    synthetic: float = 0.75
    bfloat16: bool = True
    end_to_end: float = 0.0

    def encoder(self, view: View, seed: int = 0) -> PoseEncoder:
        """The network that these settings teach."""
        return PoseEncoder(view, heads=self.heads, polar=self.polar, bfloat16=self.bfloat16, seed=seed)

    def __post_init__(self) -> None:
        fine = {
            "steps": self.steps > 0,
            "batch": self.batch > 1,
            "rate": self.rate > 0,
            "side": self.side >= (16 if self.polar else 8),
            "heads": 1 <= self.heads <= 64,
            "synthetic": 0 <= self.synthetic <= 1,
            "end_to_end": 0 <= self.end_to_end <= 1,
        }
        for name, good in fine.items():
            if not good:
                raise ConfigError(
                    "CONF510",
                    f"{name} = {getattr(self, name)} is out of range",
                    "steps and rate positive, batch at least 2, side at least 8 (16 where polar), heads 1 to 64, synthetic and "
                    "end_to_end 0 to 1",
                )


@dataclass(frozen=True)
class Structure:
    """What is known of a structure and the images of it.

    Attributes
    ----------
    volume
        (D, D, D) map, transform values on the scale of the images'.
    noise
        (S,) variance of a Fourier pixel in each shell.
    symmetry
        (G, 3, 3) point group.
    shift_sd
        Standard deviation of the particles' shifts in pixels, each axis.
    strength_sd
        Of how strong an image is relative to the map.
    """

    volume: Float[Tensor, "d d d"]
    noise: Float[Tensor, " s"]
    symmetry: Float[Tensor, "g 3 3"]
    shift_sd: float
    strength_sd: float


class Distillation:
    """Teach an encoder a structure; a ``training.loop.Method``.

    Parameters
    ----------
    stack
        The run's particles as Fourier pixels.
    config
        Settings.
    structure
        What is taught, on the stack's device.
    posterior
        Of every particle's pose, shifts in pixels.
    members
        (M,) particles that may be shown; the others stay unseen.
    mask_diameter
        Particle diameter in angstrom.
    seed
        Of the start and of all that is drawn.
    """

    name = "encoder"

    def __init__(
        self,
        stack: FourierStack,
        config: DistillationConfig,
        *,
        structure: Structure,
        posterior: PosePosterior,
        members: Int[Tensor, " m"],
        mask_diameter: float,
        seed: int = 0,
    ) -> None:
        self.stack, self.config, self.structure, self.seed = stack, config, structure, seed
        self.posterior, self.members = posterior, members
        view = View.around(stack.disk, config.side, mask_diameter / stack.pixel_size)
        self.encoder = config.encoder(view, seed).to(stack.device)
        self.columns = view.columns(stack.disk).to(stack.device)
        self.disk = view.disk.to(stack.device)
        self.variance = structure.noise.to(stack.device)[self.disk.shell]
        self.grid = slicing_grid(structure.volume, view.disk.radius)
        self.shift_sd = SHIFT_SD * stack.box / view.box
        self.optimiser = torch.optim.Adam(self.encoder.parameters())

    def total_steps(self) -> int:
        """As configured."""
        return self.config.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """One batch, drawn and real; the error is that of the likeliest candidates, over images never seen before and never again."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        drawn = round(self.config.batch * self.config.synthetic)
        parts = [self.draw(drawn, generator)] if drawn else []
        if drawn < self.config.batch:
            parts.append(self._real(self.config.batch - drawn, generator))
        images, ctf, rotations, shifts = (torch.cat(x) for x in zip(*parts, strict=True))
        found = self.encoder(images * ctf)
        loss = -log_mixture(found, rotations, shifts, self.structure.symmetry, self.shift_sd).mean()
        if index >= (1 - self.config.end_to_end) * self.config.steps:
            seen = Observed(self.grid, images, ctf, 0.5 * self.disk.weight / self.variance, self.disk)
            loss = loss + seen.losses(seen.squares(found.rotations, found.shifts)).min(dim=1).values.mean()
        self.optimiser.param_groups[0]["lr"] = self.config.rate * warm_cosine(index, self.config.steps)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.encoder.parameters(), _CLIP)
        self.optimiser.step()
        best = found.best()[0].detach()
        cosine = cosines(best[:, None], rotations, self.structure.symmetry)[:, 0].clamp(-1, 1)
        return {
            "loss": float(loss.detach()),
            "error_deg": float(torch.rad2deg(cosine.acos()).median()),
            "resolution_A": self.stack.box * self.stack.pixel_size / self.disk.radius,
        }

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Complex[Tensor, "b p"], Float[Tensor, "b p"], Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
        """``count`` images from the map with their CTF, rotations, and shifts in pixels."""
        s, device = self.structure, self.disk.weight.device
        rotations = so3.random_rotations(count, generator).to(device)
        shifts = (s.shift_sd * torch.randn(count, 2, generator=generator)).to(device)
        strength = (1 + s.strength_sd * torch.randn(count, 1, generator=generator)).clamp_min(_WEAKEST).to(device)
        ctf = self.stack.ctf(self._particles(count, generator))[:, self.columns]
        noise = torch.randn(count, len(self.disk), 2, generator=generator).to(device)
        noise = torch.view_as_complex(noise * (0.5 * self.variance).sqrt()[:, None])
        return forward(self.grid, rotations, shifts, self.disk, ctf * strength) + noise, ctf, rotations, shifts

    def _particles(self, count: int, generator: torch.Generator) -> Int[Tensor, " b"]:
        return self.members[torch.randint(len(self.members), (count,), generator=generator)]

    def _real(
        self, count: int, generator: torch.Generator
    ) -> tuple[Complex[Tensor, "b p"], Float[Tensor, "b p"], Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
        """Particles of the run with their CTF and a pose drawn from the posterior of each, every other one turned by 180 degrees in plane."""
        chosen = self._particles(count, generator)
        images, ctf = (x[:, self.columns] for x in (self.stack.images(chosen), self.stack.ctf(chosen)))
        rotations, shifts = (x[:, 0].float().to(images.device) for x in self.posterior.rows(chosen).drawn(1, generator))
        turned = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        return (
            torch.where(turned[:, None], images.conj(), images),
            ctf,
            torch.where(turned[:, None, None], so3.half_turn(rotations), rotations),
            torch.where(turned[:, None], -shifts, shifts),
        )

    def state(self) -> State:
        """Weights, and the optimiser's averages."""
        return {f"encoder.{k}": v for k, v in self.encoder.state_dict().items()} | adam_state(self.optimiser)

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        own = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        self.encoder.load_state_dict(own)
        load_adam(self.optimiser, state)
