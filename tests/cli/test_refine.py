"""``cryorbit refine`` through real processes: approximate poses in, better ones and their posterior out, and what it refuses."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from processes import FINAL, cryorbit

from cryorbit.cli.evaluate import evaluate
from cryorbit.conventions import euler_to_matrix
from cryorbit.errors import CryorbitError, RunError
from cryorbit.groups.so3 import distance, exp, random_rotations
from cryorbit.io.particles import open_particles, write_particles
from cryorbit.methods.half_maps import halves_from_poses
from cryorbit.metrics.evaluation import compare_poses
from cryorbit.metrics.resample import inverted
from cryorbit.pipeline.config import RunConfig, override
from cryorbit.pipeline.outputs import read_posterior
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.poses.posterior import levels_of_truth
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses

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
    done = cryorbit("refine", simulated / "start.star", "--output", run, *QUICK, "--posterior")
    assert done.returncode == 0, done.stderr
    assert "Refined to" in done.stdout
    assert "no half-sets" in done.stdout
    assert json.loads((run / "posterior.json").read_text())["held_out_gain_nats"] > 0
    assert (run / "figures" / "posterior.png").exists()
    assert "coin" not in done.stdout  # the hand is that of the poses
    return run


def test_poses_get_better_and_the_map_is_right(finished, simulated):
    evaluate(finished, simulated / "truth.mrc", simulated / "truth.star", symmetry="", aligned=False, as_json=True)
    values = json.loads((finished / "evaluation.json").read_text())
    assert values["poses"]["median_deg"] < 3.5  # from 7
    assert values["poses"]["shift_median_px"] < 0.3
    assert values["correlation_masked"] > 0.9
    assert values["hand"] == "same"
    assert 0.78 < values["poses"]["credible"]["0.9"] < 0.98
    assert 0.35 < values["poses"]["credible"]["0.5"] < 0.68


@pytest.mark.parametrize("kind", ["dark", "mirrored", "fixed"])
def test_other_ways_to_the_same_answer(finished, simulated, tmp_path, kind):
    """Dark particles whose sign is found, the other hand, shifts held where they are: poses and their regions stay right."""
    config = RunConfig(particles=str(simulated / "start.star"), start="poses", mask_diameter=70.0)
    settings = {"dark": [], "mirrored": ["flip_hand=true"], "fixed": ["refine.fit_shift=false"]}[kind]
    if kind == "dark":
        for name in ("particles.mrcs", "start.star"):
            (tmp_path / name).write_bytes((simulated / name).read_bytes())
        raw = (tmp_path / "particles.mrcs").read_bytes()
        flipped = -np.frombuffer(raw[1024:], dtype=np.float32)
        (tmp_path / "particles.mrcs").write_bytes(raw[:1024] + flipped.tobytes())
        config = replace(config, particles=str(tmp_path / "start.star"))
    result = reconstruct(override(config, ["refine.sweeps=4", *settings]), tmp_path / "run")
    particles = open_particles(simulated / "truth.star", require_images=False)
    true = Poses(torch.from_numpy(particles.rotations), torch.from_numpy(particles.shifts))
    found, values = compare_poses(result.poses, true, 4.0)
    assert values["hand"] == ("mirrored" if kind == "mirrored" else "same")
    level = levels_of_truth(read_posterior(tmp_path / "run" / "poses.npz"), true, found)
    if kind == "fixed":  # shifts that are half a pixel off make poses worse than the posterior knows
        assert values["median_deg"] < 6.0
        assert 0.1 < float((level < 0.9).double().mean())
        return
    assert values["median_deg"] < 3.5
    assert 0.78 < float((level < 0.9).double().mean()) < 0.98
    with mrcfile.open(finished / "map.mrc") as stream:
        plain = torch.from_numpy(stream.data.copy())
    same = inverted(plain) if kind == "mirrored" else plain
    torch.testing.assert_close(result.map.data, same, atol=2e-3 * float(plain.abs().max()), rtol=0.0)


def test_half_maps_from_the_written_poses_agree_as_the_run_says(finished):
    """Poses in ``particles.star`` are those of a particle's own half: maps made from them share no noise."""
    ours = open_particles(finished / "particles.star")
    stack = FourierStack(ours, 12.0, mask_diameter=70.0)
    rotations, shifts = torch.from_numpy(ours.rotations).float(), torch.from_numpy(ours.shifts).float() / 4.0
    half_set, group = torch.from_numpy(ours.half_set), torch.eye(3)[None]
    made = halves_from_poses(stack, rotations, shifts, half_set, mask_diameter=70.0, symmetry=group)
    with (finished / "fsc.csv").open() as stream:
        stated = np.array([float(row["fsc_masked"]) for row in csv.DictReader(stream)])
    assert np.abs(made.correlation.numpy()[1:9] - stated[1:9]).max() < 0.12


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
    apart = distance(*(torch.from_numpy(x).double() for x in (arrays["rotations"][:, 0], ours.rotations)))
    assert 0 < float(torch.rad2deg(apart).median()) < 3.0  # under the maps of different halves
    assert np.median(np.abs(arrays["shifts_A"][:, 0] - ours.shifts)) < 1.0
    np.testing.assert_allclose(arrays["mass"].sum(axis=1), 1.0, atol=1e-5)
    assert (np.linalg.eigvalsh(arrays["covariance"]) > 0).all()
    column = {name: np.array(values) for name, values in ours.table.columns.items()}
    np.testing.assert_allclose(column["rlnMaxValueProbDistribution"].astype(float), arrays["mass"][:, 0], atol=1e-4)
    np.testing.assert_allclose(column["cryorbitScale"].astype(float), arrays["scale"], atol=1e-4)
    assert abs(arrays["scale"].mean() - 1) < 0.15


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


