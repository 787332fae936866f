"""MRC stacks and maps: every mode, lazy, strict about length."""

import time
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryorbit.errors import DataError, FileError, RunError
from cryorbit.io.mrc import MrcStack, StackWriter, read_header, read_volume, write_volume

MODES = {0: np.int8, 1: np.int16, 2: np.float32, 6: np.uint16, 12: np.float16}


def draw(count: int, box: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, (count, box, box)).astype(dtype)


def save_with_mrcfile(path: Path, data: np.ndarray, voxel: float = 1.5) -> None:
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(data)
        mrc.set_image_stack()
        mrc.voxel_size = voxel


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(MODES)), st.integers(1, 5), st.integers(1, 17), st.floats(0.25, 20), st.integers(0, 99))
def test_every_mode_and_size_reads_as_mrcfile_wrote_it(
    tmp_path_factory: pytest.TempPathFactory, mode: int, count: int, box: int, voxel: float, seed: int
) -> None:
    path = tmp_path_factory.mktemp("m") / "s.mrcs"
    data = draw(count, box, MODES[mode], seed)
    save_with_mrcfile(path, data, voxel)
    stack = MrcStack(path)
    assert (stack.count, stack.box, stack.header.mode) == (count, box, mode)
    assert stack.pixel_size == pytest.approx(voxel, rel=1e-6)
    order = np.random.default_rng(seed).permutation(count)
    images = stack.read(order)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, data[order].astype(np.float32))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 12), st.floats(0.5, 10))
def test_what_the_writer_wrote_piecewise_mrcfile_reads(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int], box: int, pixel: float
) -> None:
    path = tmp_path_factory.mktemp("w") / "s.mrcs"
    count = sum(pieces) + 1
    data = np.random.default_rng(1).normal(3, 2, (count, box, box)).astype(np.float32)
    with StackWriter(path, count, box, pixel) as writer:
        writer.write(data[:1])
        for start, size in zip(1 + np.cumsum([0, *pieces[:-1]]), pieces, strict=True):
            writer.write(data[start : start + size])
    with mrcfile.open(path) as mrc:
        np.testing.assert_array_equal(np.asarray(mrc.data).reshape(data.shape), data)
        assert mrc.is_image_stack() == (count > 1)
        assert mrc.voxel_size.x == pytest.approx(pixel, rel=1e-5)
        assert mrc.header.dmean == pytest.approx(data.mean(), rel=1e-4, abs=1e-4)
        assert mrc.header.rms == pytest.approx(data.std(), rel=1e-3, abs=1e-4)
    assert mrcfile.validate(path)


