"""Atomic models and their exact projections, against the defining sum."""

import gzip
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryorbit.conventions import euler_to_matrix
from cryorbit.errors import ConfigError, CryorbitError, DataError, FileError
from cryorbit.groups.so3 import random_rotations
from cryorbit.physics.fourier import disk_to_images, images_to_disk
from cryorbit.simulate.atoms import AtomicModel, model_path, read_model
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.project_atoms import AtomProjector, direct_sum

PDB = """\
ATOM      1  N   MET A   1      11.000   0.000   0.000  1.00 20.00           N
ATOM      2  CA AMET A   1      10.000   2.000   0.000  0.50 40.00           C
ATOM      3  CA BMET A   1      10.000   9.000   0.000  0.50 40.00           C
ATOM      4  H   MET A   1      10.000   0.000   3.000  1.00 10.00           H
ATOM      5  CA  GLY B   1      20.000   0.000   0.000  1.00 20.00           C
HETATM    6 ZN    ZN B 101      12.000   5.000   0.000  1.00 20.00          ZN
HETATM    7  O   HOH B 201      50.000   0.000   0.000  1.00 20.00           O
END
"""


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def adenylate_kinase() -> AtomicModel:
    return read_model("4ake")


def test_shipped_model_is_chain_a_of_4ake(adenylate_kinase: AtomicModel) -> None:
    assert len(adenylate_kinase) == 1656
    assert adenylate_kinase.radius == pytest.approx(36.84, abs=0.01)
    text = gzip.decompress(model_path("4AKE").read_bytes()).decode()
    assert "CC0" in text
    assert len(model_path("4ake").read_bytes()) < 150_000


def test_scattering_factors_at_the_origin(adenylate_kinase: AtomicModel) -> None:
    """Carbon at s = 0 is 2.509 A (International Tables C 4.3.2.2); the B-factor leaves it alone."""
    at_zero = adenylate_kinase.form_factors(torch.zeros(1, dtype=torch.float64))[:, 0]
    assert float(at_zero[1]) == pytest.approx(0.0893 + 0.2563 + 0.7570 + 1.0487 + 0.3575, abs=1e-9)


def test_bfactor_is_the_debye_waller_factor(adenylate_kinase: AtomicModel) -> None:
    s2 = torch.tensor([0.0, 0.01, 0.09], dtype=torch.float64)
    bare = read_model("4ake", bfactor=0.0).form_factors(s2)
    expected = bare * torch.exp(-30.0 * s2 / 4)
    torch.testing.assert_close(adenylate_kinase.form_factors(s2), expected, rtol=1e-12, atol=0)


def test_waters_and_second_conformations_go_ligands_and_hydrogens_stay(tmp_path) -> None:
    path = tmp_path / "small.pdb"
    path.write_text(PDB)
    model = read_model(path)
    assert len(model) == 5
    mass = torch.tensor([14.007, 12.011, 1.008, 12.011, 65.38])
    torch.testing.assert_close(
        (mass[:, None] * model.positions).sum(0) / mass.sum(), torch.zeros(3).double(), atol=1e-3, rtol=0
    )
    both = read_model(path, bfactor=None).widths - read_model(path, bfactor=0.0).widths
    assert both[:, 0].tolist() == pytest.approx([20, 40, 10, 20, 20])
    half = read_model(path).amplitudes[1] / read_model(path).amplitudes[3]
    assert half.tolist() == pytest.approx([0.5] * 5)
    assert len(read_model(path, chains="A")) == 3


@pytest.mark.parametrize(
    ("text", "kwargs", "kind", "code"),
    [
        (PDB, {"chains": "Q"}, ConfigError, "CONF339"),
        (PDB, {"bfactor": -1000.0}, DataError, "DATA333"),
        (PDB, {"bfactor": math.nan}, DataError, "DATA332"),
        (PDB.splitlines()[6] + "\nEND\n", {}, CryorbitError, "DATA331"),
        ("no coordinates here\n", {}, DataError, "DATA331"),
    ],
)
def test_models_that_cannot_be_used(tmp_path, text, kwargs, kind, code) -> None:
    path = tmp_path / "model.pdb"
    path.write_text(text)
    with pytest.raises(kind) as caught:
        read_model(path, **kwargs)
    assert caught.value.code == code


def test_a_file_that_is_no_model(tmp_path) -> None:
    path = tmp_path / "model.cif"
    path.write_text("data_x\nloop_\n_a\n_b\n1\n")
    with pytest.raises(FileError) as caught:
        read_model(path)
    assert caught.value.code == "FILE302"


