"""cryorbit inspect: words, JSON and exit code."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from cryorbit.cli.inspect import inspect
from cryorbit.io.mrc import StackWriter

app = typer.Typer()
app.command()(inspect)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    with StackWriter(tmp_path / "s.mrcs", 30, 16, 2.5) as writer:
        writer.write(np.random.default_rng(0).normal(size=(30, 16, 16)))
    return tmp_path / "s.mrcs"


def test_words(stack: Path) -> None:
    result = run(stack)
    assert result.exit_code == 0
    lines = {" ".join(line.split()) for line in result.output.splitlines()}
    assert {"particles 30", "box px 16", "pixel size A 2.5", "images: sampled 30", "usable"} <= lines
    assert "warning: no CTF: rlnDefocusU" in result.output
    assert "hint: import or estimate the CTF first" in result.output


def test_json(stack: Path) -> None:
    result = run(stack, "--json", "--pixel-size", 1.25)
    assert result.exit_code == 0
    answer = json.loads(result.output)
    assert answer["kind"] == "particles"
    assert answer["usable"] is True
    assert answer["facts"]["particles"] == 30
    assert answer["facts"]["pixel_size_A"] == 1.25
    assert {finding["level"] for finding in answer["findings"]} == {"warning", "note"}


def test_errors_give_exit_code_one_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "cut.mrcs").write_bytes(b"abc")
    for path, code in ((tmp_path / "none.star", "FILE001"), (tmp_path / "cut.mrcs", "MRC001")):
        result = run(path)
        assert result.exit_code == 1
        assert f"error {code}" in result.output
        assert "not usable as it is" in result.output
        assert "Traceback" not in result.output
        assert json.loads(run(path, "--json").output)["findings"][0]["code"] == code


def test_datadir(stack: Path, tmp_path: Path) -> None:
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "p.star").write_text("data_\nloop_\n_rlnImageName #1\n3@elsewhere/x/s.mrcs\n")
    assert run(folder / "p.star").exit_code == 1
    assert run(folder / "p.star", "--datadir", tmp_path).exit_code == 0


def test_brackets_in_names_are_printed_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a[red]b.star"
    path.write_text("data_x\nloop_\n_a #1\n1\n")
    assert "a[red]b.star" in run(path).output


def test_third_party_files(shared_data: Path) -> None:
    good = run(shared_data / "particles_real/aspire_sample17/sample_particles_relion31.star")
    assert good.exit_code == 0
    assert "images: protein" in good.output
    bad = run(shared_data / "metadata/drgnai/00256_Ribosomes_1.70A.mrcs", "--json")
    assert bad.exit_code == 1
    assert "promises 11029 images" in json.loads(bad.output)["findings"][0]["message"]
