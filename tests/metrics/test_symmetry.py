"""Point groups are found wherever the map lies and turned as it may be, and none is found where there is none."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, random_rotations
from cryorbit.metrics.fsc import fsc, shell_power
from cryorbit.metrics.resample import move_volume
from cryorbit.metrics.symmetry import detect_symmetry
from cryorbit.types import Volume

PIXEL = 4.0


def noisy(volume: Tensor, shell: int, generator: torch.Generator) -> Tensor:
    """White noise that leaves twice as much signal as noise in ``shell``: FSC of half maps 0.5."""
    noise = float((shell_power(volume)[shell] / 2 / volume.numel()).sqrt())
    return volume + noise * torch.randn(volume.shape, generator=generator)


@pytest.fixture
def molecule(draw_atoms: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Map of random balls repeated by a group, turned by a frame and moved; frame and centre (pixels)."""

    def build(name: str, seed: int, box: int = 32) -> tuple[Tensor, Tensor, Tensor]:
        generator, group = torch.Generator().manual_seed(seed), point_group(name)
        unit = torch.randn(max(6, 60 // len(group)), 3, generator=generator, dtype=torch.float64)
        unit = 0.5 * unit / unit.norm(dim=-1, keepdim=True) + (
            0.6 * unit[:1] / unit[:1].norm() if len(group) > 1 else 0
        )
        atoms = torch.einsum("sij,nj->sni", group, unit).reshape(-1, 3)
        atoms = atoms * (0.3 * box / atoms.norm(dim=-1).max())
        frame = random_rotations(1, generator)[0].double()
        middle = 4.0 * torch.rand(3, generator=generator, dtype=torch.float64) - 2.0
        return draw_atoms(atoms @ frame.T + middle, box, box / 32), frame, middle

    return build


@pytest.mark.parametrize(
    ("name", "box"),
    [("C2", 32), ("C3", 33), ("C7", 32), ("D2", 32), ("D7", 48), ("T", 32), ("O", 32), ("I", 32), ("I", 48)],
)
def test_group_and_axes_come_back_through_noise(
    name: str, box: int, generator: torch.Generator, molecule: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    volume, frame, middle = molecule(name, 3, box)
    found = detect_symmetry(Volume(noisy(volume, box // 4, generator), PIXEL))
    assert found.name == name
    assert found.score > 0.8
    assert found.table[-1].name == name
    rotation, shift, group = found.rotation.double(), found.shift.double() / PIXEL, point_group(name)
    ours = rotation.T @ group @ rotation
    true = frame @ group @ frame.T
    apart = torch.stack([distance(r.expand_as(true), true).min() for r in ours])
    assert math.degrees(float(apart.max())) < 3.0
    # where the true centre of the axes goes: onto the origin, along z anywhere when there is one axis
    there = rotation @ middle + shift
    assert float((there[:2] if name.startswith("C") else there).norm()) < 0.4


def test_the_motion_puts_the_map_on_the_axes(molecule: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Moved as told, the map looks the same after each element of the group of ``groups/point.py``."""
    volume, _, _ = molecule("D3", 5, 40)
    found = detect_symmetry(Volume(volume, PIXEL))
    assert found.name == "D3"
    laid = move_volume(volume, found.rotation, found.shift / PIXEL)
    for element in point_group("D3")[1:]:
        assert float(fsc(laid, move_volume(laid, element, torch.zeros(3)))[2:10].min()) > 0.98


@pytest.mark.parametrize("seed", range(4))
def test_no_group_in_a_map_without_one(
    seed: int, generator: torch.Generator, molecule: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    volume, _, _ = molecule("C1", seed)
    assert detect_symmetry(Volume(noisy(volume, 8, generator), PIXEL)).name == "C1"


def test_no_group_in_a_round_map_or_in_noise(generator: torch.Generator, draw_atoms: Callable[..., Tensor]) -> None:
    """400 balls fill a sphere: alike at low resolution at any rotation."""
    inside = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    inside = inside / inside.norm(dim=-1, keepdim=True) * torch.rand(400, 1, generator=generator).double() ** (1 / 3)
    volume = draw_atoms(10.0 * inside + 1.0, 32, 1.0)
    for radius in (None, 5):
        found = detect_symmetry(Volume(noisy(volume, 8, generator), PIXEL), radius=radius)
        assert found.name == "C1"
        assert torch.equal(found.rotation, torch.eye(3))
    assert detect_symmetry(Volume(torch.randn(32, 32, 32, generator=generator), PIXEL)).name == "C1"


def test_a_two_fold_is_not_made_a_larger_group(generator: torch.Generator, draw_atoms: Callable[..., Tensor]) -> None:
    """Four lobes as in haemoglobin, two and two alike: C2, though D2 is near."""
    lobe = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    other = lobe + 0.7 * torch.randn(20, 3, generator=generator, dtype=torch.float64)
    group = point_group("D2")
    turns = [int((group[:, i, i] > 0).nonzero()[1]) for i in (2, 0)]
    unit = torch.cat([lobe, other @ group[turns[1]].T]) * 2.0 + torch.tensor([4.0, 4.0, 3.0])
    unit[20:] = (other * 2.0 + torch.tensor([4.0, 4.0, 3.0])) @ group[turns[1]].T
    atoms = torch.cat([unit, unit @ group[turns[0]].T])
    assert detect_symmetry(Volume(draw_atoms(atoms, 32, 1.0), PIXEL)).name == "C2"


def test_the_fsc_of_the_halves_may_replace_the_noise(
    generator: torch.Generator, molecule: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    volume, _, _ = molecule("D2", 8)
    halves = [noisy(volume, 6, generator) for _ in range(2)]
    found = detect_symmetry(Volume((halves[0] + halves[1]) / 2, PIXEL), mask_diameter=100.0, fsc=fsc(*halves))
    assert found.name == "D2"


def test_maps_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(DataError, match="DATA214"):
        detect_symmetry(Volume(torch.zeros(32, 32, 32), PIXEL))
    with pytest.raises(DataError, match="DATA215"):
        detect_symmetry(Volume(torch.rand(12, 12, 12), PIXEL))
