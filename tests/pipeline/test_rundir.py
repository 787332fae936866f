"""Nothing of the user's is ever deleted; damaged run folders say so; two processes do not share one."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cryorbit.errors import ConfigError, CryorbitError, DataError, RunError
from cryorbit.io.atomic import atomic_path
from cryorbit.io.star import read_star, write_star
from cryorbit.pipeline.config import RunConfig, from_toml, override
from cryorbit.pipeline.inputs import choose_device
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.pipeline.rundir import locked, open_run
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.history import History
from cryorbit.types import Reconstruction

SMALL = [
    "mask_diameter=70",
    "abinitio.starts=1",
    "abinitio.heats=1",
    "abinitio.march_steps=2",
    "abinitio.settle_steps=1",
    "abinitio.order=1",
    "refine.sweeps=1",
]


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sim") / "in"
    write_simulation(folder, make_projector(phantom(), 20, 5.0), SimulationSettings(count=60, snr_db=3.0, seed=2))
    return folder / "particles.star"


@pytest.fixture(scope="module")
def finished(star: Path) -> tuple[Path, Reconstruction]:
    """A run, and what it gave."""
    folder = star.parent.parent / "run"
    return folder, reconstruct(config(star), folder)


@pytest.fixture
def ours(finished: tuple[Path, Reconstruction], tmp_path: Path) -> Path:
    """A copy of the run to be harmed."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def config(star: Path, *more: str) -> RunConfig:
    return override(RunConfig(particles=str(star)), [*SMALL, *more])


def test_overwrite_removes_our_files_only(tmp_path):
    run = tmp_path / "run"
    open_run(run, RunConfig(particles="x"), overwrite=False)
    (run / "map.mrc").write_text("old")
    (run / "notes.txt").write_text("mine")
    open_run(run, RunConfig(particles="y"), overwrite=True)
    assert not (run / "map.mrc").exists()
    assert (run / "notes.txt").read_text() == "mine"
    assert from_toml((run / "config.toml").read_text()).particles == "y"


def test_configuration_of_an_older_version_stays_as_that_version_can_read_it(tmp_path):
    run, config = tmp_path / "run", RunConfig(particles="x")
    open_run(run, config, overwrite=False)
    older = (run / "config.toml").read_text().replace(f"trial = {config.amortized.trial}\n", "")
    assert len(older) < (run / "config.toml").stat().st_size
    (run / "config.toml").write_text(older)
    open_run(run, config, overwrite=False)
    assert (run / "config.toml").read_text() == older


def killed_while_writing(final: Path) -> Path:
    """What :func:`atomic_path` leaves when its process is killed."""
    with atomic_path(final) as temporary:
        temporary.write_text("half")
        kept = temporary.rename(final.with_name("kept"))
        temporary.write_text("")
    final.unlink()
    return kept.rename(temporary)


def test_a_folder_of_half_written_files_only_is_a_fresh_one(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    killed_while_writing(run / "config.toml")
    open_run(run, RunConfig(particles="x"), overwrite=False)
    assert (run / "config.toml").exists()


def test_what_killed_runs_left_half_written_goes_with_the_next(ours, star):
    left = [killed_while_writing(ours / "map_mean.mrc"), killed_while_writing(ours / "checkpoint" / "x.safetensors")]
    kept = [killed_while_writing(ours / "map_aligned.mrc"), ours / ".note.0a1b2c3d.part.txt", ours / ".note.txt"]
    for path in kept[1:]:
        path.write_text("mine")
    assert all(path.exists() for path in left)
    reconstruct(config(star), ours)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)  # others' files, and what `evaluate` may be writing at this moment


