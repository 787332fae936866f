"""What a finished run leaves in its folder: maps, particles, FSC, metrics, provenance and the data of the report's pictures."""

import csv
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

import cryorbit
from cryorbit.conventions import PARTICLE_COLUMNS
from cryorbit.errors import RunError
from cryorbit.groups.so3 import distance
from cryorbit.io.atomic import atomic_path, write_text
from cryorbit.io.mrc import write_volume
from cryorbit.io.particles import ParticleSet, write_particles
from cryorbit.methods.defocus import DefocusSearch
from cryorbit.poses.posterior import PosedParticles, PosePosterior
from cryorbit.types import Reconstruction

_SAME_RUN = 30.0  # degrees, median, between the poses of a run and the modes of its posterior


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write ``values`` as JSON; numbers that are not finite are refused."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_fsc(path: Path, curves: dict[str, Float[Tensor, " shells"]], box: int, pixel_size: float) -> None:
    """``fsc.csv``: shell, spatial frequency (1/A), resolution (A), then one column per curve."""
    with atomic_path(path) as temporary, Path(temporary).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["shell", "spatial_frequency_1_per_A", "resolution_A", *curves])
        for shell in range(box // 2 + 1):
            frequency = shell / (box * pixel_size)
            resolution = f"{1 / frequency:.4f}" if shell else ""
            writer.writerow(
                [shell, f"{frequency:.6f}", resolution, *(f"{float(c[shell]):.5f}" for c in curves.values())]
            )


def write_directions(path: Path, directions: Float[Tensor, "m 3"], resolution: Float[Tensor, " m"]) -> None:
    """``directions.csv``: unit vectors in the map's frame and the resolution along each (A)."""
    with atomic_path(path) as temporary, Path(temporary).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["x", "y", "z", "resolution_A"])
        for direction, angstrom in zip(directions.tolist(), resolution.tolist(), strict=True):
            writer.writerow([*(f"{c:.6f}" for c in direction), f"{angstrom:.4f}"])


def write_maps(run: Path, result: Reconstruction) -> None:
    """``map.mrc``, ``map_sharpened.mrc``, ``local_resolution.mrc`` (angstrom) and the unfiltered ``half_map_1.mrc``, ``half_map_2.mrc``."""
    first, second = result.half_maps
    named = {"map": result.map, "map_sharpened": result.sharpened, "local_resolution": result.local_resolution}
    named |= {"half_map_1": first, "half_map_2": second}
    for name, volume in named.items():
        write_volume(run / f"{name}.mrc", volume.data.cpu().numpy(), volume.pixel_size)


def project_folder(run: Path) -> Path:
    """What image paths in ``particles.star`` are relative to: the working directory (RELION's project) when the run is below it, else root."""
    here = Path.cwd()
    return here if Path(os.path.abspath(run)).is_relative_to(here) else Path(here.anchor)


def write_poses(run: Path, particles: ParticleSet, result: Reconstruction, columns: dict[str, list[str]]) -> None:
    """``particles.star``: every input row and column, with our poses and half sets in RELION's convention."""
    write_particles(
        run / "particles.star",
        particles,
        rotations=result.poses.rotations.to(torch.float64).cpu().numpy(),
        shifts=result.poses.shifts.to(torch.float64).cpu().numpy(),
        half_set=result.half_set.cpu().numpy(),
        extra={PARTICLE_COLUMNS[name]: values for name, values in columns.items()},
        relative_to=project_folder(run),
    )


def write_posterior(path: Path, posed: PosedParticles) -> None:
    """``poses.npz``: modes, masses and covariances of every particle's pose (angstrom), rows as in ``particles.star``."""
    posterior = posed.posterior
    arrays = {
        "rotations": posterior.rotations,
        "shifts_A": posterior.shifts,
        "mass": posterior.mass,
        "covariance": posterior.covariance,
        "entropy": posterior.entropy,
        "scale": posed.scale,
        "scale_error": posed.scale_error,
    }
    with atomic_path(path) as temporary, Path(temporary).open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **{k: v.float().cpu().numpy() for k, v in arrays.items()})


