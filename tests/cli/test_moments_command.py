"""``cryorbit moments``: real processes, parts that other processes have summed, coded errors before anything is summed."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import cryorbit

from cryorbit.io.mrc import read_volume
from cryorbit.methods.particle_moments import ParticleSums
from cryorbit.pipeline.rundir import FOLDERS, OURS
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.checkpoint import load_checkpoint

QUICK = [
    *("--mask-diameter", "80", "--set", "moments.periods=3", "--set", "moments.filters=4", "--set", "moments.orders=4"),
    *("--set", "inversion.starts=2", "--set", "inversion.kept=1", "--set", "inversion.iterations=10"),
    *("--set", "inversion.degree=3", "--set", "inversion.order=1", "--set", "inversion.view_degree=2"),
]


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moments")
    settings = SimulationSettings(3000, 3.0, CTFSettings((3e3, 1e4)), shift_sigma_px=0.0, seed=2)
    write_simulation(folder / "sim", make_projector(phantom(), 32, 4.0, fast=True), settings)
    return folder / "sim/particles.star"


@pytest.fixture(scope="module")
def finished(particles: Path) -> Path:
    run = particles.parents[1] / "whole"
    done = cryorbit("moments", particles, "-o", run, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "halves" in done.stdout
    assert "Traceback" not in done.stderr
    return run


def sums(run: Path, half: int) -> ParticleSums:
    return ParticleSums.of_state(load_checkpoint(run / "checkpoint" / f"moments {half}.safetensors")[0])


def test_writes_what_it_promises(finished):
    there = {path.name for path in finished.iterdir()}
    promised = {"map.mrc", "half_map_1.mrc", "half_map_2.mrc", "fsc.csv", "views.csv", "moments.png", "metrics.json"}
    assert promised <= there <= {*OURS, *FOLDERS}
    data, pixel_size = read_volume(finished / "map.mrc")
    assert (data.shape, pixel_size) == ((32, 32, 32), pytest.approx(4.0))
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["particles"] == metrics["particles_in_file"] == 3000
    assert metrics["rings"] == round(3 * 128 / 80)
    assert metrics["third_moments_over_noise"] > 3
    with (finished / "views.csv").open() as stream:
        shares = [float(row["probability"]) for row in csv.DictReader(stream)]
    assert len(shares) == 48
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_the_map_is_on_the_scale_of_the_images(particles, finished):
    """The mass of a map is that of its projections; the CTF leaves the mean of an image to the amplitude contrast, so compare maps."""
    truth, _ = read_volume(particles.parent / "truth.mrc")
    found, _ = read_volume(finished / "map.mrc")
    along = float((found * found).sum() / (truth * truth).sum()) ** 0.5
    assert 0.4 < along < 1.6


def test_parts_of_other_processes_are_those_of_one(particles, finished):
    folder = particles.parents[1]
    for part in (1, 2):
        done = cryorbit("moments", particles, "-o", folder / f"part{part}", "--part", f"{part}/3", *QUICK)
        assert done.returncode == 0, done.stderr
        assert "--with" in done.stdout
        assert not (folder / f"part{part}/map.mrc").exists()
    together = ["--part", "3/3", "--with", folder / "part1", "--with", folder / "part2", *QUICK]
    done = cryorbit("moments", particles, "-o", folder / "part3", *together)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((x / "metrics.json").read_text()) for x in (finished, folder / "part3"))
    assert second["particles"] == 3000
    assert second["third_moments_over_noise"] == pytest.approx(first["third_moments_over_noise"], rel=1e-3)
    for half in (1, 2):
        whole, parts = sums(finished, half), [sums(folder / f"part{part}", half) for part in (1, 2, 3)]
        total = parts[0] + parts[1] + parts[2]
        for name, value in whole.state().items():
            torch.testing.assert_close(total.state()[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    before = read_volume(folder / "part3/map.mrc")[0]
    again = cryorbit("moments", particles, "-o", folder / "part3", *together)
    assert again.returncode == 0, again.stderr
    assert np.array_equal(before, read_volume(folder / "part3/map.mrc")[0])


def test_a_map_is_followed_to_the_resolution_asked_for(particles):
    run = particles.parents[1] / "finer"
    done = cryorbit("moments", particles, "-o", run, "--resolution", "19", *QUICK)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["rings"] == 7
    assert metrics["finest_A"] == pytest.approx(128 / 7)
    assert max(metrics["moments_off"]) < 0.5


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--part", "3/2"), "CONF408"),
        (("--part", "x"), "CONF408"),
        (("--with", "nowhere"), "RUN060"),
        (("--with", "whole"), "RUN060"),
        (("--set", "moments.periods=20"), "CONF11"),
        (("--set", "inversion.starts=0"), "CONF115"),
        (("--resolution", "18", "--set", "moments.filters=0"), "CONF127"),
        (("--resolution", "4"), "CONF11"),
        (("--set", "moments.filters=-1"), "CONF016"),
        (("--shift-sigma", "-1"), "CONF016"),
    ],
)
def test_what_cannot_work_is_refused_before_it_begins(particles, finished, arguments, code, tmp_path):
    places = {name: particles.parents[1] / name for name in ("nowhere", "whole")}
    given = [places.get(x, x) for x in arguments]
    done = cryorbit("moments", particles, "-o", tmp_path / "run", *QUICK, *given)
    assert done.returncode == 1
    assert code in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoint/moments 1.safetensors").exists()
