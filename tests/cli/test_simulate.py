"""``cryorbit simulate`` as a user runs it: a process of its own, files read back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from cryorbit.cli.simulate import simulate
from cryorbit.errors import CryorbitError
from cryorbit.io.mrc import read_volume, write_volume
from cryorbit.io.particles import open_particles
from cryorbit.simulate.particles import CTFSettings, make_projector, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import SimulationSettings
from cryorbit.simulate.write import FILES, _swap, write_simulation

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


def test_counts(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    options = ["--noise", "poisson", "--dose", "2", "--snr-db", "-9", "--output", str(path)]
    result = subprocess.run([*COMMAND, *SMALL, *options], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "SNR -9 dB, 2 electrons per pixel, contrast 0.251" in result.stdout
    images = open_particles(path / "particles.star").read(np.arange(70))
    np.testing.assert_array_equal(images, images.round())
    assert images[:, :2].mean() == pytest.approx(2.0, abs=0.1)
    record = json.loads((path / "simulation.json").read_text())
    assert (record["settings"]["noise"], record["settings"]["dose"], record["noise_variance"]) == ("poisson", 2.0, 2.0)


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ("--pixel-size inf", "CONF336", "pixel size"),
        ("--pixel-size 0", "CONF336", "pixel size"),
        ("--pixel-size 1e30", "CONF336", "pixel size"),
        ("--box 0", "CONF336", "box"),
        ("--box 100000", "CONF336", "box"),
        ("--count 99999999999999999999", "CONF330", "number of particles"),
        ("--snr-db 1e5", "CONF331", "SNR"),
        ("--snr-db=-1e5", "CONF331", "SNR"),
        ("--snr-db 400", "CONF331", "SNR"),
        ("--shift-sigma 1e9", "CONF332", "standard deviation"),
        ("--shift-sigma 9", "CONF332", "standard deviation"),
        ("--bfactor nan", "CONF338", "B-factor"),
        ("--bfactor inf", "CONF338", "B-factor"),
        ("--bfactor=-inf", "CONF338", "B-factor"),
        ("--bfactor 1e30", "CONF338", "B-factor"),
        ("--ctf --voltage inf", "CONF321", "voltage"),
        ("--ctf --voltage 0", "CONF321", "voltage"),
        ("--ctf --astigmatism nan", "CONF321", "astigmatism"),
        ("--ctf --phase-shift inf", "CONF321", "phase shift"),
        ("--ctf --defocus 0 1e30", "CONF320", "defocus"),
        ("--ctf --defocus nan 1e4", "CONF320", "defocus"),
        ("--dose 1", "CONF340", "white noise, dose 1.0"),
        ("--noise poisson", "CONF340", "poisson noise, dose None"),
        ("--noise none --dose 1", "CONF340", "SNR None dB"),
        ("--noise poisson --dose 0", "CONF340", "dose"),
        ("--noise poisson --dose 1 --ctf", "CONF344", "at a dose of 1 and an SNR of 0 dB"),
    ],
)
def test_numbers_out_of_range_are_refused_and_nothing_is_lost(
    folder: Path, tmp_path: Path, options: str, code: str, named: str
) -> None:
    before = contents(folder)
    for output, more in ((folder, ["--overwrite"]), (tmp_path / "new", [])):
        with pytest.raises(CryorbitError) as caught:
            run(*SMALL, *options.split(), "--output", output, *more)
        assert caught.value.code == code
        assert named in caught.value.message
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()


def test_the_hint_for_no_noise_is_the_option(tmp_path: Path) -> None:
    with pytest.raises(CryorbitError, match="--noise none"):
        run(*SMALL, "--snr-db", "inf", "--output", tmp_path / "x")


@pytest.mark.parametrize("stage", ["write_volume", "write_text", "write_particles"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_overwrite_leaves_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    projector, old = make_projector(phantom(), 16, 5.0), tmp_path / "old"
    write_simulation(old, projector, SimulationSettings(3, seed=1))
    before = contents(old)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"cryorbit.simulate.write.{stage}", fail)
    for output in (old, tmp_path / "new"):
        with pytest.raises((KeyboardInterrupt, OSError)):
            write_simulation(output, projector, SimulationSettings(3, seed=2), overwrite=True)
    assert contents(old) == before
    assert sorted(p.name for p in old.iterdir()) == sorted(before)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("last", range(1, 11))
def test_a_failing_move_brings_the_old_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    for number, place in enumerate(("old", "made")):
        (tmp_path / place).mkdir()
        for name in FILES:
            (tmp_path / place / name).write_text(f"{number} {name}")
    (tmp_path / "kept").mkdir()
    before, replace, calls = contents(tmp_path / "old"), os.replace, []

    def fail(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == last:
            raise OSError("read-only")
        replace(source, target)

    monkeypatch.setattr("cryorbit.simulate.write.os.replace", fail)
    with pytest.raises(OSError, match="read-only"):
        _swap(tmp_path / "made", tmp_path / "old", tmp_path / "kept")
    assert contents(tmp_path / "old") == before


def test_a_full_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryorbit.simulate.write.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CryorbitError, match=r"RUN303: 70 images of 32 px take 0.0 GB"):
        run(*SMALL, "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()