def read_posterior(path: Path) -> PosePosterior:
    """The posterior in ``poses.npz``, shifts in angstrom."""
    names = ("rotations", "shifts_A", "mass", "covariance")
    try:
        with np.load(path, allow_pickle=False) as stored:
            values = [np.asarray(stored[name], dtype=np.float32) for name in names]
    except Exception as error:  # a damaged file can raise anything: BadZipFile, zlib.error, TokenError, EOFError
        raise _no_posterior(path, f"{type(error).__name__}: {error}") from error
    n, m = values[2].shape if values[2].ndim == 2 else (0, 0)
    if [v.shape for v in values] != [(n, m, 3, 3), (n, m, 2), (n, m), (n, m, 5, 5)] or n * m == 0:
        raise _no_posterior(path, f"its arrays have shapes {', '.join(str(v.shape) for v in values)}")
    if not all(np.isfinite(v).all() for v in values):
        raise _no_posterior(path, "it holds NaN or infinity")
    if (values[2] < 0).any() or np.abs(values[2].sum(axis=1) - 1).max() > 1e-3:
        raise _no_posterior(path, "the masses of a particle's modes do not sum to one")
    if np.linalg.eigvalsh(values[3]).min() < -1e-6:
        raise _no_posterior(path, "a covariance is not positive")
    return PosePosterior(*(torch.from_numpy(v) for v in values))


def posterior_of(path: Path, rotations: NDArray[np.float64]) -> PosePosterior:
    """The posterior in ``poses.npz`` of particles whose poses in ``particles.star`` are ``rotations`` (N, 3, 3), or an error."""
    stored, apart = read_posterior(path), 180.0
    if len(stored.mass) == len(rotations):
        apart = float(torch.rad2deg(distance(stored.rotations[:, 0].double(), torch.from_numpy(rotations))).median())
    if apart > _SAME_RUN:
        raise RunError(
            "RUN025",
            f"{path} ({len(stored.mass)} particles) is not the posterior of the poses in particles.star ({len(rotations)})",
            "refine again, or remove the file",
        )
    return stored


def _no_posterior(path: Path, why: str) -> RunError:
    return RunError("RUN025", f"{path} does not hold a run's posterior: {why}", "refine again, or remove the file")


def particle_columns(
    posed: PosedParticles, log_likelihood: Float[Tensor, " n"], effective: Float[Tensor, " n"] | None
) -> dict[str, list[str]]:
    """Columns of ``particles.star`` beside the pose, by the names of ``conventions.PARTICLE_COLUMNS``; the posterior in angstrom."""
    turned, moved = posed.posterior.spread
    values = {
        "log_likelihood": log_likelihood,
        "top_mass": posed.posterior.mass[:, 0],
        "rotation_sd": torch.rad2deg(turned),
        "shift_sd": moved,
        "entropy": posed.posterior.entropy,
        "scale": posed.scale,
        "scale_error": posed.scale_error,
    }
    columns = {name: [f"{x:.4f}" for x in column.tolist()] for name, column in values.items()}
    count = 1 / posed.posterior.mass.square().sum(dim=1) if effective is None else effective
    columns["effective_poses"] = [f"{math.ceil(x - 1e-3)}" for x in count.tolist()]  # RELION reads an integer
    return columns


def defocus_columns(particles: ParticleSet, search: DefocusSearch) -> dict[str, list[str]]:
    """Refined defocus of each particle and its standard deviation, angstrom, by the names of ``conventions.PARTICLE_COLUMNS``."""
    offset, sd = (search.tensors[name].double().numpy() for name in ("defocus", "defocus_sd"))
    found = {name: particles.ctf[name] + offset for name in ("defocus_u", "defocus_v")} if particles.ctf else {}
    return {name: [f"{x:.2f}" for x in values.tolist()] for name, values in (found | {"defocus_sd": sd}).items()}


def write_report_data(
    path: Path, images: Float[Tensor, "m d d"], predictions: Float[Tensor, "m d d"], indices: Int[Tensor, " m"]
) -> None:
    """``report_data.npz``: example images beside the model's predictions."""
    with atomic_path(path) as temporary, Path(temporary).open("wb") as stream:
        np.savez_compressed(
            stream, images=images.cpu().numpy(), predictions=predictions.cpu().numpy(), indices=indices.cpu().numpy()
        )


def _commit() -> str:
    folder = Path(cryorbit.__file__).parent
    try:
        out = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return out.stdout.strip() if out.returncode == 0 else ""


def provenance(source: Path, device: str) -> dict[str, object]:
    """Versions, command, input checksum: what one needs to say how a map was made."""
    return {
        "cryorbit": cryorbit.__version__,
        "commit": _commit(),
        "command": " ".join(["cryorbit", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "input": str(source),
        "input_sha256": checksum(source),
    }


def checksum(path: Path) -> str:
    """SHA-256 of a metadata file; of the first 16 MiB and the size of a larger one."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(16 * 2**20))
    digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()