def test_missing_file_names_the_shipped_models() -> None:
    with pytest.raises(FileError, match="4ake") as caught:
        read_model("nowhere.pdb")
    assert caught.value.code == "FILE301"


@pytest.mark.parametrize(("box", "pixel_size"), [(64, 1.6), (65, 1.6), (128, 0.8)])
def test_projection_is_the_direct_sum(adenylate_kinase, generator, box: int, pixel_size: float) -> None:
    rotations = random_rotations(2, generator)
    projector = AtomProjector(adenylate_kinase, box, pixel_size)
    exact = direct_sum(adenylate_kinase, rotations, projector.disk, pixel_size)
    found = projector(rotations)
    assert relative(found, exact) < 4e-5
    outer = projector.disk.k_norm > 0.4 * box
    assert relative(found[:, outer], exact[:, outer]) < 2e-4


def test_bfactors_of_the_file_too(generator) -> None:
    model = read_model("4ake", bfactor=None)
    projector = AtomProjector(model, 64, 1.6)
    rotations = random_rotations(1, generator)
    assert relative(projector(rotations), direct_sum(model, rotations, projector.disk, 1.6)) < 4e-5


@pytest.mark.parametrize("box", [48, 49])
def test_map_is_what_the_images_are_projections_of(generator, box: int) -> None:
    """Summing the map along an axis is the projection down it: exact, no interpolation in between."""
    model = phantom(radius=25.0, width=4.0)
    projector = AtomProjector(model, box, 2.0)
    volume = projector.volume()
    down_z = images_to_disk(volume.sum(0)[None], projector.disk)
    assert relative(down_z, projector(torch.eye(3)[None])) < 1e-5
    down_x = torch.tensor([[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]])  # image x = map y, image y = map z
    assert relative(images_to_disk(volume.sum(2)[None], projector.disk), projector(down_x)) < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.floats(-15, 15), st.floats(-15, 15), st.floats(-15, 15)),
    st.tuples(st.floats(-180, 180), st.floats(0, 180), st.floats(-180, 180)),
)
def test_atom_lands_where_the_convention_says(position, angles) -> None:
    """An atom at r lands at image (A r)[:2]: the blob's centre of mass, x to the right (columns), y down (rows)."""
    model = AtomicModel(
        torch.tensor([position], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.float64),
        torch.full((1, 1), 8 * math.pi**2 * 3.0**2, dtype=torch.float64),
    )
    rotation = torch.from_numpy(euler_to_matrix(np.array([angles])))
    projector = AtomProjector(model, 40, 2.0)
    image = disk_to_images(projector(rotation), projector.disk)[0].double()
    axis = (torch.arange(40) - 20) * 2.0
    found = torch.stack([(image.sum(0) * axis).sum(), (image.sum(1) * axis).sum()]) / image.sum()
    expected = (rotation[0] @ torch.tensor(position, dtype=torch.float64))[:2]
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


def test_gaussian_blob_has_the_stated_width() -> None:
    sigma = 4.0
    model = AtomicModel(
        torch.zeros(1, 3).double(), torch.ones(1, 1).double(), torch.full((1, 1), 8 * math.pi**2 * sigma**2).double()
    )
    volume = AtomProjector(model, 32, 2.0).volume().double()
    axis = (torch.arange(32) - 16) * 2.0
    assert float(volume.sum()) == pytest.approx(1.0, rel=1e-5)
    assert float((volume.sum((0, 1)) * axis**2).sum().sqrt()) == pytest.approx(sigma, rel=1e-3)


def test_a_model_that_does_not_fit_the_box_is_refused(adenylate_kinase) -> None:
    with pytest.raises(DataError, match="64 px") as caught:
        AtomProjector(adenylate_kinase, 64, 0.8)
    assert caught.value.code == "DATA335"


def test_empty_model_is_refused() -> None:
    with pytest.raises(DataError):
        AtomicModel(torch.zeros(0, 3), torch.zeros(0, 5), torch.zeros(0, 5))


def test_phantom_has_no_symmetry_and_no_mirror_twin() -> None:
    """Second moments that differ by over 10 % leave no axis or mirror plane but by accident."""
    model = phantom()
    weight = model.amplitudes[:, :1]
    second = torch.linalg.eigvalsh((weight * model.positions).T @ model.positions)
    assert bool((second[1:] > 1.1 * second[:-1]).all())
    assert model.radius == pytest.approx(30.0)
    assert relative(phantom(seed=1).positions, model.positions) > 0.5
