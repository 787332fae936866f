"""MRC maps and image stacks (MRC2014, mode 2), written atomically."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float
from mrcfile.dtypes import HEADER_DTYPE

from cryorbit.errors import RunError
from cryorbit.io.atomic import atomic_path

HEADER_BYTES = 1024


def _header(
    shape: tuple[int, int, int], pixel_size: float, is_volume: bool, stats: tuple[float, float, float, float]
) -> bytes:
    header = np.zeros(1, HEADER_DTYPE.newbyteorder("<"))[0]
    nz, ny, nx = shape
    mz = nz if is_volume else 1
    for key, value in {
        "nx": nx,
        "ny": ny,
        "nz": nz,
        "mode": 2,
        "mx": nx,
        "my": ny,
        "mz": mz,
        "mapc": 1,
        "mapr": 2,
        "maps": 3,
    }.items():
        header[key] = value
    header["cella"] = (nx * pixel_size, ny * pixel_size, mz * pixel_size)
    header["cellb"] = (90, 90, 90)
    header["dmin"], header["dmax"], header["dmean"], header["rms"] = stats
    header["ispg"] = 1 if is_volume else 0
    header["nversion"] = 20141
    header["map"] = b"MAP "
    header["machst"] = (0x44, 0x44, 0, 0)
    header["nlabl"] = 1
    header["label"][0] = b"cryorbit"
    return header.tobytes()


def write_volume(path: Path | str, data: Float[np.ndarray, "d d d"], pixel_size: float) -> None:
    """Write a cubic map, float32, atomically.

    Parameters
    ----------
    path
        Final name; its folder must exist.
    data
        (D, D, D) in zyx order.
    pixel_size
        Voxel size in angstrom.
    """
    volume = np.ascontiguousarray(data, dtype="<f4")
    stats = (
        float(volume.min()),
        float(volume.max()),
        float(volume.mean(dtype=np.float64)),
        float(volume.std(dtype=np.float64)),
    )
    depth, height, width = volume.shape
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(_header((depth, height, width), pixel_size, True, stats))
        stream.write(volume.tobytes())


class StackWriter:
    """Writes a float32 image stack piece by piece; the file gets its name when all images are there (context manager).

    Parameters
    ----------
    path
        Final name; its folder must exist.
    count, box
        Number of images, and their side in pixels.
    pixel_size
        Angstrom per pixel.

    Raises
    ------
    RunError
        ``RUN010``: more or fewer than ``count`` images were written.
    """

    def __init__(self, path: Path | str, count: int, box: int, pixel_size: float) -> None:
        self.path, self.count, self.box, self.pixel_size = Path(path), count, box, pixel_size
        self.written = 0
        self._low, self._high, self._sum, self._square = np.inf, -np.inf, 0.0, 0.0

    def __enter__(self) -> "StackWriter":
        self._stack = ExitStack()
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._stream = stack.enter_context(temporary.open("wb"))
            self._stream.write(bytes(HEADER_BYTES))
            self._stack = stack.pop_all()
        return self

    def write(self, images: Float[np.ndarray, "m d d"]) -> None:
        """Append (m, D, D) images."""
        block = np.ascontiguousarray(images, dtype="<f4")
        if block.shape[1:] != (self.box, self.box) or self.written + len(block) > self.count:
            raise RunError(
                "RUN010",
                f"{len(block)} images of shape {block.shape[1:]} do not fit {self.path.name}: "
                f"{self.written} of {self.count} images of {self.box} px are written",
            )
        if not len(block):
            return
        self._stream.write(block.tobytes())
        self.written += len(block)
        self._low, self._high = min(self._low, float(block.min())), max(self._high, float(block.max()))
        self._sum += float(block.sum(dtype=np.float64))
        self._square += float(np.square(block, dtype=np.float64).sum())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self.written != self.count:
                raise RunError("RUN010", f"{self.written} of {self.count} images were written to {self.path.name}")
            samples = max(1, self.count * self.box**2)
            mean = self._sum / samples
            deviation = float(np.sqrt(max(0.0, self._square / samples - mean**2)))
            stats = (self._low, self._high, mean, deviation)
            self._stream.seek(0)
            self._stream.write(_header((self.count, self.box, self.box), self.pixel_size, False, stats))
