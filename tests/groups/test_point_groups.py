"""Point groups: orders, closure, and RELION's axes."""

import math

import numpy as np
import pytest
import torch

from cryorbit.conventions import rotvec_to_matrix
from cryorbit.errors import ConfigError
from cryorbit.groups.point import keep_axes, point_group
from cryorbit.groups.so3 import distance

ORDERS = {
    "C1": 1,
    "C2": 2,
    "C7": 7,
    "D1": 2,
    "D2": 4,
    "D7": 14,
    "T": 12,
    "O": 24,
    "I": 60,
    "I1": 60,
    "I2": 60,
    "I3": 60,
    "I4": 60,
}


def _has_axis(group: torch.Tensor, fold: int, axis: tuple[float, float, float]) -> bool:
    """Whether the group turns by a full turn / fold about ``axis``, by trace and fixed vector."""
    v = torch.tensor(axis, dtype=torch.float64)
    v = v / v.norm()
    fixes = ((group @ v) - v).norm(dim=-1) < 1e-5
    turns = (group.diagonal(dim1=-2, dim2=-1).sum(-1) - (1 + 2 * math.cos(2 * math.pi / fold))).abs() < 1e-6
    return bool((fixes & turns).any())


@pytest.mark.parametrize("name", ORDERS)
def test_is_a_group_of_rotations(name: str) -> None:
    g = point_group(name)
    assert g.shape == (ORDERS[name], 3, 3)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(g[0], eye, atol=0, rtol=0)
    torch.testing.assert_close(g @ g.mT, eye.expand_as(g), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.det(g), torch.ones(len(g), dtype=torch.float64))
    products = (g[:, None] @ g[None]).reshape(-1, 1, 3, 3).expand(-1, len(g), 3, 3)
    assert float(distance(products, g.expand_as(products)).min(dim=1).values.max()) < 1e-6
    separate = distance(g[:, None].expand(-1, len(g), 3, 3), g[None].expand(len(g), -1, 3, 3))
    assert float((separate + 10 * torch.eye(len(g), dtype=torch.float64)).min()) > 0.5


# The axes RELION 5 lists for each name, in its own digits.
RELION_AXES = {
    "C5": [(5, (0, 0, 1))],
    "D3": [(3, (0, 0, 1)), (2, (1, 0, 0))],
    "T": [(3, (0, 0, 1)), (2, (0, 0.816496, 0.577350))],
    "O": [(3, (0.5773502, 0.5773502, 0.5773502)), (4, (0, 0, 1))],
    "I": [(2, (0, 0, 1)), (5, (0.525731114, 0, 0.850650807)), (3, (0, 0.356822076, 0.934172364))],
    "I1": [
        (2, (1, 0, 0)),
        (5, (0.85065080702670, 0, -0.5257311142635)),
        (3, (0.9341723640, 0.3568220765, 0)),
    ],
    "I3": [
        (2, (-0.5257311143, 0, 0.8506508070)),
        (5, (0, 0, 1)),
        (3, (-0.4911234778630044, 0.3568220764705179, 0.7946544753759428)),
    ],
    "I4": [
        (2, (0.5257311143, 0, 0.8506508070)),
        (5, (0.8944271932547096, 0, 0.4472135909903704)),
        (3, (0.4911234778630044, 0.3568220764705179, 0.7946544753759428)),
    ],
}


@pytest.mark.parametrize("name", RELION_AXES)
def test_axes_are_relions(name: str) -> None:
    assert all(_has_axis(point_group(name), fold, axis) for fold, axis in RELION_AXES[name])


def test_axis_check_can_fail() -> None:
    assert not _has_axis(point_group("I1"), 5, (0.525731114, 0, 0.850650807))


@pytest.mark.parametrize("name", ["", "C0", "C", "X3", "I5", "D-2", "C1.5", "OO"])
def test_unknown_name_is_an_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"CONF112.*C<n>, D<n>, T, O, I"):
        point_group(name)


def test_name_may_be_lower_case() -> None:
    torch.testing.assert_close(point_group(" d2"), point_group("D2"))


@pytest.mark.parametrize("name", ["C1", "C2", "C7", "D2", "D7", "T", "O", "I"])
def test_kept_axes_map_the_group_to_itself_and_are_near(name: str) -> None:
    group = point_group(name)
    small = rotvec_to_matrix(np.array([0.02, -0.03, 0.04]))
    for element in group[:: max(1, len(group) // 4)]:
        rotation, shift = keep_axes(torch.from_numpy(small) @ element, torch.tensor([0.3, -0.2, 0.5]).double(), group)
        moved = rotation @ group @ rotation.mT
        gap = (moved[:, None] - group[None]).abs().amax(dim=(-1, -2)).amin(dim=1)
        assert float(gap.max()) < (1e-5 if name != "C1" else 1.0)
        assert float((rotation - element).abs().max()) < 0.06
        expected = {"C1": [0.3, -0.2, 0.5], "C2": [0, 0, 0.5], "C7": [0, 0, 0.5]}.get(name, [0, 0, 0])
        assert shift.tolist() == pytest.approx(expected, abs=1e-6)
