"""Each line of ``conventions.py`` and ``docs/conventions.md``, with numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryorbit import conventions as c
from cryorbit.groups.so3 import random_rotations
from cryorbit.physics.ctf import ctf, wavelength
from cryorbit.physics.fourier import disk_to_images, fourier_disk, image_to_fourier, images_to_disk, volume_to_fourier
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import project
from cryorbit.types import CTFParams

ANGLES = np.array(
    [[0, 0, 0], [90, 0, 0], [0, 90, 0], [0, 0, 90], [30, 40, 50], [-160.6, 83.6, 110.2], [12, 180, 34]], dtype=float
)


def _axis(axis: str, degrees: float) -> np.ndarray:
    """A passive elementary rotation, as RELION's ``rotation3DMatrix`` writes it."""
    s, co = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return np.array({"z": [[co, s, 0], [-s, co, 0], [0, 0, 1]], "y": [[co, 0, -s], [0, 1, 0], [s, 0, co]]}[axis])


def _atom_map(box: int, position_xyz: np.ndarray, sigma: float = 1.6) -> torch.Tensor:
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    d2 = (x - position_xyz[0]) ** 2 + (y - position_xyz[1]) ** 2 + (z - position_xyz[2]) ** 2
    return torch.from_numpy(np.exp(-d2 / (2 * sigma**2)))


