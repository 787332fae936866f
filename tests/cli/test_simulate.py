"""``cryorbit simulate`` as a user runs it: a process of its own, files read back."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from cryorbit.cli.simulate import simulate
from cryorbit.errors import CryorbitError
from cryorbit.io.mrc import read_volume, write_volume
from cryorbit.io.particles import open_particles
from cryorbit.simulate.particles import CTFSettings, simulate_particles
from cryorbit.simulate.phantom import phantom

SMALL = ["--model", "phantom", "--count", "70", "--box", "32", "--pixel-size", "3"]
COMMAND = [sys.executable, "-c", "import typer; from cryorbit.cli.simulate import simulate; typer.run(simulate)"]

app = Typer()
app.command()(simulate)


def run(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulation by a real process."""
    path = tmp_path_factory.mktemp("simulated") / "sim"
    options = ["--ctf", "--astigmatism", "500", "--shift-sigma", "2", "--snr-db", "3", "--seed", "4"]
    command = [*COMMAND, *SMALL, *options, "--output", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "70 images of 32 px at 3 A, SNR 3 dB" in result.stdout
    return path


def test_files_hold_what_memory_holds(folder: Path) -> None:
    expected = simulate_particles(
        phantom(),
        count=70,
        box=32,
        pixel_size=3.0,
        snr_db=3.0,
        ctf=CTFSettings(astigmatism=500.0),
        shift_sigma_px=2.0,
        seed=4,
    )
    truth = open_particles(folder / "truth.star")
    np.testing.assert_allclose(truth.read(np.arange(70)), expected.images.numpy(), atol=1e-5)
    np.testing.assert_allclose(truth.rotations, expected.poses.rotations.numpy(), atol=1e-6)
    np.testing.assert_allclose(truth.shifts, expected.poses.shifts.numpy(), atol=1e-5)
    assert truth.ctf is not None
    for name, values in truth.ctf.items():
        np.testing.assert_allclose(values, getattr(expected.ctf, name).numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
    volume, pixel_size = read_volume(folder / "truth.mrc")
    np.testing.assert_allclose(volume, expected.volume.data.numpy(), atol=1e-6)
    assert pixel_size == pytest.approx(3.0)


def test_the_input_of_a_reconstruction_has_no_poses(folder: Path) -> None:
    particles = open_particles(folder / "particles.star")
    assert (len(particles), particles.box, particles.pixel_size) == (70, 32, pytest.approx(3.0))
    assert particles.rotations is None
    assert particles.shifts is None
    assert particles.ctf is not None
    text = (folder / "particles.star").read_text()
    assert "rlnAngleRot" not in text
    assert "rlnOrigin" not in text


def test_record_states_settings_and_snr(folder: Path) -> None:
    record = json.loads((folder / "simulation.json").read_text())
    assert record["settings"]["ctf"]["astigmatism"] == 500
    assert record["settings"]["seed"] == 4
    assert record["snr_db"] == pytest.approx(3.0, abs=1e-3)
    assert "variance" in record["snr_definition"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "particles.mrcs",
        "particles.star",
        "simulation.json",
        "truth.mrc",
        "truth.star",
    ]


def test_a_finished_simulation_is_kept_unless_told(folder: Path) -> None:
    before = (folder / "particles.mrcs").read_bytes()
    with pytest.raises(CryorbitError) as caught:
        run(*SMALL, "--output", folder)
    assert caught.value.code == "RUN301"
    assert (folder / "particles.mrcs").read_bytes() == before


def test_overwrite_and_unfinished(tmp_path: Path) -> None:
    run(*SMALL, "--output", tmp_path / "a", "--seed", "1")
    first = (tmp_path / "a" / "particles.mrcs").read_bytes()
    run(*SMALL, "--output", tmp_path / "a", "--seed", "2", "--overwrite")
    assert (tmp_path / "a" / "particles.mrcs").read_bytes() != first
    (tmp_path / "a" / "particles.star").unlink()  # as if stopped before the end
    run(*SMALL, "--output", tmp_path / "a", "--seed", "1")
    assert (tmp_path / "a" / "particles.mrcs").read_bytes() == first
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CryorbitError) as caught:
        run(*SMALL, "--output", tmp_path / "file")
    assert caught.value.code == "RUN302"


def test_no_noise_cone_and_slices(tmp_path: Path) -> None:
    run(*SMALL, "--output", tmp_path / "b", "--noise", "none", "--orientations", "cone", "--fast")
    truth = open_particles(tmp_path / "b" / "truth.star")
    assert truth.rotations is not None
    assert truth.rotations[:, 2, 2].min() > np.cos(np.deg2rad(15)) - 1e-6
    assert truth.ctf is None
    assert truth.read(np.arange(70)).var(axis=(1, 2)).mean() == pytest.approx(1.0, rel=1e-3)
    assert json.loads((tmp_path / "b" / "simulation.json").read_text())["snr_db"] is None


def test_a_map_gives_its_box_and_pixel_size(tmp_path: Path) -> None:
    data = torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(0)).numpy()
    write_volume(tmp_path / "map.mrc", data, 2.5)
    run("--model", tmp_path / "map.mrc", "--count", "5", "--output", tmp_path / "c")
    particles = open_particles(tmp_path / "c" / "particles.star")
    assert (particles.box, particles.pixel_size) == (24, pytest.approx(2.5))


def test_a_bad_model_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CryorbitError) as caught:
        run("--model", tmp_path / "none.pdb", "--output", tmp_path / "d")
    assert caught.value.code == "FILE301"
    assert not (tmp_path / "d").exists()
