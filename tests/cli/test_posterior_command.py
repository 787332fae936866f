"""``cryorbit posterior`` on a run folder: what it writes is right, and what it refuses it leaves alone."""

import csv
import json
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from processes import cryorbit

from cryorbit.cli.posterior import posterior as command
from cryorbit.errors import CryorbitError
from cryorbit.groups.so3 import exp
from cryorbit.io.mrc import read_volume, write_volume
from cryorbit.io.particles import open_particles, write_particles
from cryorbit.metrics.fsc import fsc
from cryorbit.pipeline.config import RunConfig, override
from cryorbit.pipeline.posterior import posterior
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.pipeline.rundir import OURS
from cryorbit.simulate.orientations import Orientations
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation

WRITTEN = ("map_mean.mrc", "map_std.mrc", "missing_views.mrc", "ss_snr.csv", "directions.csv", "posterior.json")
COUNT = 400


def made(folder: Path, orientations: Orientations) -> Path:
    """A finished refinement of almost true poses."""
    settings = SimulationSettings(
        count=COUNT, snr_db=0.0, ctf=CTFSettings(), shift_sigma_px=0.5, orientations=orientations, seed=6
    )
    write_simulation(folder / "in", make_projector(phantom(width=3.0), 24, 4.0), settings)
    true = open_particles(folder / "in" / "truth.star", require_images=False)
    particles = open_particles(folder / "in" / "particles.star")
    generator = torch.Generator().manual_seed(0)
    turn = exp(0.02 * torch.randn(COUNT, 3, generator=generator, dtype=torch.float64))
    rotations = (turn @ torch.from_numpy(true.rotations)).numpy()
    write_particles(folder / "in" / "start.star", particles, rotations=rotations, shifts=true.shifts)
    config = RunConfig(particles=str(folder / "in" / "start.star"), start="poses", mask_diameter=70.0)
    reconstruct(override(config, ["refine.sweeps=2", "refine.search_every=0"]), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = made(tmp_path_factory.mktemp("even"), Orientations())
    posterior(run, draws=4)
    return run


@pytest.fixture(scope="module")
def coned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = made(tmp_path_factory.mktemp("coned"), Orientations("cone", half_angle=0.5))
    posterior(run, draws=2)
    return run


def columns(path: Path) -> dict[str, np.ndarray]:
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def test_everything_is_written_and_belongs_to_the_run(even):
    for name in WRITTEN:
        assert (even / name).stat().st_size > 0
        assert name in OURS  # --overwrite removes it
    for name in ("map_mean", "map_std", "missing_views"):
        data, pixel_size = read_volume(even / f"{name}.mrc")
        assert data.shape == (24, 24, 24)
        assert pixel_size == pytest.approx(4.0)


def test_mean_and_deviation_are_those_of_the_truth(even):
    """The mean's error is what the deviation says, in the images' own grey values."""
    truth, mean, spread = (
        read_volume(p)[0] for p in (even.parent / "in" / "truth.mrc", even / "map_mean.mrc", even / "map_std.mrc")
    )
    assert float(fsc(torch.from_numpy(mean), torch.from_numpy(truth))[1:8].min()) > 0.9
    error = (mean - truth) - (mean - truth).mean()
    rim = np.ones((24, 24, 24), dtype=bool)
    rim[3:-3, 3:-3, 3:-3] = False  # solvent: nothing but noise
    assert float(np.sqrt((error[rim] ** 2).mean()) / spread[rim].mean()) == pytest.approx(1.0, abs=0.2)


def test_predicted_correlation_is_the_measured_one(even):
    predicted, measured = columns(even / "ss_snr.csv")["fsc_half_set"], columns(even / "fsc.csv")["fsc"]
    assert np.abs(predicted - measured)[1:11].max() < 0.12
    values = json.loads((even / "posterior.json").read_text())
    metrics = json.loads((even / "metrics.json").read_text())
    assert values["resolution_A"] == pytest.approx(metrics["resolution_A"], rel=0.1)
    assert values["draws"] == 4
    assert 0 <= values["pose_share_of_variance"] < 0.5


def test_held_out_images_are_what_the_map_predicts(even, tmp_path):
    """Every image under the map of the other half; with the poses of other particles they are not."""
    values, residual = (
        json.loads((even / "posterior.json").read_text()),
        columns(even / "ss_snr.csv")["held_out_residual"],
    )
    assert values["held_out_gain_nats"] > 20 * values["held_out_gain_error"] > 0
    assert values["held_out_residual"] == pytest.approx(1.0, abs=0.03)
    assert np.abs(residual - 1)[2:11].max() < 0.08
    assert 1 < values["held_out_effective_draws"] <= 4
    run = tmp_path / "run"
    shutil.copytree(even, run, ignore=shutil.ignore_patterns(*WRITTEN))
    particles = open_particles(run / "particles.star", require_images=False)
    with np.load(run / "poses.npz") as stored:
        arrays = dict(stored)
    shuffled = np.roll(np.arange(COUNT), 1)
    arrays["rotations"] = arrays["rotations"][shuffled]
    np.savez(run / "poses.npz", **arrays)
    write_particles(run / "particles.star", particles, rotations=particles.rotations[shuffled], shifts=particles.shifts)
    assert posterior(run, draws=2)["held_out_gain_nats"] < 0


def test_missing_views_are_found(even, coned):
    """Particles seen within 29 degrees of z leave a hole about z, and little resolution along it."""
    full, part = (json.loads((run / "posterior.json").read_text()) for run in (even, coned))
    assert full["unseen_share"] < 0.01 < 0.2 < part["unseen_share"]
    views = read_volume(coned / "missing_views.mrc")[0]
    assert float(views[12 + 7, 12, 12]) < 0.1 < 1.0 < float(views[12, 12, 12 + 7])
    assert float(views[12, 12, 12 + 7]) == pytest.approx(float(views[12, 12, 12 - 7]), rel=1e-5)
    along = columns(coned / "directions.csv")
    z, x = along["z"].argmax(), np.abs(along["z"]).argmin()
    assert along["resolution_A"][z] > 1.5 * along["resolution_A"][x]


def test_command_draws_the_picture(even, capsys):
    command(even, draws=2, seed=1, device="", memory=-1.0)
    assert "no half-sets" in capsys.readouterr().out
    assert (even / "figures" / "posterior.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("no folder", "RUN040"),
        ("empty", "RUN040"),
        ("classes", "RUN040.*2-D classes"),
        ("unfinished", "RUN040.*metrics.json"),
        ("metrics", "RUN041"),
        ("other poses", "RUN025"),
        ("other particles", "RUN043"),
        ("config", "CONF015"),
        ("map", "RUN043"),
        ("blocked", "RUN045"),
        ("draws", "RUN042"),
        ("device", "CONF020"),
    ],
)
def test_refusals_leave_nothing(even, tmp_path, harm, message):
    run, draws, device = tmp_path / "run", 2, ""
    if harm in ("empty", "classes"):
        run.mkdir()
        if harm == "classes":
            (run / "classes.mrcs").touch()
    elif harm != "no folder":
        shutil.copytree(even, run, ignore=shutil.ignore_patterns(*WRITTEN))
    if harm == "unfinished":
        (run / "metrics.json").unlink()
    elif harm == "metrics":
        (run / "metrics.json").write_text("{}")
    elif harm == "config":
        (run / "config.toml").write_text("particles = ")
    elif harm == "other poses":
        with np.load(run / "poses.npz") as stored:
            np.savez(run / "poses.npz", **{k: v[::-1] for k, v in stored.items()})
    elif harm == "other particles":
        text = (run / "config.toml").read_text()
        (run / "config.toml").write_text(text.replace("pixel_size = 0.0", "pixel_size = 3.0"))
    elif harm == "map":
        write_volume(run / "map.mrc", np.ones((8, 8, 8), dtype=np.float32), 3.0)
    elif harm == "blocked":
        (run / "map_std.mrc").mkdir()
    elif harm == "draws":
        draws = 1
    elif harm == "device":
        device = "abacus"
    with pytest.raises(CryorbitError, match=message):
        posterior(run, draws=draws, device=device)
    assert not run.exists() or not any((run / name).is_file() for name in WRITTEN)


