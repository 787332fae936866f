"""STAR files survive reading and writing to the last character."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryorbit.errors import FileError
from cryorbit.io.star import StarFile, StarTable, read_star, write_star

LABEL = st.from_regex(r"rln[A-Za-z][A-Za-z0-9]{0,12}", fullmatch=True)
ALPHABET = st.characters(
    min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f", exclude_categories=["C", "Zl", "Zp"]
)
VALUE = st.one_of(
    st.text(ALPHABET, max_size=12).filter(lambda s: not ("' " in s + " " and '" ' in s + " ")),
    st.floats(allow_nan=False, allow_infinity=False).map(str),
    st.sampled_from(
        ["", " ", "#", "_x", "data_a", "loop_", "a b", "it's", '"', "'", ";", "?", ".", "[1.0,2,3]", "$", "a#b"]
    ),
)


NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
TABLE = st.tuples(
    st.lists(LABEL, min_size=1, max_size=4, unique_by=str.lower),
    st.lists(st.lists(VALUE, min_size=4, max_size=4), max_size=4),
    st.booleans(),
    st.sampled_from([None, "30001", "50001"]),
)


def build(labels: list[str], rows: list[list[str]], is_loop: bool, version: str | None) -> StarTable:
    if not is_loop:
        rows = [*rows, ["0", "1", "2", "3"]][:1]
    return StarTable({label: [row[i] for row in rows] for i, label in enumerate(labels)}, is_loop, version)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAME, TABLE, min_size=1, max_size=3))
def test_read_undoes_write(tmp_path_factory: pytest.TempPathFactory, blocks: dict[str, tuple]) -> None:
    star = StarFile({name: build(*parts) for name, parts in blocks.items()})
    path = tmp_path_factory.mktemp("s") / "f.star"
    write_star(path, star)
    assert read_star(path) == star
    first = path.read_bytes()
    write_star(path, read_star(path))
    assert path.read_bytes() == first
    assert b"\r" not in first


def test_relion_layout(tmp_path: Path) -> None:
    star = StarFile({"optics": StarTable({"rlnOpticsGroup": ["1"], "rlnOpticsGroupName": ["a b"]})})
    write_star(tmp_path / "f.star", star)
    expected = '\n# version 50001\n\ndata_optics\n\nloop_ \n_rlnOpticsGroup #1 \n_rlnOpticsGroupName #2 \n1 "a b" \n \n'
    assert (tmp_path / "f.star").read_text() == expected


def test_blank_name_pairs_versions_and_windows_line_ends(tmp_path: Path) -> None:
    lines = ["# version 30001", "", "data_", "", "_rlnA 1.50 # comment", "_rlnB 'x y'", "", "# version 50001", "data_p"]
    text = "\r\n".join([*lines, "loop_", "_rlnC #1", "007", "1e5", ""])
    (tmp_path / "f.star").write_bytes(text.encode())
    star = read_star(tmp_path / "f.star")
    assert star.blocks == {
        "": StarTable({"rlnA": ["1.50"], "rlnB": ["x y"]}, False, "30001"),
        "p": StarTable({"rlnC": ["007", "1e5"]}, True, "50001"),
    }


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("data_\nloop_\n_a #1\n_b #2\n1 2\n3\n", "STAR003"),
        ("data_\nloop_\n_a #1\n'open\n", "STAR003"),
        ("hello\n", "STAR003"),
        ("", "STAR002"),
        ("# only a comment\n", "STAR002"),
        ("data_x\n_a 1\nloop_\n_b #1\n1\n", "STAR004"),
        ("data_x\nloop_\n_a #1\n1\n\nloop_\n_b #1\n1\n", "STAR004"),
    ],
)
def test_broken_files_name_code_and_line(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "f.star").write_text(text)
    with pytest.raises(FileError) as caught:
        read_star(tmp_path / "f.star")
    assert caught.value.code == code
    assert "f.star" in caught.value.message


def test_ragged_rows_give_the_line(tmp_path: Path) -> None:
    (tmp_path / "f.star").write_text("data_\nloop_\n_a #1\n_b #2\n1 'x y'\n3\n4 5\n")
    with pytest.raises(FileError, match=r"line 6: 1 value\(s\) in a loop of 2 columns"):
        read_star(tmp_path / "f.star")


def test_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "b.star").write_bytes(b"\xff\xfe\x00data_")
    with pytest.raises(FileError, match="STAR001"):
        read_star(tmp_path / "b.star")
    with pytest.raises(FileError, match="FILE001"):
        read_star(tmp_path / "none.star")


@pytest.mark.parametrize(
    ("table", "code"),
    [
        (StarTable({"a": ["1\n2"]}), "STAR005"),
        (StarTable({"a": ["""x' y" z"""]}), "STAR005"),
        (StarTable({"a": ["1"], "b": []}), "STAR006"),
        (StarTable({"a": ["1", "2"]}, is_loop=False), "STAR006"),
    ],
)
def test_what_star_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path, table: StarTable, code: str) -> None:
    with pytest.raises(FileError) as caught:
        write_star(tmp_path / "f.star", StarFile({"x": table}))
    assert caught.value.code == code
    assert not list(tmp_path.iterdir())


def test_table_edits_do_not_touch_the_original() -> None:
    table = StarTable({"a": ["1", "2", "3"], "b": ["x", "y", "z"]})
    assert table.rows([2, 0]).columns == {"a": ["3", "1"], "b": ["z", "x"]}
    assert table.with_columns({"b": ["p", "q", "r"], "c": ["", "", ""]}, drop=["a"]).columns == {
        "b": ["p", "q", "r"],
        "c": ["", "", ""],
    }
    assert table.columns == {"a": ["1", "2", "3"], "b": ["x", "y", "z"]}
    assert len(table) == 3
    assert "a" in table
