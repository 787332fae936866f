"""The data of papers/001: 4AKE from every side, known truth; reduced to 64 px of 1.6 A, for two CPU cores."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cryorbit.io.particles import open_particles
from cryorbit.metrics.align import align_poses
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.source import open_source
from cryorbit.simulate.write import write_simulation
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses

BOX, APIX, DIAMETER = 64, 1.6, 70.0
LEVELS: dict[str, dict[str, Any]] = {
    "clean": {"snr_db": None},
    "0 dB": {"snr_db": 0.0},
    "0 dB, CTF, shifts": {"snr_db": 0.0, "ctf": CTFSettings(), "shift_sigma_px": 1.5},
}


def simulated(folder: Path, count: int, level: str, seed: int) -> Path:
    """Particles of 4AKE in ``folder``, made where they are not there yet; returns their STAR file."""
    if not (folder / "particles.star").exists():
        projector = make_projector(open_source("4ake"), BOX, APIX)
        write_simulation(folder, projector, SimulationSettings(count=count, seed=seed, **LEVELS[level]))
    return folder / "particles.star"


@dataclass(frozen=True)
class Data:
    """Images up to a Fourier radius, and their true poses (shifts in angstrom)."""

    stack: FourierStack
    poses: Poses

    @staticmethod
    def of(star: Path, radius: float) -> "Data":
        """The particles of ``star`` with the truth beside them."""
        truth = open_particles(star.with_name("truth.star"), require_images=False)
        poses = Poses(torch.from_numpy(truth.rotations), torch.from_numpy(truth.shifts))
        return Data(FourierStack(open_particles(star), radius, mask_diameter=DIAMETER), poses)

    def errors(self, found: Poses, chosen: torch.Tensor) -> torch.Tensor:
        """Degrees between the poses ``found`` of the particles ``chosen`` and the truth, after the best common rotation and hand."""
        doubled = Poses(found.rotations.double().cpu(), found.shifts.double().cpu())
        return torch.rad2deg(align_poses(doubled, self.poses[chosen]).error)


def summary(error: torch.Tensor) -> dict[str, float]:
    """Median, mean and share within 20 degrees."""
    return {
        "median_deg": round(float(error.median()), 3),
        "mean_deg": round(float(error.mean()), 3),
        "within_20_deg": round(float((error < 20).double().mean()), 4),
    }


def commit() -> str:
    """Of the working copy."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def write(path: Path, values: dict[str, object]) -> None:
    """Results with where they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"commit": commit(), "device": "CPU, 1 thread", "torch": torch.__version__, **values}, indent=1)
    path.write_text(text + "\n")
