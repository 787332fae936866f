"""cryoSPARC's .cs files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryorbit.conventions import rotvec_to_matrix
from cryorbit.errors import CryorbitError
from cryorbit.io.cryodrgn import read_cryodrgn_poses
from cryorbit.io.cs import join, read_cs
from cryorbit.io.mrc import StackWriter
from cryorbit.io.particles import open_particles, write_particles

FIELDS = [
    ("uid", "u8"), ("blob/path", "S40"), ("blob/idx", "u4"), ("blob/shape", "u4", 2), ("blob/psize_A", "f4"),
    ("blob/sign", "f4"), ("ctf/accel_kv", "f4"), ("ctf/cs_mm", "f4"), ("ctf/amp_contrast", "f4"), ("ctf/df1_A", "f4"),
    ("ctf/df2_A", "f4"), ("ctf/df_angle_rad", "f4"), ("ctf/phase_shift_rad", "f4"), ("ctf/exp_group_id", "u4"),
    ("alignments3D/split", "u4"), ("alignments3D/shift", "f4", 2), ("alignments3D/pose", "f4", 3),
    ("alignments3D/psize_A", "f4"), ("alignments3D/class", "u4"),
]  # fmt: skip


def make(count: int, seed: int = 0, sign: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = np.zeros(count, FIELDS)
    array["uid"] = rng.permutation(10_000)[:count]
    array["blob/path"] = b">J1/s.mrcs"
    array["blob/idx"] = np.arange(count)
    array["blob/shape"] = 8
    array["blob/psize_A"] = array["alignments3D/psize_A"] = 1.5
    array["blob/sign"] = sign
    array["ctf/accel_kv"], array["ctf/cs_mm"], array["ctf/amp_contrast"] = 300, 2.7, 0.1
    array["ctf/df1_A"] = rng.uniform(5e3, 3e4, count)
    array["ctf/df2_A"] = array["ctf/df1_A"] - 100
    array["ctf/df_angle_rad"] = rng.uniform(-3, 3, count)
    array["ctf/exp_group_id"] = rng.integers(0, 2, count)
    array["alignments3D/split"] = rng.integers(0, 2, count)
    array["alignments3D/shift"] = rng.normal(0, 3, (count, 2))
    array["alignments3D/pose"] = rng.normal(0, 1, (count, 3))
    return array


def save(path: Path, array: np.ndarray) -> Path:
    with path.open("wb") as stream:
        np.save(stream, array)
    return path


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_numbers_arrive_in_our_conventions(tmp_path_factory: pytest.TempPathFactory, count: int, seed: int) -> None:
    array = make(count, seed)
    particles = open_particles(save(tmp_path_factory.mktemp("c") / "p.cs", array), require_images=False)
    assert (len(particles), particles.box, particles.pixel_size) == (count, 8, 1.5)
    expected = rotvec_to_matrix(array["alignments3D/pose"].astype(float)).transpose(0, 2, 1)
    np.testing.assert_allclose(particles.rotations, expected, atol=1e-6)
    np.testing.assert_allclose(particles.shifts, -1.5 * array["alignments3D/shift"].astype(float), atol=1e-5)
    np.testing.assert_allclose(particles.ctf["defocus_u"], array["ctf/df1_A"], rtol=1e-6)
    np.testing.assert_allclose(particles.ctf["defocus_angle"], array["ctf/df_angle_rad"], atol=1e-6)
    np.testing.assert_array_equal(particles.half_set, array["alignments3D/split"] + 1)
    groups = array["ctf/exp_group_id"]
    np.testing.assert_array_equal(particles.optics_group == particles.optics_group[0], groups == groups[0])


def test_images_are_found_from_the_project_folder_and_the_sign_is_applied(tmp_path: Path) -> None:
    (tmp_path / "J1").mkdir()
    (tmp_path / "J2").mkdir()
    images = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
    with StackWriter(tmp_path / "J1" / "s.mrcs", 4, 8, 1.5) as writer:
        writer.write(images)
    particles = open_particles(save(tmp_path / "J2" / "p.cs", make(4, sign=-1)))
    assert particles.sign == -1
    np.testing.assert_array_equal(particles.read([2, 0]), -images[[2, 0]])
    write_particles(tmp_path / "J2" / "out.star", particles)
    again = open_particles(tmp_path / "J2" / "out.star")
    np.testing.assert_array_equal(again.read([3]), -images[[3]])
    np.testing.assert_allclose(again.rotations, particles.rotations, atol=1e-7)
    assert again.table.columns["cryosparcUid"] == [str(uid) for uid in make(4)["uid"]]
    assert again.table.columns["rlnImageName"][2] == "000003@../J1/s.mrcs"


def test_passthrough_fields_join_by_uid_in_any_order(tmp_path: Path) -> None:
    whole = make(6, 3)
    names = list(whole.dtype.names)
    main = whole[[n for n in names if not n.startswith("ctf/")]]
    rest = whole[[n for n in names if n == "uid" or n.startswith("ctf/")]][::-1]
    rest = np.concatenate([rest, rest[:1]])
    rest["uid"][-1] = 77_777  # a particle that the first file does not have
    a, b = save(tmp_path / "a.cs", main), save(tmp_path / "b.cs", rest)
    assert open_particles(a, require_images=False).ctf is None
    joined = open_particles(a, passthrough=b, require_images=False)
    np.testing.assert_allclose(joined.ctf["defocus_u"], whole["ctf/df1_A"], rtol=1e-6)
    with pytest.raises(CryorbitError, match="1 of 6 particles are not in it"):
        join(read_cs(a), read_cs(b)[1:], "a.cs")
    with pytest.raises(CryorbitError, match="CONF051"):
        open_particles(tmp_path / "x.star" if (tmp_path / "x.star").write_text("data_") else a, passthrough=b)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"no numpy", "CS001"),
        (b"\x94CSDAT\x00\x00", "CS002"),
        (b"", "CS001"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '|O'", "CS001"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / "x.cs").write_bytes(content)
    with pytest.raises(CryorbitError) as caught:
        read_cs(tmp_path / "x.cs")
    assert caught.value.code == code


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.cs").open("wb") as stream:
        np.save(stream, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(CryorbitError, match="CS001"):
        read_cs(tmp_path / "x.cs")


def test_mixed_signs_missing_blobs_and_empty_files(tmp_path: Path) -> None:
    mixed = make(3)
    mixed["blob/sign"][1] = -1
    bare = make(3)[["uid", "ctf/accel_kv"]]
    for array, match in ((mixed, "both signs"), (bare, "lacks blob/path"), (make(0), "no rows")):
        with pytest.raises(CryorbitError, match=match):
            open_particles(save(tmp_path / "x.cs", array), require_images=False)


def test_poses_are_those_cryodrgn_takes_from_the_same_file(shared_data: Path) -> None:
    folder = shared_data / "metadata/cryodrgn"
    particles = open_particles(folder / "cryosparc_P12_J24_001_particles.cs", require_images=False)
    rotations, shifts = read_cryodrgn_poses(folder / "pose.cs.pkl", 180, particles.pixel_size)
    assert np.abs(particles.rotations - rotations).max() < 1e-6
    assert np.abs(particles.shifts - shifts).max() < 1e-4
    assert np.abs(particles.shifts).max() > 30


def test_star_and_cs_of_the_same_particles_agree(shared_data: Path) -> None:
    folder = shared_data / "particles_real/empiar10076_7"
    cs, star = open_particles(folder / "empiar_10076_7.cs"), open_particles(folder / "empiar_10076_7.star")
    assert cs.pixel_size == pytest.approx(star.pixel_size, rel=1e-5)
    for field in star.ctf:
        np.testing.assert_allclose(cs.ctf[field], star.ctf[field], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cs.read([0, 6]), -star.read([0, 6]))
