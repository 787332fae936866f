"""Our forward model against images made by RELION's ``relion_project``: origin and numbers in README.md beside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cryorbit import conventions
from cryorbit.conventions import euler_to_matrix, shift_from_relion
from cryorbit.io.mrc import MrcStack, read_volume
from cryorbit.io.star import StarTable, read_star
from cryorbit.metrics.resample import spectrum
from cryorbit.physics.cryoem import form_images
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import (
    FourierDisk,
    crop_fourier,
    fourier_disk,
    fourier_to_volume,
    images_to_disk,
    volume_to_fourier,
)
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.types import CTFParams

HERE = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Golden:
    """One stack and what it takes to predict it; bounds are about twice what was measured.

    ``error`` and ``ring`` hold for slices read as RELION reads them, trilinearly: they test every convention. The
    ``spline`` bounds hold for our own projector, whose distance from RELION is the error of RELION's interpolation.
    """

    name: str
    stack: str
    map: str
    pixel_size: float
    error: float
    ring: float
    spline_error: float
    spline_ring: float
    oversampling: int = 2
    has_ctf: bool = False
    crop_to: int | None = None
    map_shift: float = 0.0
    image_shift: float = 0.0


SHIPPED = [
    Golden("proj48", "proj48", "map48.mrc", 2.2, error=2.5e-4, ring=1 - 1e-6, spline_error=0.06, spline_ring=1 - 3e-3),
    Golden(
        "projctf48",
        "projctf48",
        "map48.mrc",
        2.2,
        error=2.5e-4,
        ring=1 - 1e-6,
        spline_error=0.075,
        spline_ring=1 - 3e-3,
        has_ctf=True,
    ),
]
INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["trilinear", "spline"])
_POINT = "particles_simulated/relion_project/"
_ASPIRE = "particles_simulated/aspire/"
_RIBOSOME = "maps/clean70SRibosome_vol_65p.mrc"
SHARED = [
    Golden(
        "proj64",
        "golden/proj64",
        "golden/map64.mrc",
        1.6,
        error=2.5e-4,
        ring=1 - 1e-6,
        spline_error=0.065,
        spline_ring=1 - 2e-3,
    ),
    Golden(
        "projctf64",
        "golden/projctf64",
        "golden/map64.mrc",
        1.6,
        error=2.5e-4,
        ring=1 - 1e-6,
        spline_error=0.08,
        spline_ring=1 - 2e-3,
        has_ctf=True,
    ),
    Golden(
        "point mass, padding 1",
        _POINT + "relion_proj_batch",
        _POINT + "pointmass.mrc",
        3.54,
        error=1e-5,
        ring=1 - 2e-11,
        spline_error=0.2,
        spline_ring=1 - 2e-2,
        oversampling=1,
        has_ctf=True,
    ),
    Golden(
        "point mass, padding 2",
        _POINT + "relion_proj_batch_pfac2",
        _POINT + "pointmass.mrc",
        3.54,
        error=1e-5,
        ring=1 - 2e-11,
        spline_error=0.055,
        spline_ring=1 - 1.3e-3,
        has_ctf=True,
    ),
    Golden(
        "aspire 65",
        _ASPIRE + "rln_proj_65",
        _RIBOSOME,
        1,
        error=7e-4,
        ring=1 - 4e-6,
        spline_error=0.055,
        spline_ring=1 - 2.5e-3,
        image_shift=1,
    ),
    Golden(
        "aspire 65 shifted",
        _ASPIRE + "rln_proj_65_shifted",
        _RIBOSOME,
        1,
        error=7e-4,
        ring=1 - 4e-6,
        spline_error=0.06,
        spline_ring=1 - 2e-3,
        image_shift=1,
    ),
    Golden(
        "aspire 64 centred",
        _ASPIRE + "rln_proj_64_centered",
        _RIBOSOME,
        1,
        error=7e-4,
        ring=1 - 3e-4,
        spline_error=0.06,
        spline_ring=1 - 2e-3,
        crop_to=64,
    ),
    Golden(
        "aspire 64 shifted",
        _ASPIRE + "rln_proj_64_shifted",
        _RIBOSOME,
        1,
        error=7e-4,
        ring=1 - 3e-4,
        spline_error=0.06,
        spline_ring=1 - 2e-3,
        crop_to=64,
    ),
    Golden(
        "aspire 64",
        _ASPIRE + "rln_proj_64",
        _RIBOSOME,
        1,
        error=1e-2,
        ring=1 - 7e-3,
        spline_error=0.06,
        spline_ring=1 - 8e-3,
        crop_to=64,
        map_shift=-0.5,
    ),
]


def _numbers(table: StarTable, *labels: str) -> Tensor:
    return torch.tensor([[float(v) for v in table.columns[label]] for label in labels], dtype=torch.float64).T


def _ctf_params(particles: StarTable, optics: StarTable) -> CTFParams:
    group = torch.tensor([optics.columns["rlnOpticsGroup"].index(g) for g in particles.columns["rlnOpticsGroup"]])
    u, v, angle, phase = _numbers(particles, "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift").unbind(
        -1
    )
    voltage, cs, q0 = _numbers(optics, "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")[group].unbind(-1)
    return CTFParams(
        u, v, torch.deg2rad(angle), torch.deg2rad(phase), voltage, cs, q0, torch.zeros_like(u), torch.ones_like(u)
    )


def _cropped(volume: Tensor, box: int, shift: float) -> Tensor:
    """Fourier crop of an odd map to the even side ``box``, moved by ``shift`` pixels along each axis."""
    side = volume.shape[-1]
    low = (box - 1) // 2
    planes = torch.cat([torch.arange(0, box - low), torch.arange(side - low, side)])
    cut = crop_fourier(volume_to_fourier(volume), side, box)[planes] * (box / side) ** 3
    full = torch.arange(box, dtype=torch.float64)
    full = torch.where(full < box / 2, full, full - box)
    phase = torch.exp(-2j * torch.pi * shift / box * full)
    return fourier_to_volume(cut * phase[:, None, None] * phase[:, None] * phase[: box // 2 + 1], box)


def _load(golden: Golden, folder: Path, interpolation: str) -> tuple[Tensor, Tensor, FourierDisk]:
    """RELION's images and our predictions on the same Fourier pixels, ``trilinear`` or by our own ``spline``."""
    volume = torch.from_numpy(read_volume(folder / golden.map)[0]).double()
    if golden.crop_to:
        volume = _cropped(volume, golden.crop_to, golden.map_shift)
    star = read_star(folder / f"{golden.stack}.star")
    particles = star.blocks["particles"]
    stack = MrcStack(folder / f"{golden.stack}.mrcs")
    images = torch.from_numpy(stack.read(np.arange(len(particles)))).double()
    rotations = euler_to_matrix(_numbers(particles, "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi").numpy())
    if "rlnOriginXAngst" in particles.columns:
        origins = _numbers(particles, "rlnOriginXAngst", "rlnOriginYAngst") / golden.pixel_size
    else:
        origins = _numbers(particles, "rlnOriginX", "rlnOriginY")
    shifts = torch.from_numpy(shift_from_relion(origins.numpy())) + golden.image_shift
    disk = fourier_disk(volume.shape[-1], volume.shape[-1] / 2 - 1.5)
    contrast = None
    if golden.has_ctf:
        contrast = ctf_on_disk(_ctf_params(particles, star.blocks["optics"]), disk, golden.pixel_size)
    turns = torch.from_numpy(rotations)
    if interpolation == "trilinear":
        whole = spectrum(volume, math.ceil(disk.radius), golden.oversampling)
        slices = whole.at((disk.k.double() @ turns[:, :2]).float()).to(torch.complex128)
    else:
        slices = slice_grid(slicing_grid(volume, disk.radius, golden.oversampling), turns, disk)
    return images_to_disk(images, disk), form_images(slices, shifts, disk, contrast), disk


