"""Tables of shifted observations, one row each: ``.npy`` (mapped, not loaded), ``.npz``, ``.csv``; and files of a signal and a density."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cryorbit.errors import DataError, FileError

FEWEST_ROWS, FEWEST_COLUMNS = 2, 4
_BLOCK = 65536


def _load(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[np.generic]]:
    """The arrays ``names`` of a file; a file that holds a single array gives it the first name."""
    if not path.is_file():
        raise FileError("FILE001", f"{path} does not exist or is no file", "check the path")
    try:
        if path.suffix == ".csv":
            return {names[0]: _table(path)}
        if path.suffix in (".npy", ".npz"):
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(loaded, np.ndarray):  # whatever its name: the content says what it is
                return {names[0]: loaded}
            with loaded as archive:
                if len(archive.files) == 1:
                    return {names[0]: archive[archive.files[0]]}
                return {name: archive[name] for name in names}
    except (ValueError, OSError, EOFError, BadZipFile, KeyError) as error:
        raise FileError(
            "FILE013",
            f"{path} cannot be read as {', '.join(names)}: {error}",
            "see `cryorbit mra --help` for the layout",
        ) from error
    raise FileError("FILE003", f"{path}: {path.suffix or 'no suffix'} is not read", "give .npy, .npz or .csv")


def _table(path: Path) -> NDArray[np.float64]:
    """Numbers of a ``.csv``, without the line of column names it may begin with."""
    with path.open(encoding="utf-8-sig") as stream:
        first = stream.readline().strip().split(",")
    named = not any(_is_number(word) for word in first)
    return np.loadtxt(path, delimiter=",", ndmin=2, dtype=np.float64, skiprows=int(named), encoding="utf-8-sig")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_observations(path: Path | str) -> NDArray[np.floating]:
    """Observations (N, L), one per row, checked; of a ``.npz`` its only array or the one named ``observations``.

    A ``.npy`` file stays on disk: slices of the result are read when they are taken.

    Raises
    ------
    FileError
        FILE001 missing, FILE003 of another kind, FILE013 not an array (or a ragged or worded ``.csv``).
    DataError
        DATA050 not a table of real numbers, DATA051 too few rows or columns, DATA052 a value that is not finite (the first row is named).
    """
    table = _load(Path(path), ("observations",))["observations"]
    if table.ndim != 2 or table.dtype.kind not in "fiu":
        raise DataError(
            "DATA050",
            f"{path} holds {table.dtype} of shape {table.shape}, expected real numbers of shape (observations, samples)",
        )
    if table.shape[0] < FEWEST_ROWS or table.shape[1] < FEWEST_COLUMNS:
        raise DataError(
            "DATA051",
            f"{path} holds {table.shape[0]} observations of {table.shape[1]} samples, expected at least "
            f"{FEWEST_ROWS} of at least {FEWEST_COLUMNS}",
            "one observation per row",
        )
    for start in range(0, len(table), _BLOCK):
        bad = ~np.isfinite(table[start : start + _BLOCK]).all(axis=1)
        if bad.any():
            raise DataError(
                "DATA052",
                f"{path}: observation {start + int(bad.argmax()) + 1} holds a value that is not finite",
                "remove the row",
            )
    return table if np.issubdtype(table.dtype, np.floating) else table.astype(np.float32)  # type: ignore[return-value]


def read_pair(path: Path | str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``signal`` and ``density`` of a ``.npz`` file, (L,) each.

    Raises
    ------
    FileError
        FILE001, FILE003, FILE013 as above.
    DataError
        DATA050 not two rows of finite real numbers of one length.
    """
    arrays = _load(Path(path), ("signal", "density"))
    shapes = {name: array.shape for name, array in arrays.items()}
    good = len(shapes) == 2 and len(set(shapes.values())) == 1 and all(array.ndim == 1 for array in arrays.values())
    if not good or any(a.dtype.kind not in "fiu" or not np.isfinite(a).all() for a in arrays.values()):
        raise DataError("DATA050", f"{path} holds {shapes}, expected finite signal and density of one length")
    density = arrays["density"]
    if not arrays["signal"].any() or density.min() < -0.1 * density.max() or not abs(float(density.sum()) - 1) < 1e-3:
        raise DataError(
            "DATA050",
            f"{path}: the density goes from {density.min():.3g} to {density.max():.3g} and sums to {density.sum():.4g}, expected a signal "
            "that is not zero and a density that sums to 1, negative by no more than an estimate's errors",
            "cryorbit simulate-mra writes such a file as truth.npz",
        )
    return arrays["signal"].astype(np.float64), arrays["density"].astype(np.float64)
