"""A simulated data set on disk: what a microscope would give, and apart from it the truth.

``particles.mrcs`` and ``particles.star`` (RELION 3.1, no poses) are the input of a reconstruction; ``truth.star`` has
the poses, ``truth.mrc`` the map, ``simulation.json`` every setting. Images are written as they are made, so memory
does not grow with their number. All files are made in a hidden folder inside the output folder and take their names
together at the end, so a simulation that fails or is stopped leaves what was there before.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from cryorbit import __version__
from cryorbit.errors import RunError
from cryorbit.io.atomic import write_text
from cryorbit.io.mrc import StackWriter, write_volume
from cryorbit.io.particles import new_particles, write_particles
from cryorbit.simulate.particles import Projector, Simulation
from cryorbit.simulate.settings import SimulationSettings

FILES = ("particles.star", "particles.mrcs", "truth.star", "truth.mrc", "simulation.json")
SNR_DEFINITION = (
    "mean over images of the variance over all pixels of the clean image (CTF applied, shifted), "
    "divided by the variance of the noise in a pixel; dB = 10 log10"
)


@dataclass(frozen=True)
class SimulationSummary:
    """What was written: ``particles`` the STAR file; ``snr`` the realised ratio (infinite without noise)."""

    particles: Path
    count: int
    box: int
    pixel_size: float
    clean_variance: float
    noise_variance: float

    @property
    def snr(self) -> float:
        """Realised signal variance over noise variance."""
        return self.clean_variance / self.noise_variance if self.noise_variance else math.inf


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """Refuse a folder that a simulation must not be written to; nothing is changed.

    A simulation that was stopped before its end may be replaced without asking; a finished one only with
    ``overwrite``. Other files are never touched: next to them nothing is written unless ``overwrite``.

    Raises
    ------
    RunError
        RUN301 the folder is not empty; RUN302 it is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError("RUN302", f"{folder} is a file, expected a folder", "give another --output")
    found = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    unfinished = "particles.star" not in found and set(found) <= set(FILES)
    if found and not overwrite and not unfinished:
        raise RunError("RUN301", f"{folder} is not empty ({found[0]})", "give another --output, or --overwrite")


def _check_space(folder: Path, settings: SimulationSettings, box: int) -> None:
    needed, free = 4 * settings.count * box**2 + 4 * box**3, shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            "RUN303",
            f"{settings.count:,} images of {box} px take {needed / 1e9:,.1f} GB, {folder} has {free / 1e9:,.1f} GB left",
            "use another disk, fewer images or a smaller box",
        )


def _swap(made: Path, folder: Path, kept: Path) -> None:
    """Move the simulation in ``made`` to ``folder`` and an earlier one to ``kept``; on any error all moves back."""
    moves = [(folder / name, kept / name) for name in FILES if (folder / name).exists()]
    moves += [(made / name, folder / name) for name in reversed(FILES)]  # where particles.star is, the set is whole
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def write_simulation(
    folder: Path | str,
    projector: Projector,
    settings: SimulationSettings,
    *,
    source: str = "",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationSummary:
    """Simulate into ``folder``: all files or none; an earlier simulation stays until the new one is whole.

    Parameters
    ----------
    folder
        Made if need be; see :func:`check_folder`.
    projector
        From :func:`cryorbit.simulate.particles.make_projector`.
    settings
        What to draw.
    source
        What the particles are made from, for ``simulation.json``.
    overwrite
        Replace an earlier simulation.
    progress
        Called with (images done, images in all).

    Raises
    ------
    RunError, FileError
        The folder is in use (RUN301, RUN302), too small (RUN303) or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder, overwrite)
    simulation = Simulation(projector, settings)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _check_space(folder, settings, projector.box)
        with TemporaryDirectory(prefix=".simulation.", dir=folder) as name:
            made, kept = Path(name) / "made", Path(name) / "kept"
            made.mkdir()
            kept.mkdir()
            summary = _write(made, folder / "particles.star", simulation, source, progress)
            _swap(made, folder, kept)
    except BaseException:
        if new:
            with suppress(OSError):
                folder.rmdir()
        raise
    return summary


def _write(
    made: Path, final: Path, simulation: Simulation, source: str, progress: Callable[[int, int], None] | None
) -> SimulationSummary:
    projector, settings = simulation.projector, simulation.settings
    total, done = 0.0, 0
    with StackWriter(made / "particles.mrcs", settings.count, projector.box, projector.pixel_size) as stack:
        for images, variance in simulation.chunks():
            stack.write(images.numpy())
            total += float(variance.double().sum())
            done += len(images)
            if progress is not None:
                progress(done, settings.count)
    clean = total / settings.count
    summary = SimulationSummary(
        final, settings.count, projector.box, projector.pixel_size, clean, simulation.noise_variance
    )
    write_volume(made / "truth.mrc", simulation.volume.data.numpy(), projector.pixel_size)
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(settings.count)]
    ctf = None
    if simulation.ctf is not None:
        ctf = {f.name: getattr(simulation.ctf, f.name).double().numpy() for f in fields(simulation.ctf)}
    rotations, shifts = simulation.poses.rotations.double().numpy(), simulation.poses.shifts.double().numpy()
    truth = new_particles(names, projector.pixel_size, projector.box, ctf, rotations, shifts)
    write_particles(made / "truth.star", truth)
    record = json.dumps(_record(simulation, summary, source), indent=2, allow_nan=False)
    write_text(made / "simulation.json", record + "\n")
    write_particles(made / "particles.star", new_particles(names, projector.pixel_size, projector.box, ctf))
    return summary


def _record(simulation: Simulation, summary: SimulationSummary, source: str) -> dict[str, object]:
    noisy = simulation.noise_variance > 0
    return {
        "cryorbit": __version__,
        "source": source,
        "projector": type(simulation.projector).__name__,
        "box": summary.box,
        "pixel_size": summary.pixel_size,
        "settings": asdict(simulation.settings),
        "snr_definition": SNR_DEFINITION,
        "snr": summary.snr if noisy else None,
        "snr_db": 10 * math.log10(summary.snr) if noisy else None,
        "clean_variance": summary.clean_variance,
        "noise_variance": summary.noise_variance,
        "noise_spectrum": [round(v, 6) for v in simulation.noise_spectrum.tolist()],
        "gain": simulation.gain,
        "units": "angstrom, radian, kV, mm; shift_sigma_px in pixels",
    }
