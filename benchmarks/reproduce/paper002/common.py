"""The data of papers/002 section 6: projections of GroEL-GroES (PDB 1AON), poses known, and what is measured on them."""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cryorbit.methods.map_posterior import MapPosterior, map_posterior
from cryorbit.physics.fourier import fourier_to_volume, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.orientations import Kind, Orientations
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.source import open_source
from cryorbit.training.dataset import ArrayParticles, FourierStack

BOX, APIX = 128, 2.8
DIAMETER = 0.8 * BOX * APIX


@dataclass(frozen=True)
class Data:
    """Simulated particles and how long they took to make (seconds)."""

    truth: SimulatedParticles
    seconds: float

    @property
    def known(self) -> PoseSamples:
        """The true poses."""
        count = len(self.truth.images)
        return PoseSamples(
            torch.arange(count),
            self.truth.poses.rotations,
            self.truth.poses.shifts / self.truth.pixel_size,
            torch.ones(count),
        )

    def stack(self, memory_gib: float) -> FourierStack:
        """The images' Fourier pixels up to Nyquist."""
        particles = ArrayParticles(self.truth.images.numpy(), self.truth.pixel_size)
        return FourierStack(
            particles,
            0.5 * particles.box,
            mask_diameter=0.8 * particles.box * particles.pixel_size,
            memory_gib=memory_gib,
        )

    def true_map(self, stack: FourierStack) -> Tensor:
        """The true map in the stack's units, within the ball of Fourier space that images below Nyquist show."""
        kept = ball(stack.box, stack.disk.radius)
        return fourier_to_volume(volume_to_fourier(self.truth.volume.data * stack.scale) * kept, stack.box)


def simulate(
    data: Path,
    count: int,
    snr: float | None,
    *,
    name: str = "1aon",
    box: int = BOX,
    pixel_size: float = APIX,
    kind: Kind = "uniform",
    seed: int = 0,
) -> Data:
    """Projections of the model's map by slices; ``snr`` is signal variance over noise variance, None no noise."""
    begun = time.perf_counter()
    source = open_source("4ake" if name == "4ake" else str(next((data / "models").glob(f"{name}.*"))))
    truth = simulate_particles(
        source,
        count=count,
        box=box,
        pixel_size=pixel_size,
        snr_db=None if snr is None else 10 * float(torch.tensor(snr).log10()),
        orientations=Orientations(kind),
        fast=True,
        seed=seed,
    )
    return Data(truth, time.perf_counter() - begun)


def exact(stack: FourierStack, poses: PoseSamples, prior: Tensor | None = None) -> tuple[MapPosterior, float]:
    """The posterior at known poses, and the seconds it took, reading and transforming the images included."""
    begun = time.perf_counter()
    found = map_posterior(stack, torch.ones(len(stack)), poses, torch.eye(3)[None], prior)
    return found, time.perf_counter() - begun


def half(poses: PoseSamples, which: int) -> PoseSamples:
    """Every second particle."""
    return poses.rows(poses.particle % 2 == which)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """JSON with commit and device."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"commit": commit, "device": f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__}
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
