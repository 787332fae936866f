"""``cryorbit align2d`` and ``select``: a real process, files RELION can read, coded errors before anything is written."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from cryorbit.cli.align2d import align2d
from cryorbit.cli.select import select as select_verb
from cryorbit.errors import CryorbitError
from cryorbit.io.mrc import MrcStack
from cryorbit.io.particles import open_particles
from cryorbit.io.star import read_star
from cryorbit.pipeline.rundir import FOLDERS, OURS
from cryorbit.pipeline.selection import select
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation

QUICK = ["--set", "align2d.march_steps=6", "--set", "align2d.settle_steps=2", "--set", "align2d.batch=100"]


app = Typer()
app.command("align2d")(align2d)
app.command("select")(select_verb)


def call(*arguments: str | Path | float) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cryorbit", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("align2d")
    projector = make_projector(phantom(), 24, 5.0, fast=True)
    settings = SimulationSettings(200, 3.0, CTFSettings(), shift_sigma_px=1.0, seed=2)
    write_simulation(folder / "sim", projector, settings)
    done = process("align2d", folder / "sim/particles.star", "-o", folder / "run", "--classes", 3, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "classes" in done.stdout
    assert "Traceback" not in done.stderr
    return folder


def test_writes_what_it_promises(finished):
    run = finished / "run"
    written = {p.name for p in run.iterdir()}
    assert written >= {
        "classes.mrcs",
        "classes.csv",
        "classes_frc.csv",
        "classes.png",
        "features.npy",
        "particles.star",
        "metrics.json",
    }
    assert written <= {*OURS, *FOLDERS}  # --overwrite removes it
    features = np.load(run / "features.npy")
    assert features.shape == (200, 3)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    classes = read_star(run / "particles.star").blocks["particles"].columns["rlnClassNumber"]
    assert (
        np.mean(features.argmax(axis=1) + 1 == np.array(classes, dtype=int)) > 0.8
    )  # columns are in the order of the classes
    metrics = json.loads((run / "metrics.json").read_text())
    assert sum(metrics["class_sizes"]) == metrics["particles"] == 200
    assert metrics["class_sizes"] == sorted(metrics["class_sizes"], reverse=True)
    assert 5.0 < metrics["shared_reference_A"] < 60.0
    stack = MrcStack(run / "classes.mrcs")
    assert (stack.count, stack.box) == (3, 24)
    rows = list(csv.DictReader((run / "classes.csv").open()))
    assert [int(row["particles"]) for row in rows] == metrics["class_sizes"]
    assert (run / "classes.png").read_bytes().startswith(b"\x89PNG")


def test_particles_are_in_relions_terms(finished):
    table = read_star(finished / "run/particles.star").blocks["particles"]
    psi = np.array(table.columns["rlnAnglePsi"], dtype=float)
    assert np.ptp(psi) > 180
    assert not np.array(table.columns["rlnAngleTilt"], dtype=float).any()
    numbers = np.array(table.columns["rlnClassNumber"], dtype=int)
    assert set(numbers.tolist()) <= {1, 2, 3}
    particles = open_particles(finished / "run/particles.star")
    assert particles.read([0]).shape == (1, 24, 24)
    assert np.abs(particles.shifts).max() < 0.5 * 24 * 5.0


def test_a_finished_run_is_continued_and_another_refused(finished):
    before = (finished / "run/particles.star").read_bytes()
    call("align2d", finished / "sim/particles.star", "-o", finished / "run", "--classes", 3, *QUICK)
    assert (finished / "run/particles.star").read_bytes() == before
    with pytest.raises(CryorbitError, match=r"RUN002.*classes 3 there, 4 now") as refused:
        call("align2d", finished / "sim/particles.star", "-o", finished / "run", "-k", 4, "--memory", 1, *QUICK)
    assert "memory" not in str(refused.value)  # which another run may change


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere.star"], "FILE001"),
        (["{sim}", "--classes", "-1"], "CONF016"),
        (["{sim}", "--set", "align2d.decoy=2"], "CONF010"),
        (["{sim}", "--mask-diameter", "5000"], "CONF022"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(finished, tmp_path, arguments, code):
    filled = [a.replace("{sim}", str(finished / "sim/particles.star")) for a in arguments]
    with pytest.raises(CryorbitError, match=code):
        call("align2d", *filled, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_select_keeps_the_best_of_the_classes_named(finished, tmp_path):
    call("select", finished / "run", "-o", tmp_path / "some.star", "--classes", "1,2", "--keep", 0.5)
    every = read_star(finished / "run/particles.star").blocks["particles"].columns
    kept = read_star(tmp_path / "some.star").blocks["particles"].columns
    inside = [float(j) for j, k in zip(every["cryorbitJunkScore"], every["rlnClassNumber"], strict=True) if k in "12"]
    assert len(kept["rlnImageName"]) == round(0.5 * len(inside))
    assert set(kept["rlnClassNumber"]) <= {"1", "2"}
    assert max(map(float, kept["cryorbitJunkScore"])) <= sorted(inside)[round(0.5 * len(inside)) - 1]
    assert open_particles(tmp_path / "some.star").read([0]).shape == (1, 24, 24)  # paths still lead to the images


@pytest.mark.parametrize("named", [",", "1,,2", "1.5", "one"])
def test_classes_that_are_no_numbers_are_refused(finished, tmp_path, named):
    with pytest.raises(CryorbitError, match="CONF420"):
        call("select", finished / "run", "-o", tmp_path / "some.star", "--classes", named)
    assert not (tmp_path / "some.star").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"keep": 1.5}, "CONF421"),
        ({"keep": 0.0}, "CONF421"),
        ({"max_junk": float("nan")}, "CONF421"),
        ({"classes": [77]}, "CONF422"),
        ({"max_junk": -1e9}, "DATA421"),
        ({"keep": 0.5, "max_junk": 1.0}, "CONF421"),
        ({"source": "sim/particles.star"}, "DATA420"),
        ({"output": "run/particles.star", "overwrite": True}, "RUN047"),
        ({"output": "some.txt"}, "RUN047"),
    ],
)
def test_select_refuses(finished, tmp_path, changes, code):
    source = finished / str(changes.pop("source", "run/particles.star"))
    output = changes.pop("output", None)
    target = finished / output if output and output.startswith("run") else tmp_path / (output or "out.star")
    settings = {"classes": [], "keep": None} | changes
    with pytest.raises(CryorbitError, match=code):
        select(source, target, **settings)
    assert not list(tmp_path.iterdir())