def _atom_images(box: int, positions_xy: torch.Tensor, sigma: float = 1.6) -> torch.Tensor:
    """(B, D, D) exact projections of that atom when it lands at ``positions_xy``."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    d2 = (x - positions_xy[:, 0, None, None]) ** 2 + (y - positions_xy[:, 1, None, None]) ** 2
    return math.sqrt(2 * math.pi) * sigma * torch.exp(-d2 / (2 * sigma**2))


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def _ctf_params(**changes: float) -> CTFParams:
    values = {
        "defocus_u": 15000.0,
        "defocus_v": 14000.0,
        "defocus_angle": 0.6,
        "phase_shift": 0.0,
        "voltage": 300.0,
        "spherical_aberration": 2.7,
        "amplitude_contrast": 0.1,
        "bfactor": 0.0,
        "scale": 1.0,
    } | changes
    return CTFParams(**{name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()})


# --- rotations ---


@pytest.mark.parametrize("angles", ANGLES)
def test_euler_is_relions_matrix(angles: np.ndarray) -> None:
    rot, tilt, psi = angles
    by_hand = _axis("z", psi) @ _axis("y", tilt) @ _axis("z", rot)
    np.testing.assert_allclose(c.euler_to_matrix(angles), by_hand, atol=1e-15)


def test_euler_is_transposed_scipy() -> None:
    scipy = Rotation.from_euler("ZYZ", ANGLES, degrees=True).as_matrix()
    np.testing.assert_allclose(c.euler_to_matrix(ANGLES), scipy.transpose(0, 2, 1), atol=1e-15)


def test_euler_numbers_of_one_pose() -> None:
    """(30, 40, 50) degrees written out, so that the test does not share a formula with the code."""
    expected = [
        [0.04341204, 0.90961589, -0.41317591],
        [-0.82959837, 0.26325835, 0.49240388],
        [0.55667040, 0.32139381, 0.76604444],
    ]
    np.testing.assert_allclose(c.euler_to_matrix(np.array([30.0, 40.0, 50.0])), expected, atol=1e-8)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(
        st.floats(-180, 180),
        st.sampled_from([0.0, 1e-9, 0.03, 90.0, 179.97, 180.0]) | st.floats(0, 180),
        st.floats(-180, 180),
    )
)
def test_matrix_to_euler_round_trip(angles: tuple[float, float, float]) -> None:
    matrix = c.euler_to_matrix(np.array(angles))
    back = c.matrix_to_euler(matrix)
    assert 0 <= back[1] <= 180
    assert abs(back[0]) <= 180
    assert abs(back[2]) <= 180
    np.testing.assert_allclose(c.euler_to_matrix(back), matrix, atol=2e-7)


@pytest.mark.parametrize("tilt", [0.0, 180.0])
def test_psi_carries_everything_at_the_poles(tilt: float) -> None:
    rot, found_tilt, psi = c.matrix_to_euler(c.euler_to_matrix(np.array([25.0, tilt, 40.0])))
    assert (rot, found_tilt) == (0.0, tilt)
    assert psi == pytest.approx(65.0 if tilt == 0 else 15.0)


@pytest.mark.parametrize("box", [24, 25])
def test_atom_lands_at_first_two_of_rotated_position(box: int) -> None:
    position = np.array([4.0, -2.5, 3.0])
    rotations = torch.from_numpy(c.euler_to_matrix(ANGLES))
    landed = (rotations @ torch.from_numpy(position))[:, :2]
    error = _relative_error(project(_atom_map(box, position), rotations, oversampling=3), _atom_images(box, landed))
    assert error.max() < 0.03  # half a pixel off would be 0.2


def test_transposed_rotation_would_be_noticed() -> None:
    """The check above, made to fail on purpose."""
    position = np.array([4.0, -2.5, 3.0])
    rotations = torch.from_numpy(c.euler_to_matrix(ANGLES[4:6]))
    landed = (rotations @ torch.from_numpy(position))[:, :2]
    error = _relative_error(project(_atom_map(24, position), rotations.mT.contiguous()), _atom_images(24, landed))
    assert error.min() > 0.5


# --- arrays and centres ---


@pytest.mark.parametrize("box", [16, 17])
def test_centre_is_half_the_side(box: int) -> None:
    assert c.centre(box) == box // 2
    image = torch.zeros(box, box, dtype=torch.float64)
    image[c.centre(box), c.centre(box)] = 1
    transform = image_to_fourier(image)
    torch.testing.assert_close(transform, torch.ones_like(transform))
    volume = torch.zeros(box, box, box, dtype=torch.float64)
    volume[(c.centre(box),) * 3] = 1
    transform = volume_to_fourier(volume)
    torch.testing.assert_close(transform, torch.ones_like(transform))


@pytest.mark.parametrize("box", [16, 17])
def test_particle_at_the_centre_stays_for_any_rotation(box: int, generator: torch.Generator) -> None:
    rotations = random_rotations(20, generator).double()
    images = project(_atom_map(box, np.zeros(3)), rotations)
    assert _relative_error(images, _atom_images(box, torch.zeros(20, 2, dtype=torch.float64))).max() < 0.02


def test_arrays_are_zyx() -> None:
    volume = torch.zeros(16, 16, 16, dtype=torch.float64)
    volume[8 + 1, 8 + 2, 8 + 3] = 1  # z, y, x
    image = project(volume, torch.eye(3, dtype=torch.float64)[None])[0]
    assert divmod(int(image.argmax()), 16) == (8 + 2, 8 + 3)


# --- shifts ---


@pytest.mark.parametrize("box", [16, 17])
def test_shift_moves_the_particle(box: int) -> None:
    disk = fourier_disk(box)
    image = _atom_map(box, np.zeros(3)).sum(0)[None]
    shift = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    moved = disk_to_images(images_to_disk(image, disk) * phase_ramp(shift, disk), disk)
    inner = slice(4, 12)
    expected = torch.roll(image, shifts=(-3, 2), dims=(-2, -1))
    torch.testing.assert_close(moved[:, inner, inner], expected[:, inner, inner], atol=2e-4, rtol=0)


def test_shift_is_minus_relions_origin() -> None:
    np.testing.assert_array_equal(c.shift_from_relion(np.array([3.0, -1.5])), [-3.0, 1.5])
    np.testing.assert_array_equal(c.shift_to_relion(np.array([-3.0, 1.5])), [3.0, -1.5])
    assert not np.signbit(c.shift_to_relion(np.zeros(2))).any()  # files hold 0, not -0


# --- CTF ---


def test_wavelength_at_common_voltages() -> None:
    found = wavelength(torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64))
    torch.testing.assert_close(
        found, torch.tensor([0.0370144, 0.0250793, 0.0196875], dtype=torch.float64), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("q0", [0.0, 0.07, 0.1, 1.0])
def test_ctf_at_zero_is_plus_amplitude_contrast(q0: float) -> None:
    assert float(ctf(_ctf_params(amplitude_contrast=q0), torch.zeros(1, 2, dtype=torch.float64))) == pytest.approx(
        q0, abs=1e-15
    )


def test_ctf_is_positive_below_the_first_zero_and_lands_on_it() -> None:
    lam = float(wavelength(torch.tensor(300.0, dtype=torch.float64)))
    params = _ctf_params(defocus_u=15000.0, defocus_v=15000.0, amplitude_contrast=0.0, spherical_aberration=0.0)
    first_zero = math.sqrt(1 / (lam * 15000.0))
    s = torch.tensor([[0.5 * first_zero, 0], [first_zero, 0], [0, 1.2 * first_zero]], dtype=torch.float64)
    low, zero, beyond = ctf(params, s)[0].tolist()
    assert low == pytest.approx(math.sin(math.pi / 4))
    assert abs(zero) < 1e-12
    assert beyond == pytest.approx(math.sin(math.pi * 1.44))


def test_defocus_angle_runs_from_x_to_u() -> None:
    """Along the direction of ``defocus_angle`` the CTF is that of DefocusU alone, across it that of DefocusV."""
    angle, s = 0.6, 0.05
    directions = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    both = ctf(_ctf_params(defocus_u=20000.0, defocus_v=10000.0, defocus_angle=angle), s * directions)[0]
    for value, defocus in zip(both.tolist(), (20000.0, 10000.0), strict=True):
        round_ctf = ctf(
            _ctf_params(defocus_u=defocus, defocus_v=defocus), torch.tensor([[s, 0.0]], dtype=torch.float64)
        )
        assert value == pytest.approx(float(round_ctf), abs=1e-12)


# --- units and other programs ---


def test_rotation_vector_is_scipys() -> None:
    vectors = np.array([[0, 0, 0], [1e-9, 0, 0], [0.3, -0.4, 0.5], [0, math.pi, 0], [2.0, 1.0, -1.5]])
    np.testing.assert_allclose(c.rotvec_to_matrix(vectors), Rotation.from_rotvec(vectors).as_matrix(), atol=1e-14)


def test_cryosparc_pose_is_the_vector_of_the_transpose() -> None:
    """A vector of 90 degrees about z turns x into y; R then takes y to x."""
    found = c.rotation_from_cryosparc(np.array([[0, 0, math.pi / 2]]))[0]
    np.testing.assert_allclose(found, [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(found, c.euler_to_matrix(np.array([90.0, 0.0, 0.0])), atol=1e-15)


def test_cryodrgn_matrix_is_ours() -> None:
    matrix = c.euler_to_matrix(ANGLES)
    np.testing.assert_array_equal(c.rotation_from_cryodrgn(matrix), matrix)


def test_cryosparc_shift_is_pixels_with_relions_sign() -> None:
    np.testing.assert_allclose(c.shift_from_cryosparc(np.array([2.0, -1.0]), 1.5), [-3.0, 1.5])


def test_cryodrgn_shift_is_a_fraction_of_the_box() -> None:
    np.testing.assert_allclose(c.shift_from_cryodrgn(np.array([0.1, -0.05]), 64, 2.0), [-12.8, 6.4])


@pytest.mark.parametrize(("db", "snr"), [(0.0, 1.0), (-10.0, 0.1), (20.0, 100.0), (-3.0, 0.5011872336272722)])
def test_snr_from_db_is_a_power_ratio(db: float, snr: float) -> None:
    assert c.snr_from_db(db) == pytest.approx(snr, rel=1e-15)


def test_document_names_existing_tests() -> None:
    """Every test that ``docs/conventions.md`` promises is a test of this file."""
    text = (Path(__file__).parents[1] / "docs" / "conventions.md").read_text(encoding="utf-8")
    named = {word.strip("`|,. ") for word in text.split() if word.startswith("`test_")}
    assert len(named) >= 12
    assert {name for name in named if name not in globals()} == set()