def test_map_is_zero_outside_the_mask_of_the_prior(even, tmp_path):
    """With the molecule's mask; then with a mask file, and no voxel negative."""
    truth, plain = (read_volume(p)[0] for p in (even.parent / "in" / "truth.mrc", even / "map_mean.mrc"))
    without = json.loads((even / "posterior.json").read_text())
    assert (without["prior_mask"], without["non_negative"], without["prior_mask_share"]) == ("", False, 1.0)
    assert without["prior_mask_gain_nats"] is None
    run = tmp_path / "run"
    shutil.copytree(even, run, ignore=shutil.ignore_patterns(*WRITTEN))
    done = cryorbit("posterior", run, "--draws", "2", "--prior-mask", "solvent")
    assert done.returncode == 0, done.stderr
    assert "prior mask  makes such an image +" in done.stdout
    mean, spread = (read_volume(run / f"{name}.mrc")[0] for name in ("map_mean", "map_std"))
    inside = spread > 0
    values = json.loads((run / "posterior.json").read_text())
    assert values["prior_mask"] == "solvent"
    assert values["prior_mask_share"] == pytest.approx(inside.mean())
    assert 0.05 < inside.mean() < 0.6
    assert not mean[~inside].any()
    assert mean.min() < 0
    assert np.square(mean - truth).sum() < 0.9 * np.square(plain - truth).sum()
    write_volume(tmp_path / "mask.mrc", inside.astype(np.float32), 4.0)
    values = posterior(run, draws=2, prior_mask=str(tmp_path / "mask.mrc"), non_negative=True)
    mean = read_volume(run / "map_mean.mrc")[0]
    assert mean.min() == 0.0
    assert not mean[~inside].any()
    assert values["non_negative"] is True


