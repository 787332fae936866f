"""A small asymmetric molecule of Gaussian balls that can be drawn exactly wherever it is moved."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _atoms() -> Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def draw(atoms: Tensor, box: int, sigma: float = 1.5) -> Tensor:
    """Density (D, D, D) of unit Gaussian balls at ``atoms`` (n, 3) xyz pixels from the centre index."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    gx, gy, gz = (torch.exp(-((axis[None] - atoms[:, i, None]) ** 2) / (2 * sigma**2)) for i in range(3))
    return torch.einsum("nz,ny,nx->zyx", gz, gy, gx).to(torch.float32)


@pytest.fixture
def draw_atoms() -> Callable[..., Tensor]:
    """The drawing function."""
    return draw


@pytest.fixture
def atoms() -> Tensor:
    """24 atoms (24, 3) in pixels, spread over about 8 pixels, no symmetry."""
    return 5.0 * _atoms() * torch.tensor([1.4, 1.0, 0.7], dtype=torch.float64)