def test_random_poses_are_not_trusted(simulated, tmp_path, generator):
    rotations = random_rotations(500, generator).double().numpy()
    write_particles(simulated / "random.star", open_particles(simulated / "start.star"), rotations=rotations)
    config = RunConfig(particles=str(simulated / "random.star"), start="poses", mask_diameter=70.0)
    result = reconstruct(override(config, ["refine.sweeps=1"]), tmp_path / "run")
    assert result.status.startswith("Do not trust this map")


def test_a_symmetry_the_map_does_not_have_is_told(simulated, tmp_path):
    config = RunConfig(particles=str(simulated / "start.star"), start="poses", symmetry="D2", mask_diameter=70.0)
    result = reconstruct(override(config, ["refine.sweeps=1"]), tmp_path / "run")
    assert any("does not look D2" in warning for warning in result.warnings)


@pytest.mark.parametrize("damage", ["cut", "noise", "nan", "mass", "reversed", "doubled", "text"])
def test_a_posterior_that_is_damaged_or_of_another_run_is_refused(finished, simulated, tmp_path, damage):
    run = tmp_path / "run"
    run.mkdir()
    (run / "particles.star").write_bytes((finished / "particles.star").read_bytes())
    raw = (finished / "poses.npz").read_bytes()
    with np.load(finished / "poses.npz") as stored:
        arrays = {name: stored[name].copy() for name in stored.files}
    if damage in ("cut", "noise", "text"):
        broken = {"cut": raw[:5000], "noise": raw[:200] + b"\xff" * 60 + raw[260:], "text": b"no archive"}[damage]
        (run / "poses.npz").write_bytes(broken)
    else:
        if damage == "nan":
            arrays["covariance"][3, 0] = np.nan
        elif damage == "mass":
            arrays["mass"][:] = 0
        elif damage == "reversed":
            arrays = {name: values[::-1] for name, values in arrays.items()}
        else:
            arrays = {name: np.concatenate([values, values]) for name, values in arrays.items()}
        np.savez(run / "poses.npz", **arrays)
    with pytest.raises(RunError, match="RUN025"):
        evaluate(run, None, simulated / "truth.star", symmetry="", aligned=False, as_json=False)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("particles.star", {}, "DATA044.*no angles"),
        ("flat.star", {}, "DATA044.*same angles"),
        ("planar.star", {}, "DATA044.*along one axis"),
        ("start.star", {"symmetry": "auto"}, "CONF025.*ab initio map"),
        ("start.star", {"mask": "small"}, "CONF024.*box of 16"),
        ("start.star", {"mask": "counts"}, "CONF024.*values from"),
        ("start.star", {"mask": "corner"}, "CONF024.*misses the particle"),
        ("start.star", {"volume": "mesh"}, "CONF031.*mesh(.|\n)*voxel, neural"),
        ("start.star", {"ini_high": -3.0}, "CONF016.*ini_high"),
        ("start.star", {"start": "abinitio", "ini_high": 20.0}, "CONF016.*ini_high"),
    ],
)
def test_refusals(simulated, tmp_path, name, settings, message):
    files = {"small": written(tmp_path / "a.mrc", 16, 1.0), "counts": written(tmp_path / "b.mrc", 24, 7.0)}
    files["corner"] = written(tmp_path / "c.mrc", 24, 0.0)
    with mrcfile.open(files["corner"], mode="r+") as stream:
        stream.data[:4, :4, :4] = 1.0
    if name == "flat.star":
        same = np.broadcast_to(np.eye(3), (500, 3, 3))
        write_particles(simulated / name, open_particles(simulated / "particles.star"), rotations=same)
    if name == "planar.star":
        turns = np.linspace(0, 360, 500)
        planar = euler_to_matrix(np.stack([0 * turns, 0 * turns, turns], axis=1))
        write_particles(simulated / name, open_particles(simulated / "particles.star"), rotations=planar)
    settings = {"start": "poses", "mask_diameter": 70.0} | {k: files.get(v, v) for k, v in settings.items()}
    with pytest.raises(CryorbitError, match=message):
        reconstruct(RunConfig(particles=str(simulated / name), **settings), tmp_path / "run")
    assert not (tmp_path / "run" / "map.mrc").exists()
