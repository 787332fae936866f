"""IDX files, the format of MNIST: big-endian arrays of bytes or numbers, plain or gzipped."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryorbit.errors import FileError

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_LARGEST = 2**31


def read_idx(path: Path | str) -> NDArray[np.generic]:
    """The array in an IDX file, in the machine's byte order.

    Raises
    ------
    FileError
        ``FILE001`` the file is missing; ``IDX001`` it is no IDX file, or damaged; ``IDX002`` it holds fewer or more numbers than it says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError("FILE001", f"{path} does not exist")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise FileError("IDX001", f"{path.name} is a damaged gzip file ({error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES or len(raw) < 4 + 4 * raw[3]:
        raise FileError(
            "IDX001", f"{path.name} is no IDX file", "expected MNIST's format, for example train-images-idx3-ubyte.gz"
        )
    shape = tuple(np.frombuffer(raw, ">u4", raw[3], 4).tolist())
    kind, start = np.dtype(_TYPES[raw[2]]), 4 + 4 * raw[3]
    promised = math.prod(shape) * kind.itemsize
    if promised > _LARGEST or len(raw) - start != promised:
        raise FileError("IDX002", f"{path.name} promises {promised:,} bytes of numbers and holds {len(raw) - start:,}")
    return np.frombuffer(raw, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))
