"""``cryorbit reconstruct`` through real processes: the whole road, interruption, refusals, and nothing half-written."""

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from processes import FINAL, command, cryorbit

from cryorbit.cli.reconstruct import configured
from cryorbit.errors import CryorbitError
from cryorbit.io.particles import open_particles
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.pipeline.rundir import written
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import SimulationSettings
from cryorbit.simulate.write import write_simulation

QUICK = [
    "--mask-diameter",
    "70",
    "--set",
    "abinitio.settle_steps=3",
    "--set",
    "abinitio.march_steps=12",
    "--set",
    "abinitio.heats=1",
    "--set",
    "abinitio.order=1",
    "--set",
    "refine.sweeps=2",
    "--set",
    "abinitio.batch=200",
]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sim") / "in"
    write_simulation(folder, make_projector(phantom(), 24, 4.0), SimulationSettings(count=400, snr_db=0.0, seed=2))
    return folder


@pytest.fixture(scope="module")
def finished(simulated: Path) -> Path:
    run = simulated.parent / "run [/x]"
    done = cryorbit("reconstruct", simulated / "particles.star", "--output", run, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "the half maps of 400 particles agree to" in done.stdout
    assert str(run / "map.mrc") in done.stdout  # brackets and all
    return run


def test_run_folder_is_complete_and_consistent(finished, simulated):
    for name in [*FINAL, "config.toml", "provenance.json", "history.jsonl"]:
        assert (finished / name).stat().st_size > 0, name
    assert {path for path in finished.rglob("*") if path.is_file()} <= set(written(finished))  # --overwrite removes it
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["particles"] == 400
    assert 8.0 <= metrics["resolution_A"] < 30.0
    with mrcfile.open(finished / "map.mrc") as stream:
        assert stream.data.shape == (24, 24, 24)
        assert float(stream.voxel_size.x) == pytest.approx(4.0)
        assert np.isfinite(stream.data).all()
    ours = open_particles(finished / "particles.star")
    assert len(ours) == 400
    assert ours.rotations is not None
    assert sorted(np.bincount(ours.half_set)[1:]) == [200, 200]
    np.testing.assert_array_equal(ours.read([3]), open_particles(simulated / "particles.star").read([3]))
    steps = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert {s["stage"] for s in steps} == {"abinitio", "refine"}


def test_recovers_the_phantom(finished, simulated):
    done = cryorbit(
        "evaluate", finished, "--truth", simulated / "truth.mrc", "--truth-poses", simulated / "truth.star", "--json"
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["poses"]["median_deg"] < 6.0
    assert values["correlation"] > 0.9


def test_same_command_again_repeats_nothing_and_other_settings_are_refused(finished, simulated):
    before = (finished / "history.jsonl").read_text()
    again = cryorbit("reconstruct", simulated / "particles.star", "--output", finished, *QUICK)
    assert again.returncode == 0, again.stderr
    assert (finished / "history.jsonl").read_text() == before
    other = cryorbit("reconstruct", simulated / "particles.star", "--output", finished, *QUICK, "--seed", "1")
    assert other.returncode == 1
    assert "RUN002" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_killed_run_continues_to_the_same_result(finished, simulated, tmp_path, number):
    run = tmp_path / "run"
    arguments = command("reconstruct", simulated / "particles.star", "--output", run, *QUICK)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (run / "history.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), errors
    assert not [name for name in FINAL if (run / name).exists()]
    assert subprocess.run(arguments, capture_output=True, timeout=600, check=False).returncode == 0
    with mrcfile.open(run / "map.mrc") as ours, mrcfile.open(finished / "map.mrc") as theirs:
        np.testing.assert_array_equal(ours.data, theirs.data)


def test_folder_that_cannot_be_written(simulated, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = cryorbit("reconstruct", simulated / "particles.star", "--output", tmp_path / "file" / "run", *QUICK)
    assert done.returncode == 1
    assert "RUN003" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("precious")
    config = configured(simulated / "particles.star", None, QUICK[3::2], mask_diameter=70.0)
    with pytest.raises(CryorbitError, match="RUN001"):
        reconstruct(config, tmp_path / "theirs", overwrite=True)
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "precious"


def test_full_disk_leaves_no_broken_file(simulated, tmp_path):
    """Files over 60 kB cannot be written: checkpoints fail first, with one message and nothing under a final name."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    run = tmp_path / "run"
    done = cryorbit("reconstruct", simulated / "particles.star", "--output", run, *QUICK, preexec_fn=limit)
    assert done.returncode == 1
    assert "error" in done.stderr
    assert "Traceback" not in done.stderr
    left = [p.name for p in run.rglob("*") if p.is_file()]
    assert not set(left) & {*FINAL, "abinitio.safetensors"}
    assert all(not name.endswith(".tmp") for name in left), left


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"mask_diameter": 900.0}, "CONF022"),
        ({"symmetry": "Q7"}, "CONF112"),
        ({"preset": "speedy"}, "CONF014"),
        ({"device": "quantum"}, "CONF020"),
        ({"volume": "mesh"}, "CONF031"),
        ({"refine": {"defocus_range": -5.0}}, "CONF016"),
    ],
)
def test_bad_settings_are_refused_before_any_work(simulated, tmp_path, arguments, code):
    with pytest.raises(CryorbitError, match=code) as refused:
        reconstruct(configured(simulated / "particles.star", None, [], **arguments), tmp_path / "run")
    assert refused.value.hint
    assert not (tmp_path / "run").exists()


def test_an_unknown_setting_is_one_message(simulated, tmp_path):
    bad = ("--set", "abinitio.bach=3")
    done = cryorbit("reconstruct", simulated / "particles.star", "--output", tmp_path / "run", *bad)
    assert done.returncode == 1
    assert "CONF010" in done.stderr
    assert "hint" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_missing_input(tmp_path):
    done = cryorbit("reconstruct", tmp_path / "nowhere.star", "--output", tmp_path / "run")
    assert done.returncode == 1
    assert "nowhere.star" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("typed", "kept"), [("AUTO", "auto"), (" c 4", "C4"), ("i2", "I2")])
def test_a_symmetry_has_one_spelling(typed: str, kept: str) -> None:
    assert configured(Path("x.star"), None, [], symmetry=typed).symmetry == kept


def test_moments_are_refused_where_an_axis_is_imposed(simulated, tmp_path):
    star = simulated / "particles.star"
    done = cryorbit("reconstruct", star, "-o", tmp_path / "run", "--init", "moments", "--symmetry", "C2")
    assert done.returncode != 0
    assert "CONF113" in done.stderr
    assert not (tmp_path / "run").exists()