def test_images_tell_a_mask_that_cuts_the_molecule(even, tmp_path):
    """Unseen images are likelier for the molecule's mask, and less likely for one that leaves half of it out."""
    run = tmp_path / "run"
    shutil.copytree(even, run, ignore=shutil.ignore_patterns(*WRITTEN))
    right = posterior(run, draws=2, prior_mask="solvent")
    assert right["prior_mask_gain_nats"] > 5 * right["prior_mask_gain_error"] > 0
    inside = (read_volume(run / "map_std.mrc")[0] > 0).astype(np.float32)
    inside[:12] = 0.0
    write_volume(tmp_path / "mask.mrc", inside, 4.0)
    cut = posterior(run, draws=2, prior_mask=str(tmp_path / "mask.mrc"))
    assert cut["prior_mask_gain_nats"] < -5 * cut["prior_mask_gain_error"]
    assert cut["held_out_residual"] > right["held_out_residual"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("none", "RUN049"),
        ("absent", "FILE001"),
        ("box", "CONF024"),
        ("elsewhere", "CONF024"),
        ("symmetry", "CONF027.*C4"),
    ],
)
def test_masks_of_the_prior_that_cannot_be_used(even, tmp_path, mask, message):
    run, path = tmp_path / "run", tmp_path / "mask.mrc"
    shutil.copytree(even, run, ignore=shutil.ignore_patterns(*WRITTEN))
    data = np.zeros((24, 24, 24), dtype=np.float32)
    if mask == "elsewhere":
        data[:2] = 1.0
    elif mask == "symmetry":
        data[8:16, 8:16, 11:20] = 1.0
        metrics = json.loads((run / "metrics.json").read_text()) | {"symmetry": "C4"}
        (run / "metrics.json").write_text(json.dumps(metrics))
    if mask != "absent":
        write_volume(path, data[:20, :20, :20] if mask == "box" else data, 4.0)
    with pytest.raises(CryorbitError, match=message):
        posterior(run, draws=2, prior_mask="" if mask == "none" else str(path), non_negative=mask == "none")
    assert not any((run / name).is_file() for name in WRITTEN)


def test_symmetric_run_is_less_certain_on_its_axis(even, tmp_path):
    """The imposed group ties coefficients to each other: the map's standard deviation grows towards the axis."""
    run = tmp_path / "run"
    shutil.copytree(even, run)
    metrics = json.loads((run / "metrics.json").read_text()) | {"symmetry": "C4"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    posterior(run, draws=2)
    with mrcfile.open(run / "map_std.mrc") as stream:
        spread = stream.data
    assert float(spread[12, 12, 12]) > 1.5 * float(spread[12, 12, 4])
