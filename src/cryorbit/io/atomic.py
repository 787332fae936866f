"""Files appear under their final name whole, or not at all."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryorbit.errors import FileError

_UNFINISHED = re.compile(r"\.(.*)\.[0-9a-f]{8}\.part(\.[^.]*)?")


def unfinished(folder: Path) -> dict[Path, str]:
    """Files that :func:`atomic_path` was writing in ``folder`` when its process was killed, or is writing now, with their final names."""
    found = ((path, _UNFINISHED.fullmatch(path.name)) for path in folder.iterdir() if path.is_file())
    return {path: match[1] + (match[2] or "") for path, match in found if match}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the final name, on any exception it is removed.

    The temporary name keeps the suffix (so libraries that go by the suffix behave), starts with a dot, and lies in
    the same folder, so that the last step is one rename. A file that was there before stays untouched until then.

    Parameters
    ----------
    path
        The final name. Its folder must exist.

    Raises
    ------
    FileError
        ``FILE002``: the folder is missing or cannot be written, the disk is full, or the block left no file behind.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise FileError(
            "FILE002", f"cannot write {final}: the folder {final.parent} does not exist", "create the folder first"
        )
    temporary = final.with_name(f".{final.stem}.{secrets.token_hex(4)}.part{final.suffix}")
    try:
        yield temporary
        if not temporary.is_file():
            raise FileError("FILE002", f"nothing was written for {final}")
        _fsync(temporary)
        os.replace(temporary, final)
        with suppress(OSError):  # some network file systems cannot sync a folder
            _fsync(final.parent)
    except OSError as error:
        raise FileError("FILE002", f"cannot write {final}: {error}", "check space and permissions") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8, LF line ends) to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