def test_overwrite_leaves_what_is_not_ours_in_the_folders_of_a_run(ours, star):
    (ours / "figures").mkdir(exist_ok=True)
    (ours / "figures" / "fsc.png").write_text("ours")
    stack = ours / "figures" / "stack.mrcs"
    stack.write_text("input")
    (ours / "figures" / "mine").mkdir()
    (ours / "checkpoint" / "thesis.txt").write_text("mine")
    open_run(ours, config(star), [stack], overwrite=True)
    assert [path.name for path in sorted((ours / "figures").iterdir())] == ["mine", "stack.mrcs"]
    assert [path.name for path in sorted((ours / "checkpoint").iterdir())] == ["thesis.txt"]
    assert sorted(path.name for path in ours.iterdir()) == ["checkpoint", "config.toml", "figures"]


def test_images_too_small_for_the_encoder_are_refused_before_a_run_is_deleted(ours, star, tmp_path):
    write_simulation(tmp_path / "in", make_projector(phantom(), 14, 6.0), SimulationSettings(count=40, seed=2))
    small = RunConfig(particles=str(tmp_path / "in" / "particles.star"), method="amortized", mask_diameter=70.0)
    with pytest.raises(ConfigError, match="CONF509"):
        reconstruct(small, ours, overwrite=True)
    assert (ours / "map.mrc").exists()


def test_overwrite_deletes_nothing_where_it_cannot_delete_all(tmp_path, monkeypatch):
    run = tmp_path / "run"
    open_run(run, RunConfig(particles="x"), overwrite=False)
    (run / "map.mrc").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "checkpoint")
    with pytest.raises(RunError, match=r"RUN003.*checkpoint cannot be read and written"):
        open_run(run, RunConfig(particles="y"), overwrite=True)
    assert (run / "map.mrc").read_text() == "old"
    assert from_toml((run / "config.toml").read_text()).particles == "x"


def test_run_of_another_version_can_be_overwritten_not_continued(tmp_path):
    run = tmp_path / "run"
    open_run(run, RunConfig(particles="x"), overwrite=False)
    (run / "config.toml").write_text("a_setting_of_old = 3\n" + (run / "config.toml").read_text())
    (run / "map.mrc").write_text("old")
    with pytest.raises(RunError, match=r"RUN004.*a_setting_of_old"):
        open_run(run, RunConfig(particles="x"), overwrite=False)
    assert (run / "map.mrc").exists()
    open_run(run, RunConfig(particles="y"), overwrite=True)
    assert not (run / "map.mrc").exists()
    assert from_toml((run / "config.toml").read_text()).particles == "y"


@pytest.mark.parametrize("text", ["[tool]\nx = 1\n", "", "seed = 0\n", "not toml ["])
def test_foreign_or_damaged_config_is_never_overwritten(tmp_path, text):
    (tmp_path / "config.toml").write_text(text)
    (tmp_path / "particles.star").write_text("precious")
    for overwrite in (True, False):
        with pytest.raises(RunError, match="RUN004"):
            open_run(tmp_path, RunConfig(particles="x"), overwrite=overwrite)
    assert (tmp_path / "particles.star").read_text() == "precious"


@pytest.mark.parametrize("name", ["particles.star", "classes.mrcs", "checkpoint/x.safetensors"])
def test_input_inside_the_output_survives(tmp_path, name):
    open_run(tmp_path, RunConfig(particles="x"), overwrite=False)
    (tmp_path / "map.mrc").write_text("old")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    link = tmp_path / "link.mrcs"
    link.symlink_to(path)
    for given in (path, link):
        with pytest.raises(RunError, match="RUN006"):
            open_run(tmp_path, RunConfig(particles="x"), [Path("x"), given], overwrite=True)
    assert path.read_text() == "precious"
    assert (tmp_path / "map.mrc").exists()


def test_config_that_is_not_text(tmp_path):
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="RUN004"):
        open_run(tmp_path, RunConfig(particles="x"), overwrite=False)


