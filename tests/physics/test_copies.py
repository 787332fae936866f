"""Turned and mirrored copies of images: a group, exact on pixels, and each the projection of the same map at the pose it is said to have."""

import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.groups.so3 import random_rotations
from cryorbit.physics.copies import GROUPS, Copies
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.slicing import slicing_grid

BOXES = (14, 15)


@pytest.mark.parametrize("box", BOXES)
def test_copies_are_the_projections_of_the_same_map_at_their_own_poses(box, generator):
    """Slices of noise, which has no symmetry: turned, mirrored, and shifted, at the poses ``G R``."""
    disk = fourier_disk(box)
    grid = slicing_grid(torch.randn(box, box, box, generator=generator), disk.radius)
    copies = Copies.of("d4", disk)
    rotation, shift = random_rotations(1, generator), torch.tensor([[1.3, -0.6]])
    image = forward(grid, rotation, shift, disk, None)
    which = torch.arange(8)
    expected = forward(grid, copies.moves @ rotation, (copies.moves[:, :2, :2] @ shift[..., None])[..., 0], disk, None)
    made = copies.images(image.expand(8, -1), which)
    torch.testing.assert_close(made, expected, atol=1e-5 * float(image.abs().max()), rtol=0)
    back, moved = copies.back((copies.moves @ rotation)[:, None], (copies.moves[:, :2, :2] @ shift[0])[:, None], which)
    torch.testing.assert_close(back, rotation.expand(8, 1, 3, 3))
    torch.testing.assert_close(moved, shift.expand(8, 1, 2))


@pytest.mark.parametrize("box", BOXES)
def test_copies_are_turned_and_mirrored_pixels(box, generator):
    """A quarter turn takes x to y; the mirror takes x to -x."""
    disk = fourier_disk(box, 0.4 * box)
    values = images_to_disk(torch.randn(1, box, box, generator=generator), disk)
    image = disk_to_images(values, disk)[0]
    copies = Copies.of("d4", disk)
    inner = slice(1 - box % 2, box)  # of an even box the first row has no mirror image
    cut = image[inner, inner]
    for which, expected in ((0, cut), (1, torch.rot90(cut, -1)), (2, torch.rot90(cut, 2)), (4, cut.flip(1))):
        made = disk_to_images(copies.images(values, torch.tensor([which])), disk)[0]
        torch.testing.assert_close(made[inner, inner], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GROUPS)
def test_moves_are_a_group_of_rotations(name):
    moves = Copies.of(name, fourier_disk(8)).moves
    assert torch.equal(moves[0], torch.eye(3))
    assert torch.linalg.det(moves).tolist() == [1.0] * len(moves)
    every = {tuple(m.flatten().tolist()) for m in moves}
    assert len(every) == len(moves) == {"c1": 1, "c2": 2, "c4": 4, "d4": 8}[name]
    assert {tuple((a @ b).flatten().tolist()) for a in moves for b in moves} == every


def test_an_unknown_group_is_refused():
    with pytest.raises(ConfigError, match="CONF504"):
        Copies.of("c3", fourier_disk(8))
