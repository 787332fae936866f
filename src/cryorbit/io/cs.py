"""cryoSPARC's ``.cs`` particle files (a numpy structured array, no pickle) as RELION's tables.

Field by field: ``alignments3D/pose`` and ``shift`` through ``conventions``; ``split`` 0, 1 to half sets 1, 2;
``blob/idx`` from 0 to image numbers from 1; radian to degrees; ``blob/sign`` -1 (images stored with dark protein) to
the column ``cryorbitImageSign``.
"""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cryorbit.conventions import rotation_from_cryosparc, shift_from_cryosparc
from cryorbit.errors import DataError, FileError
from cryorbit.io import relion
from cryorbit.io.star import StarFile, StarTable

_COPIED = {
    "ctf/accel_kv": "rlnVoltage",
    "ctf/cs_mm": "rlnSphericalAberration",
    "ctf/amp_contrast": "rlnAmplitudeContrast",
    "ctf/df1_A": "rlnDefocusU",
    "ctf/df2_A": "rlnDefocusV",
    "ctf/bfactor": "rlnCtfBfactor",
    "ctf/scale": "rlnCtfScalefactor",
    "blob/psize_A": relion.PIXEL_SIZE,
    "uid": "cryosparcUid",
}
_DEGREES = {"ctf/df_angle_rad": "rlnDefocusAngle", "ctf/phase_shift_rad": "rlnPhaseShift"}
_FROM_ZERO = {"split": relion.SUBSET, "class": "rlnClassNumber"}
_NOT_CARRIED = ("ctf/tilt_A", "ctf/trefoil_A", "ctf/tetra_A", "ctf/anisomag", "ctf/shift_A")


