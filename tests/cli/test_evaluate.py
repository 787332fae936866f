"""``cryorbit evaluate`` on a made-up run whose distance from the truth is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from cryorbit.cli.evaluate import evaluate, match_images
from cryorbit.errors import DataError, RunError
from cryorbit.groups.so3 import exp, random_rotations
from cryorbit.io.mrc import write_volume
from cryorbit.io.particles import new_particles, write_particles

BOX, PIXEL_SIZE, COUNT, NOISE_DEG = 32, 2.0, 200, 1.0


def _draw(atoms: np.ndarray) -> np.ndarray:
    axis = np.arange(BOX) - BOX // 2
    gx, gy, gz = (np.exp(-((axis[None] - atoms[:, i, None]) ** 2) / (2 * 1.6**2)) for i in range(3))
    return np.einsum("nz,ny,nx->zyx", gz, gy, gx).astype(np.float32)


def _write_poses(path: Path, names: list[str], rotations: torch.Tensor, shifts: torch.Tensor) -> None:
    write_particles(
        path,
        new_particles(names, PIXEL_SIZE, BOX),
        rotations=rotations.double().numpy(),
        shifts=shifts.double().numpy(),
    )


@pytest.fixture
def scene(tmp_path: Path, generator: torch.Generator) -> Path:
    """truth.mrc and truth.star beside run/, which holds the mirrored, rotated, moved molecule and its poses with 1
    degree of noise.
    """
    run = tmp_path / "run"
    run.mkdir()
    atoms = np.random.default_rng(2).normal(size=(15, 3)) * np.array([4.5, 3.0, 2.2])
    frame, origin = random_rotations(1, generator)[0].double(), torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)
    write_volume(tmp_path / "truth.mrc", _draw(atoms), PIXEL_SIZE)
    write_volume(run / "map.mrc", _draw(-(atoms - origin.numpy()) @ frame.numpy()), PIXEL_SIZE)
    true = random_rotations(COUNT, generator).double()
    shifts = 2.0 * torch.randn(COUNT, 2, generator=generator).double()
    noisy = exp(math.radians(NOISE_DEG) * torch.randn(COUNT, 3, generator=generator).double()) @ true
    seen = torch.diag(torch.tensor([-1.0, -1.0, 1.0]).double()) @ noisy @ frame
    moved = shifts + PIXEL_SIZE * (noisy @ origin)[:, :2]
    names = [f"{i + 1:06d}@stack.mrcs" for i in range(COUNT)]
    _write_poses(tmp_path / "truth.star", names, true, shifts)
    order = torch.randperm(COUNT, generator=generator)[: COUNT - 20]
    _write_poses(
        run / "particles.star", [f"{int(i) + 1}@elsewhere/stack.mrcs" for i in order], seen[order], moved[order]
    )
    (run / "metrics.json").write_text(json.dumps({"symmetry": "C1"}))
    return tmp_path


def _invoke(*arguments: str | Path) -> dict:
    app = typer.Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return {"text": result.output}


def test_measures_what_was_put_in(scene: Path) -> None:
    printed = _invoke(scene / "run", "--truth", scene / "truth.mrc", "--truth-poses", scene / "truth.star", "--json")
    values = json.loads((scene / "run" / "evaluation.json").read_text())
    assert json.loads(printed["text"]) == values
    poses = values["poses"]
    assert poses["particles"] == COUNT - 20
    assert poses["median_deg"] == pytest.approx(1.538 * NOISE_DEG, rel=0.12)
    assert poses["fraction_below_5_deg"] > 0.99
    assert poses["shift_median_px"] < 0.1
    assert poses["chance_median_deg"] > 100
    assert values["hand"] == "mirrored"
    assert poses["hand"] == "mirrored"
    assert values["correlation"] > 0.999
    assert values["resolution_0.5_masked_A"] < 4.6
    assert values["fsc"][5] > 0.999


def test_poses_alone_make_a_table(scene: Path) -> None:
    text = _invoke(scene / "run", "--truth-poses", scene / "truth.star")["text"]
    assert "chance would give" in text
    assert f"pose error of {COUNT - 20} particles" in text


def test_maps_on_other_grids_and_missing_truth_are_refused(scene: Path) -> None:
    write_volume(scene / "other.mrc", np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32), PIXEL_SIZE)
    with pytest.raises(DataError, match="32 pixels of 2 A and 24 pixels of 2 A"):
        evaluate(scene / "run", truth=scene / "other.mrc", truth_poses=None, symmetry="", aligned=False, as_json=False)
    with pytest.raises(RunError, match="RUN031"):
        evaluate(scene / "run", truth=None, truth_poses=None, symmetry="", aligned=False, as_json=False)


def test_images_are_matched_by_name() -> None:
    ours, theirs = match_images(
        ["3@a/s.mrcs", "000001@a/s.mrcs", "7@a/s.mrcs"], ["000001@s.mrcs", "2@s.mrcs", "000003@s.mrcs"]
    )
    assert ours.tolist() == [0, 1]
    assert theirs.tolist() == [2, 0]
    ours, theirs = match_images(["1@b/s.mrcs", "1@a/s.mrcs"], ["1@a/s.mrcs", "1@b/s.mrcs"])
    assert theirs[np.argsort(ours)].tolist() == [1, 0]
    with pytest.raises(DataError, match="DATA222"):
        match_images(["1@a.mrcs"], ["1@b.mrcs"])
    with pytest.raises(DataError, match="DATA221"):
        match_images(["1@a.mrcs", "1@a.mrcs"], ["1@a.mrcs"])


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b"3", b'{"symmetry": 5}', b"[" * 100_000])
def test_broken_metrics_are_one_message(scene: Path, content: bytes) -> None:
    (scene / "run" / "metrics.json").write_bytes(content)
    options = dict(truth=None, truth_poses=scene / "truth.star", aligned=False, as_json=False)
    with pytest.raises(RunError, match="RUN032") as caught:
        evaluate(scene / "run", symmetry="", **options)
    assert "metrics.json" in caught.value.message
    assert "--symmetry" in caught.value.hint
    assert not (scene / "run" / "evaluation.json").exists()


def test_true_poses_must_be_poses(scene: Path) -> None:
    options = dict(truth=None, symmetry="", aligned=False, as_json=False)
    with pytest.raises(RunError, match=r"RUN033: .*holds no poses") as caught:
        evaluate(scene / "run", truth_poses=scene / "truth.mrc", **options)
    assert "--pixel-size" not in str(caught.value)
    (scene / "bare.star").write_text("data_\nloop_\n_rlnImageName #1\n1@s.mrcs\n")
    with pytest.raises(DataError, match="DATA027") as missing:
        evaluate(scene / "run", truth_poses=scene / "bare.star", **options)
    assert "--pixel-size" not in str(missing.value)


def test_a_constant_map_is_refused(scene: Path) -> None:
    write_volume(scene / "flat.mrc", np.ones((BOX, BOX, BOX), np.float32), PIXEL_SIZE)
    with pytest.raises(RunError, match="RUN034"):
        evaluate(scene / "run", truth=scene / "flat.mrc", truth_poses=None, symmetry="", aligned=False, as_json=False)
