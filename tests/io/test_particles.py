"""Particle sets: in from any table, images from any number of stacks, out to RELION and back."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryorbit.errors import CryorbitError
from cryorbit.io.mrc import StackWriter
from cryorbit.io.particles import new_particles, open_particles, write_particles
from cryorbit.io.star import StarFile, StarTable, read_star, write_star

CTF = {
    "defocus_u": 12_000.0, "defocus_v": 11_000.0, "defocus_angle": 0.5, "phase_shift": 0.2, "voltage": 300.0,
    "spherical_aberration": 2.7, "amplitude_contrast": 0.1, "bfactor": 30.0, "scale": 0.9,
}  # fmt: skip


def save_stack(path: Path, count: int, box: int = 8, pixel: float = 1.5, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).normal(size=(count, box, box)).astype(np.float32)
    with StackWriter(path, count, box, pixel) as writer:
        writer.write(images)
    return images


def names(count: int, stack: str = "s.mrcs") -> list[str]:
    return [f"{i + 1:06d}@{stack}" for i in range(count)]


def save_star(path: Path, particles: dict[str, list[str]], optics: dict[str, list[str]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = {"optics": StarTable(optics)} if optics else {}
    write_star(path, StarFile(blocks | {"particles": StarTable(particles)}))
    return path


OPTICS = {
    "rlnOpticsGroup": ["1"],
    "rlnImagePixelSize": ["1.5"],
    "rlnVoltage": ["300"],
    "rlnSphericalAberration": ["2.7"],
}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 999), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_poses_shifts_and_ctf_survive_write_and_read(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int, ctf: bool, angles: bool, shift: bool, half: bool
) -> None:
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(n, random_state=seed).as_matrix() if angles else None
    shifts = rng.normal(0, 20, (n, 2)) if shift else None
    halves = rng.integers(1, 3, n) if half else None
    fields = {k: v * rng.uniform(0.5, 1.5, n) if k != "voltage" else v for k, v in CTF.items()} if ctf else None
    made = new_particles(names(n), 1.234567, 64, fields, rotations, shifts, halves, {"rlnClassNumber": ["7"] * n})
    path = tmp_path_factory.mktemp("p") / "p.star"
    write_particles(path, made)
    found = open_particles(path, require_images=False)
    assert (len(found), found.box, found.pixel_size) == (n, 64, 1.234567)
    for name, expected, tolerance in (
        ("rotations", rotations, 1e-7),
        ("shifts", shifts, 1e-6),
        ("half_set", halves, 0),
    ):
        value = getattr(found, name)
        assert (value is None) == (expected is None)
        if expected is not None:
            np.testing.assert_allclose(value, expected, atol=tolerance)
    assert (found.ctf is None) == (fields is None)
    for field in fields or {}:
        np.testing.assert_allclose(found.ctf[field], fields[field], atol=2e-6)
    assert found.table.columns["rlnClassNumber"] == ["7"] * n


def test_several_stacks_are_read_in_the_order_asked(tmp_path: Path) -> None:
    a, b = save_stack(tmp_path / "a.mrcs", 3, seed=1), save_stack(tmp_path / "deep" / "b.mrcs", 2, seed=2)
    order = ["000003@a.mrcs", "2@deep/b.mrcs", "000001@a.mrcs", "000001@deep/b.mrcs"]
    particles = open_particles(save_star(tmp_path / "p.star", {"rlnImageName": order}))
    np.testing.assert_array_equal(particles.read([0, 1, 2, 3]), np.stack([a[2], b[1], a[0], b[0]]))
    np.testing.assert_array_equal(particles.read([3, 0, 3]), np.stack([b[0], a[2], b[0]]))
    part = particles.subset([3, 2])
    np.testing.assert_array_equal(part.read([0, 1]), np.stack([b[0], a[0]]))
    assert part.table.columns["rlnImageName"] == [order[3], order[2]]
    assert len(particles.subset(np.array([True, False, True, False]))) == 2


@pytest.mark.parametrize("where", ["folder", "root", "datadir", "basename", "cwd", "absolute"])
def test_stacks_are_found(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    star, name, datadir = project / "Refine3D/job9/run_data.star", "Extract/job1/s.mrcs", None
    places = {
        "folder": star.parent / name,
        "root": project / name,
        "datadir": tmp_path / "disk" / name,
        "basename": tmp_path / "disk" / "s.mrcs",
        "cwd": tmp_path / "here" / name,
        "absolute": tmp_path / "elsewhere" / "s.mrcs",
    }
    images = save_stack(places[where], 2)
    if where == "absolute":
        name = str(places[where])
    if where in ("datadir", "basename"):
        datadir = tmp_path / "disk"
    if where == "cwd":
        monkeypatch.chdir(tmp_path / "here")
    save_star(star, {"rlnImageName": names(2, name)})
    particles = open_particles(star, datadir)
    np.testing.assert_array_equal(particles.read([1]), images[[1]])


def test_missing_stacks_are_listed_once_in_one_error(tmp_path: Path) -> None:
    save_stack(tmp_path / "s0.mrcs", 1)
    star = save_star(tmp_path / "p.star", {"rlnImageName": [f"1@s{i}.mrcs" for i in range(12)] * 2})
    with pytest.raises(CryorbitError) as caught:
        open_particles(star)
    assert caught.value.code == "FILE010"
    assert "11 of 12 image stack(s)" in caught.value.message
    assert caught.value.message.count("s1.mrcs") == 1
    assert "... and 3 more" in caught.value.message
    assert "--datadir" in caught.value.hint
    with pytest.raises(CryorbitError, match="FILE011"):
        open_particles(star, tmp_path / "nowhere")


def test_relion_30_one_table(tmp_path: Path) -> None:
    save_stack(tmp_path / "s.mrcs", 2, pixel=0.0)
    table = {
        "rlnImageName": names(2), "rlnMagnification": ["40000", "40000"], "rlnDetectorPixelSize": ["5", "5"],
        "rlnOriginX": ["2", "-1"], "rlnOriginY": ["0", "4"], "rlnAngleRot": ["0", "10"], "rlnAngleTilt": ["0", "20"],
        "rlnAnglePsi": ["0", "30"], "rlnVoltage": ["300", "200"], "rlnSphericalAberration": ["2.7", "2.7"],
        "rlnAmplitudeContrast": ["0.1", "0.1"], "rlnDefocusU": ["10000", "20000"], "rlnDefocusV": ["9000", "18000"],
        "rlnDefocusAngle": ["90", "45"], "rlnMystery": ["a b", ""],
    }  # fmt: skip
    particles = open_particles(save_star(tmp_path / "p.star", table))
    assert particles.pixel_size == pytest.approx(1.25)
    np.testing.assert_allclose(particles.shifts, [[-2.5, 0], [1.25, -5]])
    np.testing.assert_allclose(particles.ctf["defocus_angle"], [np.pi / 2, np.pi / 4])
    np.testing.assert_allclose(particles.ctf["scale"], 1)
    write_particles(tmp_path / "out.star", particles)
    star = read_star(tmp_path / "out.star")
    assert list(star.blocks) == ["optics", "particles"]
    assert star.blocks["optics"].columns == {
        "rlnOpticsGroupName": ["opticsGroup1", "opticsGroup2"],
        "rlnOpticsGroup": ["1", "2"],
        "rlnVoltage": ["300", "200"],
        "rlnSphericalAberration": ["2.7", "2.7"],
        "rlnAmplitudeContrast": ["0.1", "0.1"],
        "rlnImageDimensionality": ["2", "2"],
        "rlnImageSize": ["8", "8"],
        "rlnImagePixelSize": ["1.250000", "1.250000"],
    }
    written = star.blocks["particles"].columns
    assert set(table) - set(written) == {"rlnOriginX", "rlnOriginY"}
    assert all(written[label] == table[label] for label in set(table) & set(written))
    assert written["rlnOriginXAngst"] == ["2.500000", "-1.250000"]
    assert written["rlnOpticsGroup"] == ["1", "2"]


def test_relion_31_keeps_every_block_column_and_value(tmp_path: Path) -> None:
    save_stack(tmp_path / "s.mrcs", 2)
    optics = OPTICS | {"rlnAmplitudeContrast": ["0.07"], "rlnOddZernike": ["[1,2,3]"], "rlnImageSize": ["8"]}
    table = {"rlnImageName": names(2), "rlnOpticsGroup": ["1", "1"], "rlnCoordinateX": ["1.50", "2"], "odd": ["", "x"]}
    blocks = {
        "optics": StarTable(optics),
        "particles": StarTable(table),
        "extra": StarTable({"k": ["v"]}, is_loop=False),
    }
    write_star(tmp_path / "p.star", StarFile(blocks))
    particles = open_particles(tmp_path / "p.star")
    rotations = Rotation.random(2, random_state=1).as_matrix()
    write_particles(
        tmp_path / "q.star",
        particles,
        rotations=rotations,
        half_set=np.array([2, 1]),
        extra={"mine": ["1", "2"]},
    )
    star = read_star(tmp_path / "q.star")
    assert {k: star.blocks["optics"].columns[k] for k in optics} == optics
    assert {k: star.blocks["particles"].columns[k] for k in table} == table
    assert star.blocks["extra"] == blocks["extra"]
    again = open_particles(tmp_path / "q.star")
    np.testing.assert_allclose(again.rotations, rotations, atol=1e-7)
    assert again.half_set.tolist() == [2, 1]
    assert again.shifts is None
    assert star.blocks["particles"].columns["mine"] == ["1", "2"]


def test_a_particle_column_overrides_the_optics_table(tmp_path: Path) -> None:
    optics = OPTICS | {"rlnAmplitudeContrast": ["0.1"]}
    defocus = {label: ["1000"] for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")}
    star = save_star(tmp_path / "p.star", {"rlnImageName": names(1), "rlnVoltage": ["120"]} | defocus, optics)
    particles = open_particles(star, require_images=False)
    assert particles.ctf["voltage"].tolist() == [120]
    assert particles.ctf["spherical_aberration"].tolist() == [2.7]


def test_missing_ctf_is_none_and_can_be_given(tmp_path: Path) -> None:
    defocus = {label: ["1000"] for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")}
    star = save_star(tmp_path / "p.star", {"rlnImageName": names(1)} | defocus, OPTICS)
    particles = open_particles(star, require_images=False)
    assert particles.ctf is None
    assert particles.ctf_missing == ("rlnAmplitudeContrast",)
    given_one = open_particles(star, require_images=False, ctf_given={"amplitude_contrast": 0.07, "voltage": 1.0})
    assert given_one.ctf["amplitude_contrast"].tolist() == [0.07]
    assert given_one.ctf["voltage"].tolist() == [300]
    write_particles(tmp_path / "q.star", given_one)
    assert read_star(tmp_path / "q.star").blocks["optics"].columns["rlnAmplitudeContrast"] == ["0.070000"]
    with pytest.raises(CryorbitError, match="unknown CTF field q0"):
        open_particles(star, ctf_given={"q0": 1.0})


def test_a_bare_stack_becomes_a_relion_file_without_invented_numbers(tmp_path: Path) -> None:
    images = save_stack(tmp_path / "s.mrcs", 3)
    particles = open_particles(tmp_path / "s.mrcs", invert_contrast=True)
    np.testing.assert_array_equal(particles.read([1]), -images[[1]])
    (tmp_path / "out").mkdir()
    write_particles(tmp_path / "out/p.star", particles)
    star = read_star(tmp_path / "out/p.star")
    assert set(star.blocks["optics"].columns) == {
        "rlnOpticsGroupName", "rlnOpticsGroup", "rlnImageDimensionality", "rlnImageSize", "rlnImagePixelSize",
    }  # fmt: skip
    assert star.blocks["particles"].columns["rlnImageName"] == [f"{i:06d}@../s.mrcs" for i in (1, 2, 3)]
    np.testing.assert_array_equal(open_particles(tmp_path / "out/p.star").read([1]), -images[[1]])
    write_particles(tmp_path / "out/r.star", particles, relative_to=tmp_path)
    assert read_star(tmp_path / "out/r.star").blocks["particles"].columns["rlnImageName"][0] == "000001@s.mrcs"


def test_a_list_of_stacks(tmp_path: Path) -> None:
    a, b = save_stack(tmp_path / "a.mrcs", 2, seed=1), save_stack(tmp_path / "b.mrcs", 1, seed=2)
    (tmp_path / "l.txt").write_text("b.mrcs\n\na.mrcs\n")
    particles = open_particles(tmp_path / "l.txt")
    np.testing.assert_array_equal(particles.read([0, 1, 2]), np.concatenate([b, a]))
    (tmp_path / "l.txt").write_text("\n")
    with pytest.raises(CryorbitError, match="FILE012"):
        open_particles(tmp_path / "l.txt")


def test_pixel_size_conflicts(tmp_path: Path) -> None:
    save_stack(tmp_path / "s.mrcs", 2, pixel=1.0)
    star = save_star(tmp_path / "p.star", {"rlnImageName": names(2)}, OPTICS)
    particles = open_particles(star)
    assert particles.pixel_size == 1.5
    assert "header says 1 A per pixel, the metadata 1.5 A" in particles.warnings[0]
    assert open_particles(star, pixel_size=2.0).pixel_size == 2.0
    two = save_star(tmp_path / "q.star", {"rlnImageName": names(2), "rlnImagePixelSize": ["1.5", "1.6"]})
    with pytest.raises(CryorbitError, match=r"from 1\.5000 to 1\.6000"):
        open_particles(two)
    assert "1.5 to 1.6 A" in " ".join(open_particles(two, pixel_size=1.55).warnings)


BAD = {
    "STAR010": {"rlnCoordinateX": ["1"]},
    "STAR011": {"rlnImageName": []},
    "STAR012": {"rlnImageName": ["1@s.mrcs"], "rlnAngleRot": ["abc"], "rlnAngleTilt": ["1"], "rlnAnglePsi": ["1"]},
    "STAR013": {"rlnImageName": ["1@s.mrcs"], "rlnOpticsGroup": ["1"]},
    "DATA020": {"rlnImageName": ["0@s.mrcs"]},
    "DATA022": {"rlnImageName": ["4@s.mrcs"]},
    "DATA021": {"rlnImageName": ["1@s.mrcs", "1@wide.mrcs"]},
    "DATA025": {"rlnImageName": ["1@s.mrcs"], "rlnCtfDataAreCtfPremultiplied": ["1"]},
    "DATA026": {"rlnImageName": ["1@s.mrcs"], "rlnImageDimensionality": ["3"]},
    "DATA027": {"rlnImageName": ["1@unknown.mrcs"]},
    "FILE003": {"rlnImageName": ["1@s.tif"]},
}


@pytest.mark.parametrize("code", BAD)
def test_each_fault_has_its_code(tmp_path: Path, code: str) -> None:
    save_stack(tmp_path / "s.mrcs", 3)
    save_stack(tmp_path / "wide.mrcs", 3, box=10)
    save_stack(tmp_path / "unknown.mrcs", 3, pixel=0.0)
    (tmp_path / "s.tif").write_bytes(b"II")
    with pytest.raises(CryorbitError) as caught:
        open_particles(save_star(tmp_path / "p.star", BAD[code]))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("optics", "group", "match"),
    [
        (OPTICS, ["2"], r"group\(s\) \[2\]"),
        (
            OPTICS | {"rlnOpticsGroup": ["1", "2"]} | {k: v * 2 for k, v in OPTICS.items() if k != "rlnOpticsGroup"},
            None,
            "2 optics groups",
        ),
        ({"rlnImagePixelSize": ["1.5"]}, ["1"], "lacks the column rlnOpticsGroup"),
    ],
)
def test_broken_optics_tables(
    tmp_path: Path, optics: dict[str, list[str]], group: list[str] | None, match: str
) -> None:
    save_stack(tmp_path / "s.mrcs", 1)
    table = {"rlnImageName": names(1)} | ({"rlnOpticsGroup": group} if group else {})
    with pytest.raises(CryorbitError, match=match):
        open_particles(save_star(tmp_path / "p.star", table, optics))


def test_out_of_range_names_the_image_and_the_count(tmp_path: Path) -> None:
    save_stack(tmp_path / "s.mrcs", 3)
    with pytest.raises(CryorbitError, match=r"2 image number\(s\).*000009@s\.mrcs, but s\.mrcs holds 3"):
        open_particles(save_star(tmp_path / "p.star", {"rlnImageName": ["000001@s.mrcs", "000009@s.mrcs", "5@s.mrcs"]}))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    particles = new_particles(names(1), 1.0, 8)
    write_particles(tmp_path / "p.star", particles)
    before = (tmp_path / "p.star").read_bytes()
    with pytest.raises(CryorbitError, match="STAR006"):
        write_particles(tmp_path / "p.star", particles, extra={"x": ["1", "2"]})
    assert (tmp_path / "p.star").read_bytes() == before
    assert os.listdir(tmp_path) == ["p.star"]


def test_a_read_only_file_system_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CryorbitError, match=r"FILE002.*Read-only file system"):
        write_particles(tmp_path / "p.star", new_particles(names(1), 1.0, 8))
    assert not os.listdir(tmp_path)


def test_unread_images_say_so() -> None:
    with pytest.raises(CryorbitError, match="DATA023"):
        new_particles(names(1), 1.0, 8).read([0])


def test_warp_writes_the_fall_off_as_a_negative_bfactor(tmp_path: Path) -> None:
    ctf = {label: ["1000", "1000"] for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")}
    optics = OPTICS | {"rlnAmplitudeContrast": ["0.1"]}
    table = {"rlnImageName": names(2), "rlnCtfBfactor": ["-13", "0"]} | ctf
    particles = open_particles(save_star(tmp_path / "p.star", table, optics), require_images=False)
    assert particles.ctf["bfactor"].tolist() == [13, 0]
    assert any("Warp" in warning for warning in particles.warnings)
    table["rlnCtfBfactor"] = ["-13", "20"]
    mixed = open_particles(save_star(tmp_path / "q.star", table, optics), require_images=False)
    assert mixed.ctf["bfactor"].tolist() == [-13, 20]