def read_cs(path: Path | str) -> NDArray:
    """The structured array of a ``.cs`` file.

    Raises
    ------
    FileError
        ``FILE001`` missing; ``CS001`` no structured numpy array; ``CS002`` cryoSPARC's newer compressed format.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            if b"CSDAT" in stream.read(8):
                raise FileError(
                    "CS002",
                    f"{path.name} is in cryoSPARC's compressed format; expected a numpy .cs file",
                    "export it with cryosparc-tools: Dataset.load(...).save(..., format=1)",
                )
            stream.seek(0)
            array = np.load(stream)
    except OSError as error:
        raise FileError("FILE001", f"cannot read {path}: {error.strerror or error}") from error
    except FileError:
        raise
    except (ValueError, EOFError, SyntaxError, MemoryError, OverflowError, BadZipFile) as error:
        raise FileError("CS001", f"{path.name} is no .cs file: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.names is None or array.ndim != 1:
        raise FileError("CS001", f"{path.name} holds no structured array, so it is no .cs file")
    return array


def _fields(array: NDArray) -> dict[str, NDArray]:
    return {key: array[key] for key in array.dtype.names or ()}


def join(main: NDArray, passthrough: NDArray, name: str) -> dict[str, NDArray]:
    """Fields of ``main`` and, for its particles, those that only ``passthrough`` has, joined by ``uid``.

    Raises
    ------
    DataError
        ``CS003``: no uid, repeated uids in the passthrough file, or particles that it does not have.
    """
    fields, more = _fields(main), _fields(passthrough)
    if "uid" not in fields or "uid" not in more:
        raise DataError("CS003", f"{name} and its passthrough file cannot be joined: a file lacks the field uid")
    uids, first = np.unique(passthrough["uid"], return_index=True)
    place = np.minimum(np.searchsorted(uids, main["uid"]), max(len(uids) - 1, 0))
    if len(uids) != len(passthrough) or not len(uids) or (uids[place] != main["uid"]).any():
        lost = int((uids[place] != main["uid"]).sum()) if len(uids) else len(main)
        raise DataError(
            "CS003",
            f"the passthrough file does not fit {name}: {lost} of {len(main)} particles are not in it, "
            f"{len(passthrough) - len(uids)} of its uids are repeated",
        )
    rows = first[place]
    return {key: values[rows] for key, values in more.items()} | fields


def _float(values: NDArray) -> NDArray[np.float64]:
    return values.astype(np.float64)


def _texts(values: NDArray) -> list[str]:
    return [str(value) for value in values]


def _strings(values: NDArray) -> list[str]:
    return [
        value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
        for value in values.tolist()
    ]


def _alignment(fields: dict[str, NDArray]) -> str | None:
    if "alignments3D/pose" in fields:
        return "alignments3D"
    classes = sorted(
        {key.split("/")[0] for key in fields if key.startswith("alignments_class_") and key.endswith("/pose")}
    )
    return classes[0] if len(classes) == 1 else None


def _pose_columns(fields: dict[str, NDArray], prefix: str) -> dict[str, list[str]]:
    shifts = None
    size = fields.get(f"{prefix}/psize_A", fields.get("blob/psize_A"))
    if f"{prefix}/shift" in fields and size is not None:
        shifts = shift_from_cryosparc(_float(fields[f"{prefix}/shift"]), _float(size)[:, None])
    columns = relion.pose_columns(rotation_from_cryosparc(_float(fields[f"{prefix}/pose"])), shifts)
    for key, label in _FROM_ZERO.items():
        if f"{prefix}/{key}" in fields:
            columns[label] = _texts(fields[f"{prefix}/{key}"].astype(np.int64) + 1)
    return columns


def cs_to_star(path: Path | str, passthrough: Path | str | None = None) -> tuple[StarFile, tuple[str, ...]]:
    """RELION's optics and particle tables of a ``.cs`` file, and warnings about what they cannot carry.

    Parameters
    ----------
    path
        The particle file.
    passthrough
        The job's passthrough file, for fields that the first lacks.

    Raises
    ------
    FileError, DataError
        As ``read_cs`` and ``join``; ``CS004``: no particles, no image paths, or images of both signs.
    """
    path = Path(path)
    array = read_cs(path)
    fields = _fields(array)
    if passthrough is not None:
        fields = join(array, read_cs(passthrough), path.name)
    if not len(array):
        raise DataError("CS004", f"{path.name} has no rows: there are no particles", "check the job that wrote it")
    if "blob/path" not in fields or "blob/idx" not in fields:
        raise DataError(
            "CS004",
            f"{path.name} lacks blob/path and blob/idx, so it names no images",
            "give the job's passthrough file too",
        )
    names = [name.removeprefix(">") for name in _strings(fields["blob/path"])]
    columns = {
        relion.IMAGE: [f"{i + 1:06d}@{name}" for i, name in zip(fields["blob/idx"].tolist(), names, strict=True)]
    }
    columns |= {label: _texts(fields[key]) for key, label in _COPIED.items() if key in fields}
    columns |= {
        label: relion.texts(np.rad2deg(_float(fields[key]))) for key, label in _DEGREES.items() if key in fields
    }
    if "blob/shape" in fields:
        columns[relion.BOX] = _texts(fields["blob/shape"][:, -1])
    if "location/micrograph_path" in fields:
        columns["rlnMicrographName"] = [name.removeprefix(">") for name in _strings(fields["location/micrograph_path"])]
    sign = np.unique(fields.get("blob/sign", np.ones(1)))
    if len(sign) != 1:
        raise DataError(
            "CS004", f"{path.name} mixes images of both signs (blob/sign); expected one", "split the file by blob/sign"
        )
    if sign[0] < 0:
        columns[relion.SIGN] = ["-1"] * len(array)
    warnings = [f"{key} is not carried over" for key in _NOT_CARRIED if key in fields and np.any(fields[key] != 0)]
    prefix = _alignment(fields)
    if prefix is not None:
        columns |= _pose_columns(fields, prefix)
    elif any(key.startswith("alignments") and key.endswith("/pose") and fields[key].ndim == 2 for key in fields):
        warnings.append("the file has poses for several classes (alignments_class_*): none is used")
    if "ctf/exp_group_id" in fields:
        columns[relion.GROUP] = _texts(fields["ctf/exp_group_id"] + 1)
    table = StarTable(columns)
    optics, group = relion.make_optics(table)
    table = table.with_columns({relion.GROUP: group}, drop=relion.OPTICS_LABELS)
    return StarFile({"optics": optics, "particles": table}), tuple(warnings)