def relative_errors(theirs: Tensor, ours: Tensor, disk: FourierDisk) -> Tensor:
    """(N,) ``|ours - theirs| / |theirs|`` of each image, no scale fitted."""
    power = disk.weight * (theirs.abs() ** 2)
    return ((disk.weight * (ours - theirs).abs() ** 2).sum(-1) / power.sum(-1)).sqrt()


def ring_correlations(theirs: Tensor, ours: Tensor, disk: FourierDisk) -> Tensor:
    """(N, rings) correlation of each image with its prediction on every ring from 1 up."""

    def per_ring(values: Tensor) -> Tensor:
        out = values.new_zeros(len(values), int(disk.shell.max()) + 1)
        return out.index_add(1, disk.shell, disk.weight * values)

    cross = per_ring((theirs * ours.conj()).real)
    return (cross / (per_ring(theirs.abs() ** 2) * per_ring(ours.abs() ** 2)).sqrt())[:, 1:]


def _check(golden: Golden, folder: Path, interpolation: str) -> None:
    theirs, ours, disk = _load(golden, folder, interpolation)
    error, ring = float(relative_errors(theirs, ours, disk).max()), float(ring_correlations(theirs, ours, disk).min())
    print(
        f"{golden.name}, {interpolation}: box {disk.box}, worst relative error {error:.2e}, worst ring correlation 1 - {1 - ring:.1e}"
    )
    assert error < (golden.error if interpolation == "trilinear" else golden.spline_error)
    assert ring > (golden.ring if interpolation == "trilinear" else golden.spline_ring)


@pytest.mark.parametrize("golden", SHIPPED, ids=lambda g: g.name)
@INTERPOLATIONS
def test_shipped(golden: Golden, interpolation: str) -> None:
    _check(golden, HERE, interpolation)


@pytest.mark.parametrize("golden", SHARED, ids=lambda g: g.name)
@INTERPOLATIONS
def test_shared(golden: Golden, interpolation: str, shared_data: Path) -> None:
    _check(golden, shared_data, interpolation)


def _transposed_euler(angles: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(conventions.euler_to_matrix(angles).swapaxes(-1, -2))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("euler_to_matrix", _transposed_euler), ("shift_from_relion", np.asarray)],
    ids=["euler", "shift"],
)
def test_wrong_convention_is_seen(name: str, wrong: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed rotation or a flipped shift ends far outside the bounds."""
    monkeypatch.setitem(globals(), name, wrong)
    theirs, ours, disk = _load(SHIPPED[0], HERE, "spline")
    assert float(relative_errors(theirs, ours, disk).max()) > 0.3


def test_flipped_ctf_sign_is_seen() -> None:
    theirs, ours, disk = _load(SHIPPED[1], HERE, "spline")
    assert float(relative_errors(theirs, -ours, disk).min()) > 1.9
