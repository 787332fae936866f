"""Maps are laid on each other within 0.3 degrees and 0.1 pixels, over both hands, with and without noise."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, exp, half_turn, random_rotations
from cryorbit.metrics.align import align_poses, align_volumes
from cryorbit.metrics.map_search import improve_alignment
from cryorbit.metrics.masks import lowpass, soft_sphere
from cryorbit.types import Poses, Volume


@pytest.mark.parametrize(("box", "mirrored", "noise"), [(48, False, 0.0), (49, True, 0.5)])
def test_rotation_shift_and_hand_come_back(
    box: int, mirrored: bool, noise: float, generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    here = 0.75 * atoms
    rotation, shift = random_rotations(1, generator)[0].double(), torch.tensor([1.3, -2.4, 0.7], dtype=torch.float64)
    there = (here - shift) @ rotation * (-1 if mirrored else 1)  # rotation @ (+-there) + shift = here
    reference, moving = draw_atoms(here, box), draw_atoms(there, box)
    moving = moving + noise * reference.std() * torch.randn(moving.shape, generator=generator)
    found = align_volumes(Volume(moving, 2.0), Volume(reference, 2.0))
    assert found.mirrored is mirrored
    assert math.degrees(float(distance(found.rotation.double(), rotation))) < 0.3
    assert float((found.shift / 2.0 - shift).norm()) < 0.1
    assert found.score > found.score_other_hand + 0.1
    if noise == 0:
        assert found.correlation > 0.9999
        assert float((found.map.data - reference).norm() / reference.norm()) < 0.01


@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.1), (0.02, 0.4)])
def test_nearly_aligned_maps_are_not_held_by_their_grid(
    noise: float, most: float, generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    """Off its grid points a transform reads lower, so a correlation with maps on their grid is best at no motion at all."""
    turn = exp(torch.tensor([0.007, 0.005, -0.016]))
    here = 0.75 * atoms
    still, moving = draw_atoms(here, 48), draw_atoms(here @ turn.to(here), 48)
    moving = moving + noise * still.std() * torch.randn(moving.shape, generator=generator)
    rotation, shift, _ = improve_alignment(moving, still, (torch.eye(3), torch.zeros(3), False), rounds=1)
    assert math.degrees(float(distance(rotation, turn))) < most  # of 1.05
    assert float(shift.norm()) < 0.01


def test_noise_does_not_part_maps_that_lie_on_each_other(
    generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    """Read between its grid points a transform fades outwards, and noise with it: where one map is read on its grid, it looks better off it."""
    still = draw_atoms(0.75 * atoms, 48)
    sphere = soft_sphere(48, 18.0, 3.0)
    first, second = ((still + 0.3 * still.std() * torch.randn(still.shape, generator=generator)) * sphere for _ in "ab")
    rotation, shift, _ = improve_alignment(first, second, (torch.eye(3), torch.zeros(3), False), rounds=1)
    assert math.degrees(float(distance(rotation, torch.eye(3)))) < 0.15
    assert float(shift.norm()) < 0.05


def test_maps_and_poses_agree_on_the_frame(
    generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    """One molecule in two frames: the motion that lays its map on the truth is the one that lays its poses on the
    truth.
    """
    frame, origin = random_rotations(1, generator)[0].double(), torch.tensor([2.0, -1.0, 1.5], dtype=torch.float64)
    here = 0.75 * atoms
    there = -(here - origin) @ frame
    true = Poses(random_rotations(100, generator).double(), torch.zeros(100, 2).double())
    seen = half_turn(true.rotations @ frame)
    landed = torch.einsum("bij,nj->bni", true.rotations, here)[..., :2]
    shifts = (landed - torch.einsum("bij,nj->bni", seen, there)[..., :2]).mean(dim=1)
    poses = align_poses(Poses(seen, shifts), true)
    maps = align_volumes(
        Volume(draw_atoms(there, 48), 1.0),
        Volume(draw_atoms(here, 48), 1.0),
        start=(poses.rotation, poses.shift, poses.mirrored),
    )
    assert poses.mirrored
    assert maps.mirrored
    assert math.degrees(float(distance(poses.rotation, frame))) < 1e-3
    torch.testing.assert_close(poses.shift, origin, atol=1e-3, rtol=0)
    assert math.degrees(float(distance(maps.rotation.double(), frame))) < 0.3
    assert float((maps.shift - origin).norm()) < 0.1


def test_grids_that_differ_are_refused(atoms: Tensor, draw_atoms: Callable[..., Tensor]) -> None:
    volume = draw_atoms(atoms * 0.4, 24)
    with pytest.raises(DataError, match="DATA212"):
        align_volumes(Volume(volume, 2.0), Volume(volume, 2.2))
    with pytest.raises(DataError, match="DATA213"):
        align_volumes(Volume(torch.zeros(24, 24, 24), 2.0), Volume(volume, 2.0))


@pytest.mark.parametrize("mirrored", [True])
def test_coarse_noisy_maps_find_their_place(
    mirrored: bool, generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    """A map that ends at a third of Nyquist, with strong noise in its band: the right basin and the right hand."""
    here = 0.75 * atoms
    rotation, shift = random_rotations(1, generator)[0].double(), torch.tensor([-2.0, 1.0, 2.5], dtype=torch.float64)
    there = (here - shift) @ rotation * (-1 if mirrored else 1)
    reference, moving = draw_atoms(here, 48), lowpass(draw_atoms(there, 48), 6.0, 1.0)
    noise = lowpass(torch.randn(48, 48, 48, generator=generator), 6.0)
    found = align_volumes(Volume(moving + 0.6 * moving.std() / noise.std() * noise, 2.0), Volume(reference, 2.0))
    assert found.mirrored is mirrored
    assert math.degrees(float(distance(found.rotation.double(), rotation))) < 4.0
    assert float((found.shift / 2.0 - shift).norm()) < 0.5


def test_round_molecule_finds_its_place(draw_atoms: Callable[..., Tensor]) -> None:
    """A shell of 24 equal subunits looks like a ball at low resolution; its orientation and hand show only further out."""
    group, errors = point_group("O").to(torch.float64), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        subunit = torch.nn.functional.normalize(torch.randn(10, 3, generator=generator, dtype=torch.float64), dim=-1)
        here = 14 * torch.einsum("sij,nj->sni", group, subunit).reshape(-1, 3)
        rotation = random_rotations(1, generator)[0].double()
        reference, moving = draw_atoms(here, 48), draw_atoms(-here @ rotation, 48)
        wrong = draw_atoms((here @ random_rotations(6, generator).double()).reshape(-1, 3), 48) / 6
        moving = moving + 0.5 * wrong + 1.5 * moving.std() * torch.randn(moving.shape, generator=generator)
        found = align_volumes(Volume(moving, 2.0), Volume(reference, 2.0))
        assert found.mirrored
        turned = group @ rotation
        nearest = turned[distance(turned, found.rotation.double().expand_as(turned)).argmin()]
        errors.append(math.degrees(float(distance(nearest, found.rotation.double()))))
        best, _, _ = improve_alignment(moving, reference, (nearest.float(), torch.zeros(3), True))
        assert math.degrees(float(distance(best, found.rotation))) < 0.3  # the maximum next to the truth
    assert sum(errors) / len(errors) < 0.6  # where noise puts that maximum: 0.41 in the mean of 28 such maps
