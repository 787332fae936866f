"""STAR files, lossless: every value stays the text it was (Hall, J. Chem. Inf. Comput. Sci. 31 (1991) 326).

Parsing is gemmi's CIF parser, which copes with every program's habits; writing is RELION's layout. Comments other
than RELION's
``# version`` lines are not kept.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gemmi

from cryorbit.errors import FileError
from cryorbit.io.atomic import write_text

NEW_VERSION = "50001"
_VERSION_OR_BLOCK = re.compile(r"^(?:# version (\d+)|[dD][aA][tT][aA]_(\S*))", re.MULTILINE)
_RESERVED = re.compile(r"^(?:data_|save_|loop_$|stop_$|global_$)", re.IGNORECASE)
_TOKEN = re.compile(r"""'.*?'(?=\s|$)|".*?"(?=\s|$)|\S+""")
_DATA_LINE = re.compile(r"^[ \t]*(?!loop_\s|data_)[^_#\s]", re.MULTILINE | re.IGNORECASE)
_PLAIN = re.compile(r"[^\s_#$'\";][^\s#]*\Z")


@dataclass(frozen=True)
class StarTable:
    """One block: labels without the leading underscore, each with its values as text.

    ``is_loop`` is false for a block of label-value pairs (one row). ``version`` is RELION's ``# version`` number, or
    None.
    """

    columns: dict[str, list[str]]
    is_loop: bool = True
    version: str | None = NEW_VERSION

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __contains__(self, label: object) -> bool:
        return label in self.columns

    def rows(self, indices: Sequence[int]) -> "StarTable":
        """The same columns with only the rows at ``indices``, in that order."""
        return StarTable(
            {name: [values[i] for i in indices] for name, values in self.columns.items()}, self.is_loop, self.version
        )

    def with_columns(self, columns: dict[str, list[str]], drop: Sequence[str] = ()) -> "StarTable":
        """A copy with ``columns`` set (in place where the label exists, appended where not) and ``drop`` left out."""
        kept = {name: values for name, values in self.columns.items() if name not in drop}
        return StarTable(kept | columns, self.is_loop, self.version)


@dataclass(frozen=True)
class StarFile:
    """Blocks in file order by name; the name is empty for a bare ``data_``."""

    blocks: dict[str, StarTable] = field(default_factory=dict)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FileError("FILE001", f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError("STAR001", f"{path.name} is no STAR file: byte {error.start} is not UTF-8 text") from error


def _to_ascii(text: str) -> tuple[str, str]:
    """Text with non-ASCII characters as ``mark<hex>;`` (gemmi parses ASCII), and the mark, absent from the text."""
    if text.isascii():
        return text, ""
    mark = "~u"
    while mark in text:
        mark += "u"
    return re.sub(r"[^\x00-\x7f]", lambda found: f"{mark}{ord(found[0]):x};", text), mark


def _unquoted(value: str, mark: str) -> str:
    plain = gemmi.cif.as_string(value) if value[0] in "'\";" else value
    return re.sub(mark + "([0-9a-f]+);", lambda found: chr(int(found[1], 16)), plain) if mark else plain


def _column(values: list[str], mark: str) -> list[str]:
    if len(set(values[:1000])) < 500:  # a column that repeats itself: equal texts share one object
        plain = {value: _unquoted(value, mark) for value in dict.fromkeys(values)}
        return list(map(plain.__getitem__, values))
    return [_unquoted(value, mark) if mark or value[0] in "'\";" else value for value in values]


def _table(block: gemmi.cif.Block, path: Path, version: str | None, mark: str) -> StarTable:
    loops: list[gemmi.cif.Loop] = [item.loop for item in block if item.loop is not None]
    pairs: list[Any] = [item.pair for item in block if item.pair is not None]
    if len(loops) > 1 or (loops and pairs):
        raise FileError(
            "STAR004",
            f'block "{block.name.strip()}" of {path.name} holds {len(loops)} loops and {len(pairs)} single '
            "values; expected one table",
            "give each table its own data_ block",
        )
    if not loops:
        return StarTable({label[1:]: [_unquoted(value, mark)] for label, value in pairs}, False, version)
    values, width = loops[0].values, loops[0].width()
    return StarTable({tag[1:]: _column(values[i::width], mark) for i, tag in enumerate(loops[0].tags)}, True, version)


def _ragged_row(text: str) -> str:
    """Line number and numbers of the first row that does not fit its loop; empty where every row does."""
    width = 0
    for number, line in enumerate(text.splitlines(), 1):
        tokens = _TOKEN.findall(line)
        if not tokens or tokens[0].startswith("#"):
            continue
        if tokens[0].startswith("_"):
            width += 1
        elif _RESERVED.match(tokens[0]):
            width = 0
        elif width and len(tokens) != width:
            return f"{number}: {len(tokens)} value(s) in a loop of {width} columns"
    return ""


def read_star(path: Path | str) -> StarFile:
    """Read a STAR file written by any program; CR+LF line ends are accepted.

    Raises
    ------
    FileError
        ``FILE001`` missing; ``STAR001`` not text; ``STAR002`` no block; ``STAR003`` syntax (ragged rows, unclosed
        quotes), with gemmi's line number; ``STAR004`` several tables in one block.
    """
    path = Path(path)
    text = _text(path)
    plain, mark = _to_ascii(text.replace("\r\n", "\n"))
    try:
        document = gemmi.cif.read_string(plain)
    except (ValueError, RuntimeError) as error:
        found = _ragged_row(text) or str(error).removeprefix("string:")
        raise FileError(
            "STAR003", f"{path.name} is no valid STAR file, line {found}", "a row may be cut off or a quote left open"
        ) from error
    rows = sum(item.loop.length() for block in document for item in block if item.loop is not None)
    if rows > len(_DATA_LINE.findall(plain)) and (found := _ragged_row(text)):
        raise FileError("STAR003", f"{path.name} is no valid STAR file, line {found}", "give each row its own line")
    if not len(document):
        raise FileError("STAR002", f"{path.name} holds no data_ block")
    versions: list[str | None] = []
    latest: str | None = None
    for match in _VERSION_OR_BLOCK.finditer(text):
        if match[1]:
            latest = match[1]
        else:
            versions.append(latest)
            latest = None
    if len(versions) != len(document):
        versions = [None] * len(document)
    return StarFile(
        {
            block.name.strip(): _table(block, path, version, mark)
            for block, version in zip(document, versions, strict=True)
        }
    )


def quoted(value: str) -> str:
    """A value as it stands in a STAR file.

    Raises
    ------
    FileError
        ``STAR005`` STAR cannot hold it; ``FILE004`` it is no text that UTF-8 can hold.
    """
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise FileError("FILE004", f"{value!a} is not UTF-8 text", "rename the file or folder") from error
    if _PLAIN.match(value) and not _RESERVED.match(value):
        return value
    if "\n" in value or "\r" in value:
        raise FileError("STAR005", f"a STAR value cannot hold a line break: {value!r}", "rename it")
    for mark in ('"', "'"):
        if not re.search(mark + r"(?:\s|\Z)", value):
            return mark + value + mark
    raise FileError("STAR005", f"a STAR value cannot hold both kinds of quotes before blanks: {value!r}", "rename it")


def _lines(name: str, table: StarTable) -> list[str]:
    lines = ["", f"# version {table.version}", ""] if table.version else [""]
    lines += [f"data_{name}", ""]
    if table.is_loop:
        lines += ["loop_ ", *(f"_{label} #{i} " for i, label in enumerate(table.columns, 1))]
        columns = [[quoted(value) for value in values] for values in table.columns.values()]
        lines += [" ".join(row) + " " for row in zip(*columns, strict=True)]
    else:
        lines += [f"_{label} {quoted(values[0])}" for label, values in table.columns.items()]
    return [*lines, " "]


def write_star(path: Path | str, star: StarFile) -> None:
    """Write a STAR file atomically, in RELION's layout, with LF line ends.

    Raises
    ------
    FileError
        ``STAR005`` a value that STAR cannot hold; ``STAR006`` columns of different length; ``FILE002`` the disk
        refuses.
    """
    for name, table in star.blocks.items():
        lengths = {len(values) for values in table.columns.values()}
        if len(lengths) != 1 or (not table.is_loop and lengths != {1}):
            raise FileError(
                "STAR006", f'the columns of block "{name}" have lengths {sorted(lengths)}; expected one length'
            )
    lines = [line for name, table in star.blocks.items() for line in _lines(name, table)]
    write_text(path, "\n".join(lines) + "\n")
