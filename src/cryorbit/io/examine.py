"""What is in a file, and what is wrong with it: the facts behind ``cryorbit inspect``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cryorbit.errors import CryorbitError, DataError
from cryorbit.io import relion
from cryorbit.io.cryodrgn import read_arrays
from cryorbit.io.image_checks import FARTHEST, ImageChecks, check_images
from cryorbit.io.implausible import implausible
from cryorbit.io.mrc import LARGEST, read_header, read_volume
from cryorbit.io.particle_set import ParticleSet, duplicate_groups
from cryorbit.io.particles import open_particles

Level = Literal["error", "warning", "note"]
_FEW = 8
_UNREADABLE = "unreadable"
_USUAL = (
    ("voltage", 60, 400, " kV"),
    ("spherical_aberration", 0, 8, " mm"),
    ("amplitude_contrast", 0, 0.5, ""),
)


@dataclass(frozen=True)
class Finding:
    """One thing to know: ``error`` (unusable as it is), ``warning`` (look at it) or ``note``."""

    level: Level
    message: str
    hint: str = ""
    code: str = ""


@dataclass
class Examination:
    """Facts by name (JSON values) and findings about one file."""

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """No finding is an error."""
        return all(finding.level != "error" for finding in self.findings)

    def add(self, level: Level, message: str, hint: str = "", code: str = "") -> None:
        """Record a finding."""
        self.findings.append(Finding(level, message, hint, code))

    def add_error(self, error: CryorbitError) -> None:
        """Record an exception as an error."""
        self.add("error", error.message, error.hint, error.code)


def _range(values: NDArray, factor: float = 1.0) -> dict[str, float]:
    numbers = np.nan_to_num(np.array([values.min(), np.median(values), values.max()]) * factor)
    low, middle, high = (float(f"{x:.6g}") for x in numbers)
    return {"min": low, "median": middle, "max": high}


def _few(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:_FEW])) + (", ..." if len(numbers) > _FEW else "")


def _ctf(found: Examination, particles: ParticleSet) -> None:
    found.facts["ctf_missing"] = list(particles.ctf_missing)
    ctf = particles.ctf
    if ctf is None:
        found.facts["ctf"] = None
        found.add(
            "warning",
            f"no CTF: {', '.join(particles.ctf_missing)} missing",
            "import or estimate the CTF first, or go on without it for images that have none",
        )
        if {"rlnVoltage", "rlnSphericalAberration"} & set(particles.ctf_missing):
            found.add("note", "RELION refuses a particle file without voltage and spherical aberration")
        return
    mean = (ctf["defocus_u"] + ctf["defocus_v"]) / 2
    astigmatism = np.abs(ctf["defocus_u"] - ctf["defocus_v"])
    found.facts["ctf"] = {
        "defocus_um": _range(mean, 1e-4),
        "astigmatism_um": _range(astigmatism, 1e-4),
        "phase_shift_deg": _range(np.rad2deg(ctf["phase_shift"])),
        "voltage_kv": _range(ctf["voltage"]),
        "spherical_aberration_mm": _range(ctf["spherical_aberration"]),
        "amplitude_contrast": _range(ctf["amplitude_contrast"]),
        "bfactor_A2": _range(ctf["bfactor"]),
        "scale": _range(ctf["scale"]),
    }
    if (mean < 0).any():
        found.add(
            "warning", f"{int((mean < 0).sum())} particles have negative defocus (overfocus)", "RELION's is positive"
        )
    elif (mean == 0).all():
        found.add("note", "the defocus of every particle is 0")
    elif np.median(mean) < 500:
        found.add(
            "warning", f"the median defocus is {np.median(mean):.4g} A", "is the column in um? Angstrom are expected"
        )
    elif mean.max() > 80_000:
        found.add("warning", f"defocus goes up to {mean.max() * 1e-4:.3g} um", "angstrom are expected")
    strong = int((astigmatism > 0.25 * np.abs(mean)).sum())
    if strong and (mean != 0).any():
        found.add("warning", f"astigmatism above a quarter of the defocus in {strong} particle(s)")
    for name, low, high, unit in _USUAL:
        bad = (ctf[name] < low) | (ctf[name] > high)
        if bad.any():
            found.add("warning", f"{name.replace('_', ' ')} {ctf[name][bad][0]:.4g}{unit} is out of the usual range")


def _poses(found: Examination, particles: ParticleSet) -> None:
    found.facts["angles"] = particles.rotations is not None
    unit = "angstrom" if relion.ORIGIN_ANGST[0] in particles.table else "pixels"
    found.facts["shifts"] = None
    if particles.rotations is not None and len(particles) > 1 and np.ptp(particles.rotations, axis=0).max() < 1e-6:
        found.add("note", "all particles have the same angles: they were not aligned")
    if particles.shifts is not None:
        length = np.linalg.norm(particles.shifts, axis=1) / particles.pixel_size
        found.facts["shifts"] = {"stored_in": unit, "length_px": _range(length)}
        if particles.box and length.max() > particles.box / 2:
            found.add(
                "warning",
                f"shifts go up to {length.max():.1f} px in a box of {particles.box} px",
                f"the file says {unit}: is that its unit?",
            )
    halves = particles.half_set
    found.facts["half_sets"] = None if halves is None else [int((halves == 1).sum()), int((halves == 2).sum())]


def _images(found: Examination, checks: ImageChecks, box: int) -> None:
    found.facts["images"] = {
        "sampled": checks.sampled,
        "background_mean": float(f"{checks.background_mean:.4g}"),
        "background_sd": float(f"{checks.background_sd:.4g}"),
        "contrast": float(f"{checks.contrast:.3g}"),
        "contrast_score": float(f"{checks.contrast_score:.3g}"),
        "protein": checks.protein,
    }
    sampled = f"of {checks.sampled} images looked at"
    if checks.not_finite:
        found.add(
            "error",
            f"{len(checks.not_finite)} {sampled} hold NaN or infinite values: {_few(checks.not_finite)}",
            "drop these rows from the metadata",
            "DATA012",
        )
    flat = len(checks.constant) + len(checks.not_finite) == checks.sampled
    if checks.constant and flat:
        found.add(
            "error",
            f"all images are constant ({checks.sampled} of {checks.sampled} looked at): there is nothing in them",
            "extract the particles again",
            "DATA013",
        )
    elif not flat and (checks.largest > LARGEST or checks.deviation < 1 / LARGEST):
        found.add(
            "error",
            f"pixels go up to {checks.largest:.3g} with a standard deviation of {checks.deviation:.3g}; float32 "
            f"statistics need values below {LARGEST:g} and deviations above {1 / LARGEST:g}",
            "normalise the images, for example with relion_preprocess --norm",
            "DATA014",
        )
    if checks.stray:
        found.add(
            "warning",
            f"{len(checks.stray)} {sampled} have pixels more than {FARTHEST:g} usual standard deviations apart: {_few(checks.stray)}",
            "hot pixels outweigh whole images: drop these rows, or extract the particles again without them",
        )
    if checks.constant and not flat:
        most = 2 * len(checks.constant) > checks.sampled
        found.add(
            "error" if most else "warning",
            f"{len(checks.constant)} {sampled} are constant: {_few(checks.constant)}",
            "drop these rows from the metadata",
            "DATA013" if most else "",
        )
    if checks.protein == "dark":
        found.add(
            "warning",
            f"the protein is dark (centre {-checks.contrast:.3g} background deviations below the rim), expected bright",
            "reconstruct copes (--contrast dark states it), inspect takes --invert-contrast; for RELION: relion_preprocess --invert_contrast",
        )
    sd = checks.background_sd
    if sd > 0 and (abs(checks.background_mean) > 0.25 * sd or not 0.5 < sd < 2 or checks.background_sd_spread > 2):
        found.add(
            "note",
            f"images are not normalised: background {checks.background_mean:.3g} +- {sd:.3g}, "
            f"spread {checks.background_sd_spread:.3g}; RELION expects 0 +- 1",
        )
    if box % 2:
        found.add("note", f"the box of {box} px is odd: fine here, RELION wants even boxes")


def _duplicates(found: Examination, particles: ParticleSet) -> None:
    try:
        copies = len(particles) - len(np.unique(duplicate_groups(particles)))
    except DataError:  # a malformed image name, which is among the findings already
        return
    found.facts["duplicates"] = copies
    if copies:
        found.add(
            "warning",
            f"{copies} row(s) repeat an image of another row",
            "half sets are not independent if copies are in both",
        )


def _optics(particles: ParticleSet) -> list[dict[str, float | int]]:
    groups: list[dict[str, float | int]] = []
    for group in np.unique(particles.optics_group).tolist():
        rows = particles.optics_group == group
        groups.append({"group": int(group), "particles": int(rows.sum())})
        for field_name, (label, factor, default) in relion.CTF_LABELS.items():
            values = relion.per_particle(particles.table, particles.optics, particles.optics_group, label)
            if label in relion.OPTICS_LABELS and default is None and values is not None:
                groups[-1][field_name] = float(np.median(values[rows]) * factor)
    return groups


@np.errstate(over="ignore", invalid="ignore")
def examine_particles(path: Path, **options: Any) -> Examination:
    """Facts and findings about a particle file; ``options`` as ``open_particles``.

    Where the images cannot be used, that is an error, and the metadata alone is described.
    """
    found = Examination(path, _UNREADABLE)
    try:
        particles = open_particles(path, **options)
    except CryorbitError as error:
        found.add_error(error)
        try:
            particles = open_particles(path, **options, require_images=False)
        except CryorbitError as second:
            if error.code not in ("FILE010", second.code):  # without the images nothing else may say the pixel size
                found.add_error(second)
            return found
    found.kind = "particles"
    images = particles.images
    found.facts |= {
        "particles": len(particles),
        "stacks": len(images.stacks) if images else None,
        "box_px": particles.box or None,
        "pixel_size_A": particles.pixel_size,
        "columns": list(particles.table.columns),
        "optics_groups": _optics(particles),
        "sign": particles.sign,
    }
    for warning in particles.warnings:
        found.add("warning", warning)
    for problem in implausible(particles):
        found.add_error(problem)
    _ctf(found, particles)
    _poses(found, particles)
    _duplicates(found, particles)
    checks = check_images(particles)
    if checks is not None:
        _images(found, checks, particles.box)
    return found


def examine_map(path: Path) -> Examination:
    """Facts and findings about a map."""
    found = Examination(path, _UNREADABLE)
    try:
        volume, pixel_size = read_volume(path)
    except CryorbitError as error:
        found.add_error(error)
        return found
    found.kind = "map"
    found.facts |= {
        "box_px": volume.shape[0],
        "pixel_size_A": pixel_size or None,
        "min": float(volume.min()),
        "max": float(volume.max()),
        "mean": float(volume.mean(dtype=np.float64)),
        "sd": float(volume.std(dtype=np.float64)),
    }
    if not pixel_size:
        found.add("warning", "the header does not say the voxel size", "give it where it is asked for")
    if np.ptp(volume) == 0:
        found.add("error", "the map is constant")
    elif -volume.min() > 1.5 * volume.max():
        found.add("warning", "the extreme values are negative: the protein may be dark", "multiply the map by -1 if so")
    return found


def examine_pickle(path: Path) -> Examination:
    """Facts and findings about cryoDRGN's pickles."""
    found = Examination(path, _UNREADABLE)
    try:
        arrays = read_arrays(path)
    except CryorbitError as error:
        found.add_error(error)
        return found
    found.kind = "pickle"
    shapes = [array.shape for array in arrays]
    found.facts |= {"arrays": [list(shape) for shape in shapes], "rows": shapes[0][0] if shapes[0] else 0}
    if shapes[0][1:] == (3, 3):
        found.kind = "cryoDRGN poses"
    elif len(shapes) == 1 and shapes[0][1:] == (9,):
        found.kind = "cryoDRGN CTF"
    elif len(shapes) == 1 and len(shapes[0]) == 1 and arrays[0].dtype.kind in "iu":
        found.kind = "selection of particles"
    if any(not np.isfinite(array).all() for array in arrays):
        found.add("error", "the arrays hold NaN or infinite values")
    return found


def _is_map(path: Path) -> bool:
    if path.suffix in (".map", ".gz", ".bz2"):
        return True
    header = read_header(path)
    return path.suffix == ".mrc" and len(set(header.shape)) == 1


def examine(path: Path | str, **options: Any) -> Examination:
    """Facts and findings about any file that the package reads.

    Parameters
    ----------
    path
        A particle file (STAR, .cs, stack, list of stacks), a map, or a cryoDRGN pickle.
    options
        ``datadir``, ``pixel_size``, ``passthrough`` and ``invert_contrast`` as ``open_particles``.
    """
    path = Path(path)
    kinds: dict[str, Callable[[Path], Examination]] = {".pkl": examine_pickle, ".map": examine_map}
    try:
        if path.suffix in kinds:
            return kinds[path.suffix](path)
        if path.suffix in (".mrc", ".gz", ".bz2") and _is_map(path):
            return examine_map(path)
    except CryorbitError as error:
        found = Examination(path, _UNREADABLE)
        found.add_error(error)
        return found
    return examine_particles(path, **options)
