"""Third moments through random filters: noise-free values come back from noisy images, turned images have the same."""

import pytest
import torch

from cryorbit.errors import DataError
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.third_moments import ThirdFilters, ThirdSums, third_of_slices

POLAR = PolarBasis(16, 4, 7.0)


@pytest.fixture
def filters(generator):
    return ThirdFilters.random(POLAR, torch.ones(5), 6, 5, generator)


def clean_images(count, generator):
    axis = torch.arange(16) - 8.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centres = 2.5 * torch.randn(count, 3, 2, generator=generator)
    squares = (x - centres[..., :1, None]).square() + (y - centres[..., 1:, None]).square()
    return torch.exp(-squares / 6).sum(dim=1)


def test_noise_leaves_no_bias(filters, generator):
    clean = clean_images(4, generator)
    expected = third_of_slices(filters, POLAR.coefficients(clean), torch.full((4,), 0.25)).values
    total = None
    for _ in range(20):
        images = clean.repeat(1000, 1, 1) + 0.7 * torch.randn(4000, 16, 16, generator=generator)
        part = ThirdSums.of(filters, images, 0.49)
        total = part if total is None else total + part
    assert total.count == 80_000
    found = total.debiased(torch.ones(1)).values
    raw = total.products / total.count
    assert float((raw - expected).abs().max() / expected.abs().max()) > 0.05
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.01


def test_in_plane_rotation_changes_nothing(filters, generator):
    coefficients = POLAR.coefficients(clean_images(3, generator))
    angle = torch.tensor([0.3, -1.0, 2.0])
    turned = (
        coefficients
        * torch.polar(torch.ones(3, POLAR.orders + 1), -angle[:, None] * torch.arange(POLAR.orders + 1))[..., None]
    )
    torch.testing.assert_close(filters.products(turned), filters.products(coefficients), rtol=1e-4, atol=1e-3)


def test_sums_through_other_filters_are_not_added(filters, generator):
    images = clean_images(2, generator)
    other = ThirdFilters.random(POLAR, torch.ones(5), 6, 5, generator)
    with pytest.raises(DataError, match="DATA408"):
        ThirdSums.of(filters, images, 0.1) + ThirdSums.of(other, images, 0.1)
