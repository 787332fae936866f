"""A file appears whole or not at all."""

from pathlib import Path

import pytest

from cryorbit.errors import FileError
from cryorbit.io.atomic import atomic_path, write_text


def test_the_file_gets_its_name_only_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    with atomic_path(final) as temporary:
        temporary.write_text("new")
        assert not final.exists()
        assert temporary.parent == final.parent
        assert temporary.suffix == ".txt"
        assert temporary.name.startswith(".")
    assert final.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def write_half(final: Path, error: BaseException) -> None:
    with atomic_path(final) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")
    with pytest.raises(error):
        write_half(final, error())
    assert final.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No space left") as caught:
        write_half(tmp_path / "a", OSError(28, "No space left on device"))
    assert caught.value.code == "FILE002"
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_an_empty_block_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"), atomic_path(tmp_path / "no" / "a"):
        pass
    with pytest.raises(FileError, match="nothing was written"), atomic_path(tmp_path / "a"):
        pass


def test_text_is_utf8_with_lf(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "å\nb\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa5\nb\n"
