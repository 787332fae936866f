"""``cryorbit assign`` through real processes: new particles of a finished run, taught once, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import cryorbit

from cryorbit.errors import CryorbitError
from cryorbit.groups.so3 import distance, exp
from cryorbit.io.particles import open_particles, write_particles
from cryorbit.methods.distillation import DistillationConfig
from cryorbit.physics.fourier import fourier_disk
from cryorbit.pipeline.assign import assign
from cryorbit.pipeline.config import RunConfig, override
from cryorbit.pipeline.finished import open_finished
from cryorbit.pipeline.knowledge import assigner_of, taught
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.pipeline.rundir import written
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.checkpoint import load_checkpoint, save_checkpoint

BOX, APIX, COUNT = 20, 4.8, 150
QUICK = DistillationConfig(steps=20, batch=16, side=8, heads=2)


def simulated(folder: Path, seed: int, count: int = COUNT, box: int = BOX, ctf: CTFSettings | None = None) -> Path:
    settings = SimulationSettings(count=count, snr_db=3.0, ctf=ctf, shift_sigma_px=0.5, seed=seed)
    write_simulation(folder, make_projector(phantom(width=3.0), box, APIX), settings)
    return folder / "particles.star"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refinement of almost true poses, and new particles beside it."""
    folder = tmp_path_factory.mktemp("assign")
    star = simulated(folder / "in", 6, ctf=CTFSettings())
    true = open_particles(folder / "in" / "truth.star", require_images=False)
    turn = exp(0.02 * torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    rotations = (turn @ torch.from_numpy(true.rotations)).numpy()
    write_particles(folder / "in" / "start.star", open_particles(star), rotations=rotations, shifts=true.shifts)
    config = RunConfig(particles=str(folder / "in" / "start.star"), start="poses", mask_diameter=70.0)
    reconstruct(override(config, ["refine.sweeps=2", "refine.search_every=0"]), folder / "run")
    simulated(folder / "new", 9, ctf=CTFSettings())
    return folder


@pytest.fixture(scope="module")
def posed(finished: Path) -> Path:
    """New particles posed by a process of its own, in a folder that RELION would work in."""
    settings = [f"--set={k}={getattr(QUICK, k)}" for k in ("steps", "batch", "side", "heads")]
    new = finished / "new" / "particles.star"
    done = cryorbit("assign", new, "--run", "run", "--output", "posed", *settings, cwd=finished)
    assert done.returncode == 0, done.stderr
    assert f"posed       {COUNT} particles" in done.stdout
    return finished / "posed"


def errors(star: Path, truth: Path) -> torch.Tensor:
    found, true = (torch.from_numpy(open_particles(x, require_images=False).rotations) for x in (star, truth))
    return torch.rad2deg(distance(found, true))


def test_poses_are_right_where_they_are_said_to_be(posed, finished):
    """The encoder has hardly been taught, so nearly all are searched for; the frame is the run's, which is the truth's."""
    values = json.loads((posed / "assign.json").read_text())
    assert values["particles"] == COUNT
    assert values["searched"] > 0.5 * COUNT
    error = errors(posed / "particles.star", finished / "new" / "truth.star")
    assert float(error.median()) < 5.0
    particles = open_particles(posed / "particles.star")  # images are found from here
    confidence = np.array([float(x) for x in particles.table.columns["cryorbitConfidence"]])
    assert float((error < 10).double().mean()) == pytest.approx(confidence.mean(), abs=0.25)
    searched = [int(x) for x in particles.table.columns["cryorbitSearched"]]
    assert sum(searched) == values["searched"]
    assert values["strength_median"] == pytest.approx(1.0, abs=0.1)
    assert particles.read([0]).shape == (1, BOX, BOX)


def test_the_second_time_nothing_is_taught(posed, finished, tmp_path):
    before = (finished / "run" / "encoder" / "encoder.safetensors").stat().st_mtime_ns
    values = assign(
        finished / "new" / "particles.star", finished / "run", tmp_path / "again", searched_below=0.0, batch=64
    )
    assert (finished / "run" / "encoder" / "encoder.safetensors").stat().st_mtime_ns == before
    assert values["searched"] == 0
    assert values["encoder"]["steps"] == QUICK.steps
    run = finished / "run"
    assert set((run / "encoder").iterdir()) <= set(written(run))  # --overwrite removes it


def test_batches_do_not_change_poses(posed, finished, tmp_path):
    new, run = finished / "new" / "particles.star", finished / "run"
    stars = []
    for batch in (37, 500):
        assign(new, run, tmp_path / str(batch), searched_below=1.0, batch=batch)
        stars.append(tmp_path / str(batch) / "particles.star")
    assert float(errors(stars[0], stars[1]).max()) < 0.05


def test_noise_is_not_taken_for_a_particle(posed, finished):
    run = finished / "run"
    config, metrics = open_finished(run)
    weights, known = taught(run, config, metrics, None, None)
    assigner = assigner_of(run, config, known, weights, 2, torch.device("cpu"))
    disk = fourier_disk(BOX, 0.5 * BOX)
    spread = (0.5 * torch.tensor(known.noise)[disk.shell]).sqrt()
    generator = torch.Generator().manual_seed(77)
    noise = torch.view_as_complex(torch.randn(50, len(disk), 2, generator=generator) * spread[:, None])
    found = assigner.searched(noise, torch.ones(50, len(disk)))
    assert float(known.by_search(found.features).median()) < 0.35  # 15 particles taught it
    assert known.held_out["search_right"] > 0.8


def refused(code: str, *arguments: object, **settings: object) -> None:
    with pytest.raises(CryorbitError, match=code):
        assign(*arguments, **settings)


def test_what_cannot_be_posed_is_refused_in_one_line(posed, finished, tmp_path):
    new, run = finished / "new" / "particles.star", finished / "run"
    refused("RUN040", new, finished, tmp_path / "out")
    refused("RUN046", new, run, posed)
    refused("CONF511", new, run, tmp_path / "out", searched_below=2.0)
    refused("CONF511", new, run, tmp_path / "out", batch=0)
    refused("DATA046", simulated(tmp_path / "larger", 1, 30, 24, CTFSettings()), run, tmp_path / "out")
    refused("DATA047", simulated(tmp_path / "plain", 1, 30), run, tmp_path / "out")
    faint = tmp_path / "faint.star"
    write_particles(faint, open_particles(new), extra={"rlnCtfBfactor": ["9e4"] * COUNT})
    refused("DATA048", faint, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise_variance", None), ("noise_variance", [1.0]), ("scale_spread", None), ("scale_spread", ...)],
)
def test_a_run_that_does_not_say_its_noise_is_named(finished, tmp_path, name, value):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run, ignore=shutil.ignore_patterns("encoder"))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics = {k: v for k, v in metrics.items() if k != name} | ({} if value is ... else {name: value})
    (run / "metrics.json").write_text(json.dumps(metrics))
    refused("RUN041", finished / "new" / "particles.star", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_encoder_is_named(posed, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    path = run / "encoder" / "encoder.safetensors"
    tensors, meta = load_checkpoint(path)
    save_checkpoint(path, {name: x[:-1] if x.ndim else x for name, x in tensors.items()}, meta)
    refused("RUN048", finished / "new" / "particles.star", run, tmp_path / "out")
    path.write_bytes(b"nothing")
    refused("RUN013", finished / "new" / "particles.star", run, tmp_path / "out")
