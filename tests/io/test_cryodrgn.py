"""cryoDRGN's pickles: numpy arrays only, nothing executed; conventions against images and STAR files."""

import os
import pickle
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from cryorbit.errors import CryorbitError, DataError, FileError
from cryorbit.io.attach import attach_cryodrgn
from cryorbit.io.cryodrgn import read_arrays, read_cryodrgn_ctf, read_cryodrgn_poses, read_index
from cryorbit.io.particles import open_particles
from cryorbit.io.relion import CTF_LABELS


class Evil:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def save(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(8, 400),
    st.floats(0.5, 5),
    st.sampled_from([2, 3, 4, 5]),
    st.sampled_from(["f4", "f8"]),
)
def test_poses_round_trip(
    tmp_path_factory: pytest.TempPathFactory, count: int, box: int, pixel: float, protocol: int, dtype: str
) -> None:
    rotations = Rotation.random(count, random_state=count).as_matrix().astype(dtype)
    fractions = np.random.default_rng(count).uniform(-0.2, 0.2, (count, 2))
    path = save(tmp_path_factory.mktemp("p") / "poses.pkl", (rotations, fractions), protocol)
    found, shifts = read_cryodrgn_poses(path, box, pixel)
    np.testing.assert_array_equal(found, rotations)
    np.testing.assert_allclose(shifts, -fractions * box * pixel)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 60_000), min_size=1, max_size=5), st.integers(8, 512), st.floats(0.5, 8))
def test_ctf_round_trip(tmp_path_factory: pytest.TempPathFactory, defocus: list[float], box: int, pixel: float) -> None:
    table = np.array([[box, pixel, d, d + 100, 45, 300, 2.7, 0.1, 90] for d in defocus])
    fields, found_box, found_pixel = read_cryodrgn_ctf(save(tmp_path_factory.mktemp("c") / "ctf.pkl", table))
    assert (found_box, found_pixel) == (box, pixel)
    np.testing.assert_allclose(fields["defocus_v"], np.array(defocus) + 100)
    np.testing.assert_allclose(fields["defocus_angle"], np.pi / 4)
    np.testing.assert_allclose(fields["phase_shift"], np.pi / 2)
    assert set(fields) == set(CTF_LABELS)


def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = save(tmp_path / "evil.pkl", Evil(marker))
    with pytest.raises(FileError, match=r"asks for .*system") as caught:
        read_arrays(path)
    assert caught.value.code == "PKL001"
    assert not marker.exists()


@pytest.mark.parametrize(
    "value", [{"a": 1}, "text", 3, [], (np.zeros(3), "x"), np.array([object()]), np.array(["a"]), Path("x"), eval]
)
def test_anything_but_arrays_of_numbers_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(FileError, match="PKL001"):
        read_arrays(save(tmp_path / "x.pkl", value))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_give_one_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("r") / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(CryorbitError, match="PKL001"):
        read_arrays(path)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (np.zeros((3, 3)), "PKL002"),
        ((np.stack([np.eye(3)] * 2), np.zeros((3, 2))), "PKL002"),
        ((np.stack([np.eye(3)] * 2),) * 3, "PKL002"),
        (np.stack([np.eye(3) * 2]), "PKL003"),
        (np.stack([np.diag([1.0, 1, -1])]), "PKL003"),
        (np.full((1, 3, 3), np.nan), "PKL003"),
    ],
)
def test_wrong_poses_are_refused(tmp_path: Path, value: object, code: str) -> None:
    with pytest.raises(CryorbitError) as caught:
        read_cryodrgn_poses(save(tmp_path / "p.pkl", value), 10, 1.0)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("value", "code"),
    [(np.zeros((3, 8)), "PKL002"), (np.full((2, 9), np.nan), "PKL003"), (np.array([[10.0] * 9, [12.0] * 9]), "PKL003")],
)
def test_wrong_ctf_is_refused(tmp_path: Path, value: object, code: str) -> None:
    with pytest.raises(CryorbitError) as caught:
        read_cryodrgn_ctf(save(tmp_path / "c.pkl", value))
    assert caught.value.code == code


