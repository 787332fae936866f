"""The pipeline in process: verdicts, refusals, grey values, and noise that must not become a structure."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import half_turn
from cryorbit.io.mrc import StackWriter, read_volume
from cryorbit.io.particles import open_particles, write_particles
from cryorbit.io.star import StarFile, read_star, write_star
from cryorbit.metrics.align import align_volumes
from cryorbit.metrics.evaluation import compare_poses
from cryorbit.metrics.resample import inverted, move_volume
from cryorbit.physics.fourier import disk_to_images, fourier_disk
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.pipeline.config import POSES, RunConfig, override
from cryorbit.pipeline.reconstruct import prepare, reconstruct
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.types import Poses, Volume

QUICK = [
    "mask_diameter=70",
    "abinitio.starts=1",
    "abinitio.heats=1",
    "abinitio.order=1",
    "abinitio.march_steps=16",
    "abinitio.settle_steps=4",
    "refine.sweeps=3",
]


def simulate(folder: Path, box: int, **settings: object) -> Path:
    write_simulation(folder, make_projector(phantom(), box, 96.0 / box), SimulationSettings(seed=4, **settings))
    return folder / "particles.star"


def truth_poses(folder: Path) -> Poses:
    truth = open_particles(folder / "truth.star", require_images=False)
    return Poses(torch.from_numpy(truth.rotations), torch.from_numpy(truth.shifts))


def test_odd_box_with_ctf_and_shifts_is_recovered_on_the_images_own_grey_scale(tmp_path):
    star = simulate(tmp_path / "in", 25, count=500, snr_db=0.0, ctf=CTFSettings(), shift_sigma_px=0.7)
    result = reconstruct(override(RunConfig(particles=str(star)), QUICK), tmp_path / "run")
    _, values = compare_poses(
        result.poses, truth_poses(tmp_path / "in"), 96.0 / 25, torch.eye(3, dtype=torch.float64)[None]
    )
    assert values["median_deg"] < 6.0
    particles = open_particles(star)
    disk = fourier_disk(25)
    grid = slicing_grid(result.map.data, disk.radius)
    from cryorbit.physics.ctf import ctf_on_disk
    from cryorbit.physics.shift import phase_ramp
    from cryorbit.types import CTFParams

    ctf = CTFParams(**{k: torch.from_numpy(v).float() for k, v in particles.ctf.items()})
    ramp = phase_ramp(result.poses.shifts.float() / result.map.pixel_size, disk)
    model = (
        slice_grid(grid, result.poses.rotations.float(), disk) * ramp * ctf_on_disk(ctf, disk, result.map.pixel_size)
    )
    model = disk_to_images(model, disk).flatten()
    slope = float((model * torch.from_numpy(particles.read(np.arange(500))).flatten()).sum() / model.square().sum())
    assert slope == pytest.approx(1.0, abs=0.15)


def test_pure_noise_is_not_trusted(tmp_path, generator):
    noise = torch.randn(200, 24, 24, generator=generator).numpy()
    with StackWriter(tmp_path / "noise.mrcs", 200, 24, 4.0) as writer:
        writer.write(noise)
    config = override(RunConfig(particles=str(tmp_path / "noise.mrcs")), [*QUICK, "refine.sweeps=1"])
    result = reconstruct(config, tmp_path / "run")
    assert result.status.startswith("Do not trust this map")


def test_dark_particles_give_a_bright_map_and_say_so(tmp_path):
    star = simulate(tmp_path / "in", 24, count=250, snr_db=5.0)
    stack = star.with_name("particles.mrcs")
    raw = stack.read_bytes()
    stack.write_bytes(raw[:1024] + (-np.frombuffer(raw[1024:], dtype=np.float32)).tobytes())
    result = reconstruct(override(RunConfig(particles=str(star)), QUICK), tmp_path / "run")
    assert result.metrics["contrast"] == "dark"
    assert any("dark" in warning for warning in result.warnings)
    truth, _ = read_volume(tmp_path / "in" / "truth.mrc")
    aligned = align_volumes(result.map, Volume(torch.from_numpy(truth), result.map.pixel_size))
    assert aligned.correlation > 0.7


def test_flip_hand_writes_the_mirror_image_with_poses_that_fit_it(tmp_path):
    simulate(tmp_path / "in", 24, count=400, snr_db=5.0)
    config = override(RunConfig(particles=str(tmp_path / "in" / "truth.star"), start=POSES), QUICK)
    plain = reconstruct(config, tmp_path / "plain")
    flipped = reconstruct(override(config, ["flip_hand=true"]), tmp_path / "flipped")
    torch.testing.assert_close(flipped.map.data, inverted(plain.map.data))
    torch.testing.assert_close(flipped.poses.rotations, half_turn(plain.poses.rotations))
    disk = fourier_disk(24, 8.0)
    views = [slice_grid(slicing_grid(r.map.data, 8.0), r.poses.rotations[:9].float(), disk) for r in (plain, flipped)]
    assert float((views[0] - views[1]).abs().max()) < 0.03 * float(
        views[0].abs().max()
    )  # but for the planes without a partner


def test_wrong_defocus_is_found_and_written(tmp_path):
    simulate(tmp_path / "in", 32, count=300, snr_db=10.0, ctf=CTFSettings((1e4, 2e4)))
    truth = open_particles(tmp_path / "in" / "truth.star")
    off = np.random.default_rng(0).normal(0, 500, len(truth))
    columns = {f"rlnDefocus{x}": [f"{d:.2f}" for d in truth.ctf[f"defocus_{x.lower()}"] + off] for x in "UV"}
    write_particles(tmp_path / "in" / "off.star", truth, extra=columns)
    config = RunConfig(particles=str(tmp_path / "in" / "off.star"), start=POSES)
    result = reconstruct(override(config, [*QUICK, "refine.defocus_range=1500"]), tmp_path / "run")
    assert result.metrics["defocus_sigma_A"] == pytest.approx(float(off.std()), rel=0.15)
    written = open_particles(tmp_path / "run" / "particles.star")
    error = written.ctf["defocus_u"] - truth.ctf["defocus_u"]
    stated = np.array([float(x) for x in written.table.columns["cryorbitDefocusErrorAngst"]])
    assert error.std() < 0.3 * off.std()
    assert 0.7 < np.sqrt(np.mean((error / stated) ** 2)) < 1.6
    again = reconstruct(override(config, [*QUICK, "refine.defocus_range=1500"]), tmp_path / "run")
    assert torch.equal(again.map.data, result.map.data)  # a continued run has its defocus from the checkpoint


def test_defocus_needs_a_ctf(tmp_path):
    simulate(tmp_path / "in", 24, count=100)
    config = override(RunConfig(particles=str(tmp_path / "in" / "particles.star")), ["refine.defocus_range=500"])
    with pytest.raises(ConfigError, match="CONF026"):
        prepare(config)


@pytest.mark.parametrize("group", ["C4", pytest.param("C1", marks=pytest.mark.slow)])
def test_auto_symmetry_finds_a_fourfold_axis_and_leaves_c1_alone(tmp_path, group):
    one = make_projector(phantom(), 24, 4.0).volume()
    volume = torch.stack([move_volume(one, g, torch.zeros(3)) for g in point_group(group).float()]).sum(dim=0)
    projector = make_projector(Volume(volume, 4.0), 24, 4.0)
    write_simulation(tmp_path / "in", projector, SimulationSettings(count=300, snr_db=5.0, seed=4))
    config = override(RunConfig(particles=str(tmp_path / "in" / "particles.star"), symmetry="auto"), QUICK)
    result = reconstruct(config, tmp_path / "run")
    assert result.metrics["symmetry"] == group, result.warnings


def test_incomplete_ctf_is_refused_until_it_is_said_or_waived(tmp_path):
    star = simulate(tmp_path / "in", 24, count=40, snr_db=0.0, ctf=CTFSettings())
    file = read_star(star)
    optics = file.blocks["optics"].with_columns({}, drop=("rlnAmplitudeContrast",))
    write_star(star, StarFile({**file.blocks, "optics": optics}))
    with pytest.raises(DataError, match=r"DATA041.*rlnAmplitudeContrast"):
        prepare(RunConfig(particles=str(star)))
    assert prepare(RunConfig(particles=str(star), no_ctf=True)).particles.ctf is None
    said = prepare(RunConfig(particles=str(star), amplitude_contrast=0.1)).particles
    assert float(said.ctf["amplitude_contrast"][0]) == pytest.approx(0.1)


@pytest.mark.parametrize("start", ["abinitio", POSES, "classes"])
def test_a_ctf_that_leaves_nothing_is_refused(tmp_path, start):
    truth = simulate(tmp_path / "in", 24, count=40, snr_db=0.0, ctf=CTFSettings()).with_name("truth.star")
    particles = open_particles(truth)
    bfactors = {"2e3": [2e3] * 40, "some": [2e4] * 20 + [0.0] * 20, "2e4": [2e4] * 40}
    for name, values in bfactors.items():
        write_particles(truth.with_name(f"{name}.star"), particles, extra={"rlnCtfBfactor": [str(x) for x in values]})
        config = RunConfig(particles=str(truth.with_name(f"{name}.star")), start=start)
        if name != "2e4":
            assert len(prepare(config).particles) == 40
            continue
        with pytest.raises(DataError, match=r"DATA048.* between 18.5 and 7.8 A.* median B-factor is 2e\+04 A"):
            prepare(config)
        assert prepare(override(config, ["no_ctf=true"])).particles.ctf is None


def test_dark_particles_are_pointed_out(tmp_path):
    star = simulate(tmp_path / "in", 24, count=100, snr_db=5.0)
    images = open_particles(star).read(np.arange(100))
    with StackWriter(tmp_path / "dark.mrcs", 100, 24, 4.0) as writer:
        writer.write(-images)
    assert any("dark" in w for w in prepare(RunConfig(particles=str(tmp_path / "dark.mrcs"))).warnings)
    assert not any("expected bright" in w for w in prepare(RunConfig(particles=str(star))).warnings)


def test_image_names_suit_relion_run_from_the_project_folder(tmp_path, monkeypatch):
    simulate(tmp_path / "project" / "Extract" / "job001", 24, count=40, snr_db=10.0)
    monkeypatch.chdir(tmp_path / "project")
    star = tmp_path / "project" / "Extract" / "job001" / "truth.star"
    config = override(RunConfig(particles=str(star), start=POSES), [*QUICK, "refine.sweeps=1"])
    reconstruct(config, Path("cryorbit") / "run1")
    ours = read_star(Path("cryorbit/run1/particles.star")).blocks["particles"].columns["rlnImageName"]
    assert ours[0] == "000001@Extract/job001/particles.mrcs"
    reconstruct(config, tmp_path / "elsewhere")
    absolute = read_star(tmp_path / "elsewhere" / "particles.star").blocks["particles"].columns["rlnImageName"]
    assert absolute[0] == f"000001@{tmp_path / 'project' / 'Extract' / 'job001' / 'particles.mrcs'}"
    assert len(open_particles(tmp_path / "elsewhere" / "particles.star")) == 40


def test_copies_of_an_image_share_a_half(tmp_path):
    star = simulate(tmp_path / "in", 24, count=40, snr_db=10.0)
    file = read_star(star)
    table = file.blocks["particles"]
    twice = table.rows([*range(40), *range(40)])
    write_star(star, StarFile({**file.blocks, "particles": twice}))
    half = prepare(RunConfig(particles=str(star))).half_set
    assert torch.equal(half[:40], half[40:])
    assert sorted(torch.bincount(half)[1:].tolist()) == [40, 40]
