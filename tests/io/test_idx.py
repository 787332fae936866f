"""IDX files: any array comes back, and what is none is refused."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cryorbit.errors import FileError
from cryorbit.io.idx import read_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def packed(values: np.ndarray) -> bytes:
    """The array as the format's author writes it: magic, sides, numbers, all big-endian."""
    head = bytes([0, 0, CODES[values.dtype.str[1:]], values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(values.dtype.newbyteorder(">")).tobytes()


@given(
    values=st.sampled_from(sorted(CODES)).flatmap(
        lambda kind: arrays.arrays(
            np.dtype(kind),
            arrays.array_shapes(max_dims=3, max_side=5),
            elements={"allow_nan": False} if kind[0] == "f" else None,
        )
    ),
    zipped=st.booleans(),
)
def test_any_array_comes_back(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, zipped: bool) -> None:
    path = tmp_path_factory.mktemp("idx") / "x"
    path.write_bytes(gzip.compress(packed(values)) if zipped else packed(values))
    found = read_idx(path)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "IDX001"),
        (b"\0\0\x08\x03\0\0", "IDX001"),
        (b"PK\x03\x04 and more of it", "IDX001"),
        (b"\0\0\x07\x01\0\0\0\x01x", "IDX001"),
        (b"\x1f\x8b broken", "IDX001"),
        (packed(np.zeros((2, 3), np.uint8))[:-1], "IDX002"),
        (packed(np.zeros((2, 3), np.uint8)) + b"!", "IDX002"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "IDX002"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path: Path, raw: bytes, code: str) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(FileError, match=code):
        read_idx(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="FILE001"):
        read_idx(tmp_path / "nowhere")


def test_mnist_is_mnist(shared_data: Path) -> None:
    digits = read_idx(shared_data / "mnist/t10k-images-idx3-ubyte.gz")
    labels = read_idx(shared_data / "mnist/t10k-labels-idx1-ubyte.gz")
    assert digits.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
