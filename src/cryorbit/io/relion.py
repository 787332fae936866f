"""RELION's tables to numbers and back (labels as in RELION's ``metadata_label.h``; RELION 1 to 5).

RELION up to 3.0 keeps everything in one table; from 3.1 on voltage, Cs, amplitude contrast, pixel size and box belong
to optics groups. A column among the particles overrides the optics table. What a file does not say is None here,
never a guess; only phase shift and B-factor (0) and scale (1) have RELION's own defaults.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from cryorbit.conventions import euler_to_matrix, matrix_to_euler, shift_from_relion, shift_to_relion
from cryorbit.errors import DataError, FileError
from cryorbit.io.star import StarFile, StarTable

IMAGE, GROUP, SUBSET = "rlnImageName", "rlnOpticsGroup", "rlnRandomSubset"
PIXEL_SIZE, BOX = "rlnImagePixelSize", "rlnImageSize"
ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
ORIGIN_ANGST = ("rlnOriginXAngst", "rlnOriginYAngst")
ORIGIN_PX = ("rlnOriginX", "rlnOriginY")
SIGN = "cryorbitImageSign"
_DEGREE = np.pi / 180
_LARGEST_GROUP = 2**53
# field of CTFParams: (label, factor from the file's unit to ours, RELION's default or None where the file must say)
CTF_LABELS: dict[str, tuple[str, float, float | None]] = {
    "defocus_u": ("rlnDefocusU", 1.0, None),
    "defocus_v": ("rlnDefocusV", 1.0, None),
    "defocus_angle": ("rlnDefocusAngle", _DEGREE, None),
    "phase_shift": ("rlnPhaseShift", _DEGREE, 0.0),
    "voltage": ("rlnVoltage", 1.0, None),
    "spherical_aberration": ("rlnSphericalAberration", 1.0, None),
    "amplitude_contrast": ("rlnAmplitudeContrast", 1.0, None),
    "bfactor": ("rlnCtfBfactor", 1.0, 0.0),
    "scale": ("rlnCtfScalefactor", 1.0, 1.0),
}
OPTICS_LABELS = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
Column = NDArray[np.float64]


def find_particle_block(star: StarFile, name: str) -> str:
    """Name of the block that holds the particles: the one with ``rlnImageName``, ``particles`` first."""
    having = [block for block, table in star.blocks.items() if IMAGE in table]
    chosen = "particles" if "particles" in having else next(iter(having), None)
    if chosen is None:
        blocks = ", ".join(f'"{block}" ({len(table)} rows)' for block, table in star.blocks.items())
        raise FileError(
            "STAR010", f"no block of {name} has the column {IMAGE}, so it is no particle file; found {blocks}"
        )
    if len(having) > 1 and chosen != "particles":
        raise FileError(
            "STAR010", f"{len(having)} blocks of {name} have the column {IMAGE}: {', '.join(having)}; expected one"
        )
    if not len(star.blocks[chosen]):
        raise DataError(
            "STAR011", f'block "{chosen}" of {name} has no rows: there are no particles', "check the job that wrote it"
        )
    return chosen


def numbers(table: StarTable, label: str) -> Column | None:
    """A column as float64, or None where the table lacks it; ``STAR012`` where a value is no finite number."""
    values = table.columns.get(label)
    if values is None:
        return None
    try:
        column = np.array(values, dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(column))
    except ValueError:
        bad = np.array([i for i, value in enumerate(values) if not _is_number(value)])
    if bad.size:
        raise DataError(
            "STAR012", f'row {bad[0] + 1} of column {label} holds "{values[bad[0]]}", expected a finite number'
        )
    return column


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _group_numbers(table: StarTable) -> NDArray[np.int64] | None:
    group = numbers(table, GROUP)
    if group is None:
        return None
    bad = np.flatnonzero((group != np.round(group)) | (np.abs(group) > _LARGEST_GROUP))
    if bad.size:
        raise DataError(
            "STAR012",
            f'row {bad[0] + 1} of column {GROUP} holds "{table.columns[GROUP][bad[0]]}", expected a whole number',
        )
    return group.astype(np.int64)


def optics_groups(optics: StarTable | None, table: StarTable, name: str) -> NDArray[np.int64]:
    """Optics group of each particle; all 1 in a file without groups.

    Raises
    ------
    FileError
        ``STAR013``: the optics table is missing, lacks a group that particles use, lists one twice with different
        values, or has several and the particles name none.
    DataError
        ``STAR012``: a group is no whole number.
    """
    group = _group_numbers(table)
    if optics is None:
        return np.ones(len(table), np.int64) if group is None else group
    known = _group_numbers(optics)
    if known is None:
        raise FileError("STAR013", f"the optics table of {name} lacks the column {GROUP}")
    if group is None:
        if len(optics) != 1:
            raise FileError(
                "STAR013", f"{name} has {len(optics)} optics groups, but its particles lack the column {GROUP}"
            )
        return np.full(len(table), known[0], np.int64)
    seen: dict[int, tuple[str, ...]] = {}
    rows = zip(*(values for label, values in optics.columns.items() if label != GROUP), strict=True)
    for number, row in zip(known.tolist(), rows, strict=False):
        if seen.setdefault(number, row) != row:
            raise FileError(
                "STAR013", f"the optics table of {name} lists group {number} twice, with different values; expected one"
            )
    lost = sorted(set(group.tolist()) - set(known.tolist()))
    if lost:
        raise FileError(
            "STAR013", f"particles of {name} are in optics group(s) {lost}, which its optics table does not have"
        )
    return group


def per_particle(table: StarTable, optics: StarTable | None, group: NDArray[np.int64], label: str) -> Column | None:
    """Value of ``label`` for each particle, from its row or else from its optics group; None where neither has it."""
    own = numbers(table, label)
    if own is not None or optics is None or label not in optics:
        return own
    keys, values = numbers(optics, GROUP), numbers(optics, label)
    if keys is None or values is None:
        return None
    order = np.argsort(keys, kind="stable")
    return values[order[np.searchsorted(keys[order], group)]]


def pixel_sizes(table: StarTable, optics: StarTable | None, group: NDArray[np.int64]) -> Column | None:
    """Angstrom per pixel of each particle image, or None where nothing says it.

    ``rlnImagePixelSize``, else detector pixel (um) over magnification, else ``rlnPixelSize``.
    """
    size = per_particle(table, optics, group, PIXEL_SIZE)
    if size is None:
        detector, magnification = numbers(table, "rlnDetectorPixelSize"), numbers(table, "rlnMagnification")
        if detector is not None and magnification is not None and (magnification > 0).all():
            size = detector / magnification * 1e4
    return numbers(table, "rlnPixelSize") if size is None else size


def ctf_columns(
    table: StarTable, optics: StarTable | None, group: NDArray[np.int64]
) -> tuple[dict[str, Column] | None, tuple[str, ...]]:
    """CTFParams fields in our units, and the labels that are missing (then there is no CTF: None).

    B-factors none of which is positive are Warp's and M's, which write a fall-off as a negative number (cryoDRGN reads
    them as dose x -4); RELION's is positive.
    """
    fields: dict[str, Column] = {}
    missing: list[str] = []
    for field, (label, factor, default) in CTF_LABELS.items():
        column = per_particle(table, optics, group, label)
        if column is not None:
            fields[field] = np.abs(column) if field == "bfactor" and (column <= 0).all() else column * factor
        elif default is not None:
            fields[field] = np.full(len(table), default)
        else:
            missing.append(label)
    return (None, tuple(missing)) if missing else (fields, ())


def with_given_ctf(table: StarTable, optics: StarTable | None, given: Mapping[str, float]) -> StarTable:
    """The table with columns for the ``given`` CTFParams fields that neither it nor the optics table has."""
    columns: dict[str, list[str]] = {}
    for field, value in given.items():
        label, factor, _ = CTF_LABELS[field]
        if label not in table and (optics is None or label not in optics):
            columns[label] = [f"{value / factor:.6f}"] * len(table)
    return table.with_columns(columns)


def poses(table: StarTable, pixel_size: float) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Rotations (N, 3, 3) and shifts (N, 2) in angstrom; None for what the table does not have in full."""
    angles = [numbers(table, label) for label in ANGLES]
    rotations = (
        None if any(a is None for a in angles) else euler_to_matrix(np.stack([a for a in angles if a is not None], -1))
    )
    for labels, scale in ((ORIGIN_ANGST, 1.0), (ORIGIN_PX, pixel_size)):
        x, y = numbers(table, labels[0]), numbers(table, labels[1])
        if x is not None and y is not None:
            return rotations, shift_from_relion(np.stack([x, y], -1) * scale)
    return rotations, None