def test_second_process_is_kept_out(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with locked(tmp_path), pytest.raises(RunError, match="RUN005"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("damage", ['{"stage": "abinitio", "st', "[1]", "\x00\x01", ""])
def test_history_cut_short_does_not_stop_a_resume(tmp_path, damage):
    history = History(tmp_path / "h.jsonl")
    history.append("abinitio", 0, {"radius": 3.0})
    history.append("abinitio", 1, {"radius": 4.0})
    with history.path.open("a") as stream:
        stream.write(damage)
    history.truncate("abinitio", 1)
    assert history.path.read_text().count("\n") == 1


@pytest.mark.parametrize("meta", [b"{}", b'{"__metadata__":{"meta":"nonsense","complex":"[]"}}'])
def test_damaged_checkpoint_is_one_message(star, ours, meta):
    (ours / "checkpoint" / "abinitio.safetensors").write_bytes(len(meta).to_bytes(8, "little") + meta)
    with pytest.raises(RunError, match=r"RUN01[13]"):
        reconstruct(config(star), ours)


def test_exchanged_images_are_noticed(star, ours):
    stack = star.with_name("particles.mrcs")
    original = stack.read_bytes()
    values = np.frombuffer(original[1024:], dtype=np.float32).copy()
    values[:100] += 1
    stack.write_bytes(original[:1024] + values.tobytes())
    with pytest.raises(RunError, match="RUN011"):
        reconstruct(config(star), ours)
    stack.write_bytes(original)


def test_a_run_goes_on_with_other_memory(star, finished, ours):
    again = reconstruct(config(star, "memory_gib=0"), ours)
    assert torch.equal(finished[1].map.data, again.map.data)
    assert "memory_gib = 0" in (ours / "config.toml").read_text()
    rows = (ours / "history.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows))  # nothing was done twice


def test_streamed_stack_gives_the_same_map(star, finished, tmp_path):
    streamed = reconstruct(config(star, "memory_gib=0"), tmp_path / "streamed")
    assert torch.equal(finished[1].map.data, streamed.map.data)


def test_devices_that_cannot_work_are_refused():
    for name in ("meta", "mps", "cuda:99", "gpu"):
        with pytest.raises(ConfigError, match="CONF02"):
            choose_device(name)
    assert choose_device("cpu").type == "cpu"


def test_unusable_settings_leave_no_folder(star, tmp_path):
    for text in ("abinitio.radius_end=inf", "seed=99999999999999999999999", "mask_diameter=nan"):
        with pytest.raises(CryorbitError):
            reconstruct(config(star, text), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_at_work_is_not_overwritten(tmp_path):
    open_run(tmp_path / "run", RunConfig(particles="x.star"), overwrite=False)
    with locked(tmp_path / "run"), pytest.raises(RunError, match="RUN005"):
        open_run(tmp_path / "run", RunConfig(particles="x.star"), overwrite=True)
    assert (tmp_path / "run" / "config.toml").is_file()


def test_rows_of_one_image_cannot_make_two_halves(star, tmp_path):
    file = read_star(star)
    names = file.blocks["particles"].columns["rlnImageName"]
    names[:] = [names[0]] * len(names)
    repeated = star.with_name("repeated.star")
    write_star(repeated, file)
    with pytest.raises(DataError, match="DATA043"):
        reconstruct(config(repeated), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_symmetry_too_high_for_the_grid_is_refused(star, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)CONF023.*abinitio.order=2"):
        reconstruct(config(star, "symmetry=I"), tmp_path / "run")
    for name in ("C100", "D50"):  # enough of the grid as it stands, not however it is turned
        with pytest.raises(ConfigError, match="CONF023"):
            reconstruct(config(star, f"symmetry={name}", "abinitio.order=2"), tmp_path / "run")
    with pytest.raises(ConfigError, match="CONF112"):
        reconstruct(config(star, "symmetry=C999"), tmp_path / "run")


@pytest.mark.parametrize("name", ["a' b\" c.mrcs", "b\udcff9.mrcs"])
def test_a_path_that_no_output_could_hold_is_refused_first(star, tmp_path, name):
    file = read_star(star)
    names = file.blocks["particles"].columns["rlnImageName"]
    stack = star.parent / names[0].split("@")[1]
    moved = tmp_path / name
    shutil.copy(stack, moved)
    with pytest.raises(CryorbitError, match=r"STAR005|FILE004"):
        reconstruct(config(moved, "pixel_size=4", "no_ctf=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
