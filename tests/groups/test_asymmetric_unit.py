"""The asymmetric unit covers every orbit of a rotation grid, about once."""

import pytest
import torch

from cryorbit.groups.point import asymmetric_unit, point_group
from cryorbit.groups.so3 import healpix_grid, random_rotations


@pytest.mark.parametrize("name", ["C1", "C4", "D2", "T", "O", "I"])
def test_covers_every_rotation_up_to_symmetry_and_is_small(name, generator):
    group = point_group(name).float()
    grid = healpix_grid(2)
    unit = grid[asymmetric_unit(grid, group)]
    assert len(unit) > 0.8 * len(grid) / len(group)
    assert len(unit) < 1.6 * len(grid) / len(group) + 24
    for rotation in random_rotations(30, generator):
        mates = rotation @ group
        cosine = (torch.einsum("sij,gij->sg", mates, unit) - 1) / 2
        assert float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))).min()) < 13.5