def test_the_index_of_cryodrgn(shared_data: Path, tmp_path: Path) -> None:
    index = read_index(shared_data / "metadata/cryodrgn/ind100.pkl")
    assert index.shape == (100,)
    with pytest.raises(FileError, match="PKL002"):
        read_index(save(tmp_path / "i.pkl", np.zeros(3)))


@pytest.mark.parametrize(("name", "count"), [("D", 576), ("E", 720)])
def test_tomodrgn_pickles_are_their_star_file(shared_data: Path, name: str, count: int) -> None:
    folder = shared_data / "particles_simulated/tomodrgn_10076"
    truth = open_particles(folder / f"10076_class{name}_32_sim.star", datadir=folder)
    rotations, shifts = read_cryodrgn_poses(folder / f"pose_class{name}.pkl", truth.box, truth.pixel_size)
    assert len(rotations) == count
    assert np.abs(rotations - truth.rotations).max() < 1e-6
    assert np.abs(shifts - truth.shifts).max() < 1e-5
    assert truth.shifts.std() > 20
    fields, box, pixel = read_cryodrgn_ctf(folder / f"ctf_class{name}.pkl")
    assert (box, pixel) == (32, 13.1)
    for field in set(fields) - {"bfactor", "scale"}:
        np.testing.assert_allclose(fields[field], truth.ctf[field], atol=0.01)


def test_cryodrgn_rotations_make_the_toy_projections(shared_data: Path) -> None:
    volume = mrcfile.read(shared_data / "maps/toymodel_small_nocenter.mrc")
    folder = shared_data / "particles_simulated/cryodrgn"
    stack = open_particles(folder / "toy_projections.mrcs")
    rotations, shifts = read_cryodrgn_poses(folder / "toy_angles.pkl", 30, 1.0)
    assert shifts is None
    z, y, x = np.meshgrid(*[np.arange(30) - 15] * 3, indexing="ij")
    for i in (0, 7, 999):
        sampled = np.stack([x, y, z], -1).reshape(-1, 3) @ rotations[i]  # A^T r
        image = map_coordinates(volume, (sampled[:, ::-1] + 15).T, order=1).reshape(30, 30, 30).sum(0)
        assert np.corrcoef(image.ravel(), stack.read([i]).ravel())[0, 1] > 0.999


def test_poses_and_ctf_attach_to_a_bare_stack(shared_data: Path) -> None:
    folder = shared_data / "particles_simulated/tomodrgn_10076"
    stack = open_particles(folder / "10076_classE_32_sim.mrcs")
    assert stack.ctf is None
    full = attach_cryodrgn(stack, folder / "pose_classE.pkl", folder / "ctf_classE.pkl")
    truth = open_particles(folder / "10076_classE_32_sim.star", datadir=folder)
    np.testing.assert_allclose(full.rotations, truth.rotations, atol=1e-6)
    np.testing.assert_allclose(full.shifts, truth.shifts, atol=1e-5)
    np.testing.assert_allclose(full.ctf["defocus_u"], truth.ctf["defocus_u"], atol=0.01)
    assert full.pixel_size == pytest.approx(13.1)
    np.testing.assert_array_equal(full.read([3]), truth.read([3]))
    with pytest.raises(DataError, match="PKL004"):
        attach_cryodrgn(stack, folder / "pose_classD.pkl")


def test_the_pixel_size_follows_the_box(tmp_path: Path, shared_data: Path) -> None:
    stack = open_particles(shared_data / "particles_simulated/cryodrgn/hand.5.mrcs")
    table = np.array([[128, 1.5, 1e4, 1e4, 0, 300, 2.7, 0.1, 0]] * 5)
    full = attach_cryodrgn(stack, ctf=save(tmp_path / "c.pkl", table))
    assert (full.box, full.pixel_size) == (64, 3.0)
