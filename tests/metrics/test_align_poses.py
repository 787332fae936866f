"""Pose alignment: frame, hand and origin come back, outliers do not matter, and chance looks like chance."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cryorbit.conventions import euler_to_matrix
from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, exp, half_turn, random_rotations
from cryorbit.metrics.align import align_poses, chance_level
from cryorbit.metrics.poses import in_plane_pair_errors, view_angles
from cryorbit.types import Poses


def _scene(generator: torch.Generator, n: int, mirrored: bool, noise_deg: float) -> tuple[Poses, Poses, Tensor, Tensor]:
    """True poses, the same in another frame with noise, and that frame's rotation and origin (angstrom)."""
    true = random_rotations(n, generator).double()
    shifts = 3.0 * torch.randn(n, 2, generator=generator).double()
    frame, origin = random_rotations(1, generator)[0].double(), 4.0 * torch.randn(3, generator=generator).double()
    noisy = exp(math.radians(noise_deg) * torch.randn(n, 3, generator=generator).double()) @ true
    moved = shifts + (noisy @ origin)[:, :2]
    seen = noisy @ frame
    return Poses(true, shifts), Poses(half_turn(seen) if mirrored else seen, moved), frame, origin


@pytest.mark.parametrize("mirrored", [False, True])
def test_frame_hand_and_origin_come_back(mirrored: bool, generator: torch.Generator) -> None:
    true, seen, frame, origin = _scene(generator, 300, mirrored, 0.0)
    found = align_poses(seen, true)
    assert found.mirrored is mirrored
    assert math.degrees(float(distance(found.rotation, frame))) < 1e-3
    torch.testing.assert_close(found.shift, origin, atol=1e-3, rtol=0)
    assert math.degrees(float(found.error.max())) < 1e-3
    assert float(found.shift_error.max()) < 1e-2
    assert found.cost_other_hand > 0.5


def test_a_mirrored_molecule_under_mirrored_poses_has_the_same_projections(generator: torch.Generator) -> None:
    atoms = torch.randn(20, 3, generator=generator)
    rotations = random_rotations(10, generator)
    seen = torch.einsum("bij,nj->bni", rotations, atoms)[..., :2]
    mirror = torch.einsum("bij,nj->bni", half_turn(rotations), -atoms)[..., :2]
    torch.testing.assert_close(seen, mirror)


@pytest.mark.parametrize("mirrored", [False, True])
def test_forty_percent_random_poses_do_not_move_the_frame(mirrored: bool, generator: torch.Generator) -> None:
    true, seen, frame, origin = _scene(generator, 600, mirrored, 2.0)
    bad = torch.rand(600, generator=generator) < 0.4
    rotations, shifts = seen.rotations.clone(), seen.shifts.clone()
    rotations[bad] = random_rotations(int(bad.sum()), generator).double()
    shifts[bad] += 10 * torch.randn(int(bad.sum()), 2, generator=generator).double()
    found = align_poses(Poses(rotations, shifts), true)
    assert found.mirrored is mirrored
    assert math.degrees(float(distance(found.rotation, frame))) < 0.3
    assert float((found.shift - origin).norm()) < 0.3
    summary = found.summary(1.5)
    assert summary.particles == 600
    assert summary.fraction_below_10_deg == pytest.approx(0.6, abs=0.06)
    good = found.error[~bad]
    assert math.degrees(float(good.median())) == pytest.approx(
        2.0 * 1.538, rel=0.1
    )  # median of a chi with 3 degrees of freedom


def test_errors_split_into_view_direction_and_twist(generator: torch.Generator) -> None:
    true, _, _, _ = _scene(generator, 400, False, 0.0)
    twist = exp(torch.tensor([0.0, 0.0, math.radians(8.0)]).double().expand(400, 3))
    flip = torch.where(torch.arange(400)[:, None, None] % 2 == 0, twist, twist.mT)
    found = align_poses(Poses(flip @ true.rotations, true.shifts), true)
    summary = found.summary(1.0)
    assert summary.in_plane_median_deg == pytest.approx(8.0, abs=0.8)
    assert summary.out_of_plane_median_deg < 1.0


def test_random_poses_report_chance(generator: torch.Generator) -> None:
    true, _, _, _ = _scene(generator, 500, False, 0.0)
    guess = Poses(random_rotations(500, generator).double(), true.shifts)
    summary = align_poses(guess, true).summary(1.0)
    assert summary.median_deg > 110  # 132 degrees without any freedom to fit
    assert summary.fraction_below_10_deg < 0.02
    assert math.degrees(chance_level(true, true, generator)) > 110


def test_equivalent_poses_of_a_symmetric_molecule_are_no_error(generator: torch.Generator) -> None:
    group = torch.from_numpy(euler_to_matrix(np.array([[90.0 * k, 0.0, 0.0] for k in range(4)])))
    true, seen, _, _ = _scene(generator, 300, True, 0.0)
    pick = torch.randint(4, (300,), generator=generator)
    scattered = Poses(true.rotations @ group[pick], true.shifts)
    found = align_poses(seen, scattered, symmetry=group)
    assert found.mirrored
    assert math.degrees(float(found.error.max())) < 1e-3
    assert math.degrees(float(align_poses(seen, scattered).error.median())) > 30


def test_counts_must_agree(generator: torch.Generator) -> None:
    true, seen, _, _ = _scene(generator, 5, False, 0.0)
    with pytest.raises(DataError, match="DATA211"):
        align_poses(seen[torch.arange(3)], true)


def test_in_plane_angles_of_classes_are_compared_in_pairs(generator: torch.Generator) -> None:
    true = random_rotations(400, generator).double()
    turn = torch.rand(400, generator=generator, dtype=torch.float64)
    true = true[:4].repeat(100, 1, 1)  # four views
    c, s, zero, one = turn.cos(), turn.sin(), torch.zeros_like(turn), torch.ones_like(turn)
    plane = torch.stack([torch.stack(r, -1) for r in ([c, -s, zero], [s, c, zero], [zero, zero, one])], -2)
    which = torch.arange(400) % 4
    exact = in_plane_pair_errors(which, turn + which, plane @ true, 0.1)  # every class has a frame of its own
    assert len(exact) == 4 * 100 * 99 // 2
    assert float(exact.max()) < 1e-6
    off = in_plane_pair_errors(which, turn + 0.05 * (torch.arange(400) // 4 % 2), plane @ true, 0.1)
    assert abs(float(off.max()) - 0.05) < 1e-6
    mixed = in_plane_pair_errors(torch.zeros_like(which), turn, plane @ true, 0.1)
    assert len(mixed) == len(exact)  # other views do not count
    symmetry = point_group("C4")
    moved = plane @ true @ symmetry[torch.arange(400) // 4 % 4]
    assert float(in_plane_pair_errors(which, turn, moved, 0.1, symmetry).max()) < 1e-6


def test_views_are_apart_by_the_angle_between_beams(generator):
    true = random_rotations(6, generator).double()
    plane = exp(torch.tensor([[0.0, 0.0, 0.7]])).double()
    torch.testing.assert_close(
        view_angles(plane @ true), view_angles(true), atol=1e-6, rtol=0
    )  # whatever the plane does
    tilt = exp(torch.tensor([[0.4, 0.0, 0.0]])).double() @ true[:1]
    assert float(view_angles(torch.cat([true[:1], tilt]))[0, 1]) == pytest.approx(0.4, abs=1e-6)
    group = point_group("C7").double()
    mates = true[0] @ group
    assert float(view_angles(mates, group).max()) < 1e-3
    assert float(view_angles(mates).max()) > 0.1
