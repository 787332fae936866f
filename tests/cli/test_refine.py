"""``cryorbit refine`` through real processes: approximate poses in, better ones and their posterior out, and what it refuses."""

import csv
import json
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from processes import FINAL, cryorbit

from cryorbit.errors import CryorbitError
from cryorbit.groups.so3 import exp
from cryorbit.io.particles import open_particles, write_particles
from cryorbit.pipeline.config import RunConfig, override
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation

QUICK = ["--mask-diameter", "70", "--set", "refine.sweeps=4"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Particles, and ``start.star``: true poses made wrong by 8 degrees and half a pixel."""
    folder = tmp_path_factory.mktemp("refine") / "in"
    settings = SimulationSettings(count=500, snr_db=-3.0, ctf=CTFSettings(), shift_sigma_px=1.0, seed=6)
    write_simulation(folder, make_projector(phantom(), 24, 4.0), settings)
    true, particles = (
        open_particles(folder / "truth.star", require_images=False),
        open_particles(folder / "particles.star"),
    )
    generator = torch.Generator().manual_seed(0)
    turn = exp(np.deg2rad(8.0) / 3**0.5 * torch.randn(500, 3, generator=generator, dtype=torch.float64))
    rotations = (turn @ torch.from_numpy(true.rotations)).numpy()
    shifts = true.shifts + 2.0 * torch.randn(500, 2, generator=generator).numpy()
    half_set = np.arange(500) % 2 + 1
    write_particles(folder / "start.star", particles, rotations=rotations, shifts=shifts, half_set=half_set)
    return folder


@pytest.fixture(scope="module")
def finished(simulated: Path) -> Path:
    run = simulated.parent / "run"
    done = cryorbit("refine", simulated / "start.star", "--output", run, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "Refined to" in done.stdout
    assert "coin" not in done.stdout  # the hand is that of the poses
    return run


def test_poses_get_better_and_the_map_is_right(finished, simulated):
    truth = ["--truth", simulated / "truth.mrc", "--truth-poses", simulated / "truth.star", "--json"]
    values = json.loads(cryorbit("evaluate", finished, *truth).stdout)
    assert values["poses"]["median_deg"] < 3.5  # from 7
    assert values["poses"]["shift_median_px"] < 0.3
    assert values["correlation_masked"] > 0.9
    assert values["hand"] == "same"


def test_run_folder_is_complete_and_says_what_it_started_from(finished):
    for name in [*FINAL, "config.toml", "provenance.json", "history.jsonl"]:
        assert (finished / name).stat().st_size > 0, name
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["start"] == "poses"
    assert "probability_right" not in metrics
    assert {json.loads(line)["stage"] for line in (finished / "history.jsonl").read_text().splitlines()} == {"refine"}
    np.testing.assert_array_equal(open_particles(finished / "particles.star").half_set, np.arange(500) % 2 + 1)


def test_posterior_file_and_star_say_the_same(finished):
    ours = open_particles(finished / "particles.star", require_images=False)
    with np.load(finished / "poses.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.testing.assert_allclose(arrays["rotations"][:, 0], ours.rotations, atol=1e-4)
    np.testing.assert_allclose(arrays["shifts_A"][:, 0], ours.shifts, atol=1e-3)
    np.testing.assert_allclose(arrays["mass"].sum(axis=1), 1.0, atol=1e-5)
    assert (np.linalg.eigvalsh(arrays["covariance"]) > 0).all()
    column = {name: np.array(values) for name, values in ours.table.columns.items()}
    np.testing.assert_allclose(column["rlnMaxValueProbDistribution"].astype(float), arrays["mass"][:, 0], atol=1e-4)
    np.testing.assert_allclose(column["cryorbitScale"].astype(float), arrays["scale"], atol=1e-4)
    assert abs(arrays["scale"].mean() - 1) < 0.15
    assert np.median(column["cryorbitRotationSpread"].astype(float)) < 6.0


def written(path: Path, side: int, value: float) -> str:
    with mrcfile.new(path) as stream:
        stream.set_data(np.full((side, side, side), value, dtype=np.float32))
    return str(path)


def test_a_mask_of_the_users_is_used(simulated, tmp_path):
    mask = written(tmp_path / "mask.mrc", 24, 1.0)
    config = RunConfig(particles=str(simulated / "start.star"), start="poses", mask=mask, mask_diameter=70.0)
    reconstruct(override(config, ["refine.sweeps=1"]), tmp_path / "run")
    with (tmp_path / "run" / "fsc.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert all(row["fsc"] == row["fsc_masked_raw"] for row in rows)  # a mask of ones takes nothing away


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("particles.star", {}, "DATA044.*no angles"),
        ("flat.star", {}, "DATA044.*same angles"),
        ("start.star", {"symmetry": "auto"}, "CONF025.*ab initio map"),
        ("start.star", {"mask": "small"}, "CONF024.*box of 16"),
        ("start.star", {"mask": "counts"}, "CONF024.*values from"),
        ("start.star", {"ini_high": -3.0}, "CONF016.*ini_high"),
        ("start.star", {"start": "abinitio", "ini_high": 20.0}, "CONF016.*ini_high"),
    ],
)
def test_refusals(simulated, tmp_path, name, settings, message):
    files = {"small": written(tmp_path / "a.mrc", 16, 1.0), "counts": written(tmp_path / "b.mrc", 24, 7.0)}
    if name == "flat.star":
        same = np.broadcast_to(np.eye(3), (500, 3, 3))
        write_particles(simulated / name, open_particles(simulated / "particles.star"), rotations=same)
    settings = {"start": "poses", "mask_diameter": 70.0} | {k: files.get(v, v) for k, v in settings.items()}
    with pytest.raises(CryorbitError, match=message):
        reconstruct(RunConfig(particles=str(simulated / name), **settings), tmp_path / "run")
    assert not (tmp_path / "run" / "map.mrc").exists()