def test_volume_round_trip_and_header(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(size=(7, 7, 7)).astype(np.float32)
    write_volume(tmp_path / "v.mrc", volume, 2.25)
    data, pixel = read_volume(tmp_path / "v.mrc")
    np.testing.assert_array_equal(data, volume)
    assert pixel == pytest.approx(2.25)
    assert mrcfile.validate(tmp_path / "v.mrc")
    with mrcfile.open(tmp_path / "v.mrc") as mrc:
        assert mrc.is_volume()
        assert mrc.header.mz == 7


def test_big_endian_and_extended_header(tmp_path: Path) -> None:
    data = draw(2, 6)
    save_with_mrcfile(tmp_path / "s.mrcs", data)
    raw = bytearray((tmp_path / "s.mrcs").read_bytes())
    header = np.frombuffer(bytes(raw[:1024]), mrcfile.dtypes.HEADER_DTYPE).copy()
    header["nsymbt"] = 160
    swapped = header.astype(mrcfile.dtypes.HEADER_DTYPE.newbyteorder(">"))
    swapped["machst"] = (0x11, 0x11, 0, 0)
    (tmp_path / "big.mrcs").write_bytes(swapped.tobytes() + bytes(160) + data.astype(">f4").tobytes())
    stack = MrcStack(tmp_path / "big.mrcs")
    assert stack.header.offset == 1184
    np.testing.assert_array_equal(stack.read([1, 0]), data[[1, 0]])


def test_a_header_without_stamp_or_map_string_still_reads(tmp_path: Path) -> None:
    data = draw(2, 4)
    save_with_mrcfile(tmp_path / "s.mrcs", data)
    raw = bytearray((tmp_path / "s.mrcs").read_bytes())
    raw[208:216] = bytes(8)
    (tmp_path / "s.mrcs").write_bytes(bytes(raw))
    np.testing.assert_array_equal(MrcStack(tmp_path / "s.mrcs").read([0, 1]), data)


def test_a_stack_of_four_gigabytes_opens_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "huge.mrcs"
    save_with_mrcfile(path, draw(1, 128))
    raw = bytearray(path.read_bytes()[:1024])
    raw[8:12] = (65_536).to_bytes(4, "little")
    with path.open("wb") as stream:
        stream.write(raw)
        stream.truncate(1024 + 65_536 * 128 * 128 * 4)
    start = time.perf_counter()
    stack = MrcStack(path)
    opened = time.perf_counter() - start
    images = stack.read([0, 65_535])
    assert stack.count == 65_536
    assert opened < 0.05
    assert time.perf_counter() - start < 0.5
    assert images.shape == (2, 128, 128)


def test_a_truncated_stack_names_the_numbers(tmp_path: Path) -> None:
    save_with_mrcfile(tmp_path / "s.mrcs", draw(5, 8))
    raw = (tmp_path / "s.mrcs").read_bytes()
    (tmp_path / "s.mrcs").write_bytes(raw[: 1024 + 2 * 256 + 5])
    with pytest.raises(FileError, match=r"promises 5 images of 8 x 8 px \(mode 2\), the file holds 2") as caught:
        MrcStack(tmp_path / "s.mrcs")
    assert caught.value.code == "MRC003"


def test_nan_images_are_named_and_bad_indices_refused(tmp_path: Path) -> None:
    data = draw(6, 4)
    data[2, 0, 0], data[4, 1, 1] = np.nan, np.inf
    with StackWriter(tmp_path / "s.mrcs", 6, 4, 1.0) as writer:
        writer.write(data)
    stack = MrcStack(tmp_path / "s.mrcs")
    with pytest.raises(DataError, match=r"2 image\(s\) .*: 3, 5 \(counted from 1\)"):
        stack.read(np.arange(6))
    assert stack.read(np.arange(6), check=False).shape == (6, 4, 4)
    assert stack.read([]).shape == (0, 4, 4)
    for bad in (6, -1):
        with pytest.raises(DataError, match="images 1 to 6"):
            stack.read([bad])


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("short.mrc", b"abc", "MRC001"),
        ("noise.mrc", bytes(range(256)) * 8, "MRC002"),
        ("a.tif", b"II", "FILE003"),
        ("a.stk", b"", "FILE003"),
        ("a.hed", b"", "FILE003"),
    ],
)
def test_other_files_are_refused_by_code(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_header(tmp_path / name)
    assert caught.value.code == code


def test_missing_oblong_and_noncubic_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="FILE001"):
        MrcStack(tmp_path / "none.mrcs")
    save_with_mrcfile(tmp_path / "o.mrcs", np.zeros((2, 4, 6), np.float32))
    with pytest.raises(FileError, match="6 x 4 px, expected square"):
        MrcStack(tmp_path / "o.mrcs")
    with pytest.raises(FileError, match="MRC004"):
        read_volume(tmp_path / "o.mrcs")


def write_badly(path: Path, fault: str) -> None:
    images = np.zeros((2, 4, 4), np.float32)
    with StackWriter(path, 3, 4, 1.0) as writer:
        writer.write(images)
        if fault == "exception":
            raise KeyboardInterrupt
        if fault == "too many":
            writer.write(images)
        if fault == "wrong box":
            writer.write(np.zeros((1, 5, 5), np.float32))


@pytest.mark.parametrize("fault", ["exception", "too few", "too many", "wrong box"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, fault: str) -> None:
    with pytest.raises(KeyboardInterrupt if fault == "exception" else RunError):
        write_badly(tmp_path / "s.mrcs", fault)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "box", "pixel"),
    [
        ("EMD-3197.map", 20, 11.4),
        ("emd_3197.map.gz", 20, 11.4),
        ("betaGal.mrc", 100, 3.54),
        ("clean70SRibosome_vol_65p.mrc", 65, 0.0),
        ("10076_classE_32.mrc", 32, 1.0),
    ],
)
def test_third_party_maps(shared_data: Path, name: str, box: int, pixel: float) -> None:
    volume, size = read_volume(shared_data / "maps" / name)
    assert volume.shape == (box,) * 3
    assert size == pytest.approx(pixel, abs=1e-4)


@pytest.mark.parametrize("name", ["EMD-3001.map", "EMD-3001.map.bz2", "50S-vol.mrc"])
def test_third_party_maps_that_are_no_cubes(shared_data: Path, name: str) -> None:
    with pytest.raises(FileError, match="expected a cube"):
        read_volume(shared_data / "maps" / name)


def test_gzip_and_plain_maps_agree(shared_data: Path) -> None:
    plain, _ = read_volume(shared_data / "maps" / "EMD-3197.map")
    packed, _ = read_volume(shared_data / "maps" / "emd_3197.map.gz")
    np.testing.assert_array_equal(plain, packed)
