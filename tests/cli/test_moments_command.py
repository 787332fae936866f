"""``cryorbit moments``: real processes, parts that other processes have summed, coded errors before anything is summed."""

import csv
import json
from pathlib import Path

import pytest
import torch
from processes import cryorbit
from typer import Typer
from typer.testing import CliRunner

from cryorbit.cli.moments import moments
from cryorbit.errors import CryorbitError
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
    *("--set", "inversion.starts=2", "--set", "inversion.kept=1", "--set", "inversion.iterations=5"),
    *("--set", "inversion.degree=3", "--set", "inversion.order=1", "--set", "inversion.view_degree=2"),
]


app = Typer()
app.command()(moments)


def call(*arguments: str | Path) -> str:
    """The command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moments")
    settings = SimulationSettings(2400, 3.0, CTFSettings((3e3, 1e4)), shift_sigma_px=0.0, seed=2)
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
    assert metrics["particles"] == metrics["particles_in_file"] == 2400
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
    assert second["particles"] == 2400
    assert second["third_moments_over_noise"] == pytest.approx(first["third_moments_over_noise"], rel=1e-3)
    for half in (1, 2):
        whole, parts = sums(finished, half), [sums(folder / f"part{part}", half) for part in (1, 2, 3)]
        total = parts[0] + parts[1] + parts[2]
        for name, value in whole.state().items():
            torch.testing.assert_close(total.state()[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    last = [particles, "-o", folder / "part3", "--part", "3/3", *QUICK]
    assert "of parts that were not added" in call(*last, "--with", folder / "part1")
    call(*last)
    assert not (folder / "part3/map.mrc").exists()  # which three parts had


def test_a_map_is_followed_to_the_resolution_asked_for(particles):
    run = particles.parents[1] / "finer"
    call(particles, "-o", run, "--resolution", "19", *QUICK)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["rings"] == 7
    assert metrics["finest_A"] == pytest.approx(128 / 7)
    assert max(metrics["moments_off"]) < 0.5


def test_parts_of_something_else_are_refused(particles, finished):
    folder = particles.parents[1]
    part = folder / "other"

    def added(*settings: str) -> str:
        with pytest.raises(CryorbitError) as refusal:
            call(particles, "-o", folder / "refused", "--part", "2/2", "--with", part, *QUICK, *settings)
        assert not (folder / "refused").exists()
        return str(refusal.value)

    call(particles, "-o", part, "--part", "1/2", *QUICK)
    for settings in (("--contrast", "dark"), ("--set", "inversion.tolerance=0.1"), ("--shift-sigma", "1")):
        text = added(*settings)
        assert "RUN060" in text
        assert settings[-1].split("=")[0] in text or settings[0].removeprefix("--") in text
    first, second = (part / f"checkpoint/moments {half}.safetensors" for half in (1, 2))
    kept = first.read_bytes()
    for wrong in (second.read_bytes(), kept[:500]):
        first.write_bytes(wrong)
        assert "RUN060" in added()
    first.unlink()
    assert "RUN060" in added()
    first.write_bytes(kept)
    (part / "config.toml").write_text("nonsense")
    assert "RUN060" in added()


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
        (("--shift-sigma", "40"), "CONF128"),
        (("--set", "inversion.rings=2"), "CONF016"),
        (("--prior", "whole"), "RUN061"),
        (("--prior", "text"), "RUN061"),
        (("--prior", "nowhere/weights.safetensors"), "RUN061"),
        (("--shift-sigma", "14", "--prior", "new.safetensors"), "DATA416"),
    ],
)
def test_what_cannot_work_is_refused_before_it_begins(particles, finished, arguments, code, tmp_path):
    places = {name: particles.parents[1] / name for name in ("nowhere", "whole")} | {"text": Path(__file__)}
    given = [places.get(x, x) for x in arguments]
    with pytest.raises(CryorbitError, match=code):
        call(particles, "-o", tmp_path / "run", *QUICK, *given)
    assert not (tmp_path / "run").exists()