def texts(values: NDArray[np.float64], digits: int = 6) -> list[str]:
    """Numbers as RELION writes them."""
    return [f"{value:.{digits}f}" for value in np.asarray(values, dtype=np.float64).tolist()]


def pose_columns(
    rotations: Float[np.ndarray, "n 3 3"] | None, shifts: Float[np.ndarray, "n 2"] | None
) -> dict[str, list[str]]:
    """RELION columns of the poses that are given: degrees and angstrom."""
    columns: dict[str, list[str]] = {}
    if rotations is not None:
        columns |= {label: texts(values) for label, values in zip(ANGLES, matrix_to_euler(rotations).T, strict=True)}
    if shifts is not None:
        columns |= {label: texts(values) for label, values in zip(ORIGIN_ANGST, shift_to_relion(shifts).T, strict=True)}
    return columns


def make_optics(table: StarTable) -> tuple[StarTable, list[str]]:
    """An optics table (a group per distinct old group, voltage, Cs, amplitude contrast); each particle's group."""
    keyed = [label for label in (GROUP, *OPTICS_LABELS) if label in table]
    rows: list[tuple[str, ...]] = (
        list(zip(*(table.columns[label] for label in keyed), strict=True)) if keyed else [()] * len(table)
    )
    number = {row: str(i) for i, row in enumerate(dict.fromkeys(rows), 1)}
    columns = {"rlnOpticsGroupName": [f"opticsGroup{i}" for i in number.values()], GROUP: list(number.values())}
    columns |= {label: [row[j] for row in number] for j, label in enumerate(keyed) if label != GROUP}
    return StarTable(columns), [number[row] for row in rows]


def complete_optics(optics: StarTable, table: StarTable, group: NDArray[np.int64]) -> StarTable:
    """The optics table with voltage, Cs and amplitude contrast taken from the particles where it lacks them."""
    own = [int(float(value)) for value in optics.columns[GROUP]]
    first = {int(number): int(row) for number, row in zip(*np.unique(group, return_index=True), strict=True)}
    columns: dict[str, list[str]] = {}
    for label in OPTICS_LABELS:
        if label in table and label not in optics and set(own) <= set(first):
            columns[label] = [table.columns[label][first[number]] for number in own]
    return optics.with_columns(columns)


def half_sets(table: StarTable) -> Int[np.ndarray, " n"] | None:
    """Half set 1 or 2 of each particle; None without the column or where RELION has not assigned halves (zeros)."""
    column = numbers(table, SUBSET)
    if column is None or not np.isin(column, (1, 2)).all():
        return None
    return column.astype(np.int64)
