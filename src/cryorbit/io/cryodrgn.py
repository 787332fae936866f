"""cryoDRGN's ``poses.pkl`` and ``ctf.pkl``, read without executing anything in them.

A pickle is a program. The reader here lets it build numpy arrays and nothing else: any other name it asks for is
refused.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from cryorbit.conventions import rotation_from_cryodrgn, shift_from_cryodrgn
from cryorbit.errors import DataError, FileError

_ALLOWED = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_CTF_FIELDS = (
    "defocus_u",
    "defocus_v",
    "defocus_angle",
    "voltage",
    "spherical_aberration",
    "amplitude_contrast",
    "phase_shift",
)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that may build numpy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _load(path: Path) -> object:
    try:
        with path.open("rb") as stream:
            return _ArraysOnly(stream).load()
    except OSError as error:
        raise FileError("FILE001", f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything at all
        raise FileError(
            "PKL001",
            f"{path.name} is no pickle of numpy arrays: {error}",
            "expected cryoDRGN's poses.pkl or ctf.pkl; nothing in the file was executed",
        ) from error


def read_arrays(path: Path | str) -> list[NDArray]:
    """The numpy arrays of a pickle: one array, or a tuple or list of them.

    Raises
    ------
    FileError
        ``FILE001`` missing; ``PKL001`` no pickle, or one that holds anything but arrays of numbers.
    """
    path = Path(path)
    value = _load(path)
    parts = list(value) if isinstance(value, tuple | list) else [value]
    arrays = [part for part in parts if isinstance(part, np.ndarray) and part.dtype.kind in "fiu"]
    if not parts or len(arrays) != len(parts):
        raise FileError("PKL001", f"{path.name} holds a {type(value).__name__}, expected numpy arrays of numbers")
    return arrays


def read_cryodrgn_poses(
    path: Path | str, box: int, pixel_size: float
) -> tuple[Float[np.ndarray, "n 3 3"], Float[np.ndarray, "n 2"] | None]:
    """Poses of cryoDRGN's ``poses.pkl``.

    Parameters
    ----------
    path
        Pickle of (rotations, translations), or of rotations alone.
    box, pixel_size
        Of the images: px, and angstrom per pixel.

    Returns
    -------
    Rotations (N, 3, 3) and shifts (N, 2) in angstrom (None where the file has rotations alone), in our conventions.

    Raises
    ------
    FileError
        ``PKL001``; ``PKL002``: the arrays are no rotations and translations.
    """
    arrays = read_arrays(path)
    rotations = arrays[0]
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3) or len(arrays) > 2:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise FileError(
            "PKL002",
            f"{Path(path).name} holds arrays of shape {shapes}; expected (N, 3, 3) rotations and (N, 2) translations",
        )
    rotations = rotation_from_cryodrgn(rotations.astype(np.float64))
    error = np.abs(rotations @ rotations.swapaxes(1, 2) - np.eye(3)).max(initial=0.0)
    if not error < 1e-3 or (np.linalg.det(rotations) < 0).any():
        raise DataError("PKL003", f"the rotations of {Path(path).name} are off orthogonality by {error:.2g}, or mirror")
    if len(arrays) == 1:
        return rotations, None
    if arrays[1].shape != (len(rotations), 2):
        raise FileError(
            "PKL002", f"{Path(path).name} holds {len(rotations)} rotations, but translations of shape {arrays[1].shape}"
        )
    return rotations, shift_from_cryodrgn(arrays[1].astype(np.float64), box, pixel_size)


def read_cryodrgn_ctf(path: Path | str) -> tuple[dict[str, Float[np.ndarray, " n"]], int, float]:
    """CTF parameters of cryoDRGN's ``ctf.pkl``.

    Parameters
    ----------
    path
        Pickle of an (N, 9) array: box, pixel size, defocus U, V, angle (degrees), kV, Cs, amplitude contrast, phase
        shift (degrees).

    Returns
    -------
    CTFParams fields (angles in radian; B-factor 0, scale 1), the box in pixels, and the pixel size in angstrom.

    Raises
    ------
    FileError
        ``PKL001``; ``PKL002``: another shape.
    """
    arrays = read_arrays(path)
    table = arrays[0]
    if len(arrays) != 1 or table.ndim != 2 or table.shape[1] != 9 or not len(table):
        raise FileError(
            "PKL002", f"{Path(path).name} holds an array of shape {table.shape}; expected (N, 9) CTF parameters"
        )
    table = table.astype(np.float64)
    if not np.isfinite(table).all() or np.ptp(table[:, :2], axis=0).max() > 1e-3:
        raise DataError("PKL003", f"{Path(path).name} holds NaN, or several box or pixel sizes; expected one")
    fields = dict(zip(_CTF_FIELDS, table[:, 2:].T, strict=True))
    fields["defocus_angle"] = np.deg2rad(fields["defocus_angle"])
    fields["phase_shift"] = np.deg2rad(fields["phase_shift"])
    return (
        fields | {"bfactor": np.zeros(len(table)), "scale": np.ones(len(table))},
        int(table[0, 0]),
        float(table[0, 1]),
    )


def read_index(path: Path | str) -> Int[np.ndarray, " n"]:
    """A selection of particles (cryoDRGN's ``ind.pkl``): whole numbers from 0."""
    arrays = read_arrays(path)
    if len(arrays) != 1 or arrays[0].ndim != 1 or arrays[0].dtype.kind not in "iu":
        raise FileError("PKL002", f"{Path(path).name} holds no one-dimensional array of whole numbers")
    return arrays[0].astype(np.int64)
