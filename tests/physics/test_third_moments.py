"""Third moments through random filters: noise-free values come back from noisy images, and a map's predictions go through CTFs and shifts."""

import math
import pickle

import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.physics.ctf import ctf
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.third_moments import Seen, ThirdFilters, ThirdSums, stand_ins
from cryorbit.physics.triples import mean_products
from cryorbit.simulate.settings import CTFSettings

POLAR = PolarBasis(16, 4, 8.0)
PLAIN = torch.ones(1, 5)
FOUR = torch.full((4,), 0.25)


def blobs(centres):
    """Images (B, 16, 16) of Gaussians at ``centres`` (B, N, 2) from the middle."""
    axis = torch.arange(16) - 8.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.exp(-((x - centres[..., :1, None]).square() + (y - centres[..., 1:, None]).square()) / 4).sum(dim=1)


def turned(centres, angle):
    """About the middle."""
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    x, y = centres.unbind(-1)
    return torch.stack([c * x - s * y, s * x + c * y], dim=-1)


def off(found, expected):
    return float(((found - expected).norm() / expected.norm()).detach())


def by_order(third, values):
    """Values over the root of their spread: T(0, 0), which is 99 % of the squares and says least, T(0, m), and the rest."""
    a, b = third.filters.pairs.unbind(1)
    return [(values * third.spread.rsqrt())[:, group] for group in (b == 0, (a == 0) & (b > 0), a > 0)]


def off_by_order(third, found, expected):
    return [off(x, y) for x, y in zip(by_order(third, found), by_order(third, expected), strict=True)]


@pytest.fixture
def centres(generator):
    return torch.randn(4, 3, 2, generator=generator)


@pytest.fixture
def filters(centres, generator):
    return ThirdFilters.random(POLAR, 6, 5, generator, blobs(centres))


def gains(radius, generator, count):
    """Of images that differ, some with a change of sign, narrow in real space: (B, len(radius))."""
    width, turn = (torch.rand(count, 1, generator=generator) for _ in range(2))
    return torch.exp(-0.05 * (0.2 + width) * radius**2) * (1 - 0.15 * turn * radius**2)


def test_noise_leaves_no_bias_with_and_without_ctf(filters, centres, generator):
    disk, ring = fourier_disk(16), torch.arange(5.0)
    for optics in (False, True):
        total, clean = None, None
        for _ in range(10):
            images, h = blobs(centres).repeat(1000, 1, 1), None
            if optics:
                seed = int(torch.randint(2**31, (1,), generator=generator))
                whole, h = (gains(r, torch.Generator().manual_seed(seed), 4000) for r in (disk.k_norm, ring))
                images = disk_to_images(images_to_disk(images, disk) * whole, disk)
            sigma = 0.4 + 0.4 * torch.rand(4000, generator=generator)
            noise = sigma[:, None, None] * torch.randn(images.shape, generator=generator)
            parts = [ThirdSums.of(filters, images + noise, sigma**2, h), ThirdSums.of(filters, images, 0.0, h)]
            total, clean = parts if total is None else (total + parts[0], clean + parts[1])
        assert total.count == 40_000
        found = total.debiased(torch.ones(1))
        expected = Seen(filters, found.gains, POLAR)(POLAR.coefficients(blobs(centres)), FOUR)
        still = clean.debiased(torch.ones(1)).values
        through = off_by_order(found, expected, still)
        assert all(x < most for x, most in zip(through, (0.002, 0.01, 0.03), strict=True))
        assert off_by_order(found, expected.conj(), still)[2] > 0.3

        def errors(values, still=still, found=found, count=total.count):
            """Root mean square, in standard errors."""
            return [float((count * x.abs().square().mean()).sqrt()) for x in by_order(found, values - still)]

        assert all(0.5 < x < 1.5 for x in errors(found.values))
        assert min(errors(total.products / total.count)[:2]) > 5
        assert len(found.gains) == 1 or optics


def test_shifted_images_have_the_moments_that_shifted_slices_have(filters, centres, generator):
    count = 10_000
    turns = 2 * math.pi * torch.rand(4, count, generator=generator)
    for sigma in (0.5, 1.0):
        moves = sigma * torch.randn(4 * count // 2, 1, 2, generator=generator)
        moved = turned(centres.repeat_interleave(count, dim=0), turns.flatten()) + torch.cat([moves, -moves])
        seen = ThirdSums.of(filters, blobs(moved), 0.0).debiased(torch.ones(1))
        slices = POLAR.coefficients(blobs(centres))
        blurred, still = (Seen(filters, PLAIN, POLAR, s)(slices, FOUR) for s in (sigma, 0.0))
        known, unknown = (off_by_order(seen, x, seen.values) for x in (blurred, still))
        assert all(a < 0.1 * b for a, b in zip(known, unknown, strict=True))
        assert known[2] < 0.1 < 0.6 < unknown[2]


@pytest.mark.parametrize("sigma", [0.5, 1.1])
def test_shifts_of_few_views_are_as_good_as_those_of_many(filters, generator, sigma):
    """What a view is short of directions to be shifted in, others cannot make up where they are not seen."""
    slices, seen = (
        POLAR.coefficients(blobs(torch.randn(1, 3, 2, generator=generator))),
        Seen(filters, PLAIN, POLAR, sigma),
    )
    angle = 2 * math.pi * torch.arange(24) / 24
    one = slices * torch.polar(torch.ones(24, 1), angle[:, None] * torch.arange(slices.shape[1]))[..., None]
    alone, everywhere = seen(slices, torch.ones(1)), seen(one, torch.full((24,), 1 / 24))
    telling = filters.pairs[:, 0] > 0
    assert off(alone[:, telling], everywhere[:, telling]) < 0.08  # 0.12 and more with a direction less to each side


def test_in_plane_rotation_changes_nothing(filters, centres, generator):
    at, beside = (
        Seen(filters, PLAIN, POLAR)(POLAR.coefficients(blobs(turned(centres, torch.full((4,), t)))), FOUR)
        for t in (0.0, 1.1)
    )
    images = blobs(centres).repeat(50, 1, 1)
    noisy = images + 0.2 * torch.randn(images.shape, generator=generator)
    third = ThirdSums.of(filters, noisy, 0.04).debiased(torch.ones(1))
    assert max(off_by_order(third, beside, at)) < 2e-3


def test_gradients_of_both_implementations(generator):
    re, im = (torch.randn(5, 3, 300, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    share = torch.rand(300, generator=generator, dtype=torch.float64).requires_grad_()
    small = [x.detach()[..., :4].requires_grad_() for x in (re, im, share)]
    assert torch.autograd.gradcheck(lambda *x: mean_products(*x, 3), small)
    single = [x.detach().float().requires_grad_() for x in (re, im, share)]
    weight = torch.randn(mean_products(re, im, share, 3).shape, generator=generator, dtype=torch.complex128)
    for x, y in zip(
        *(
            (value := mean_products(*given, 3), *torch.autograd.grad((value * weight).real.sum(), given))
            for given in ((re, im, share), single)
        ),
        strict=True,
    ):
        assert off(y.to(x), x) < 1e-5


def test_the_gradient_goes_through_ctf_and_shifts(filters, centres, generator):
    seen = Seen(filters, gains(torch.arange(5.0), generator, 3), POLAR, 0.7)
    slices, density = POLAR.coefficients(blobs(centres)).requires_grad_(), FOUR.clone().requires_grad_()
    values = seen(slices, density)
    weight = torch.randn(values.shape, generator=generator).to(values)
    of_slices, of_density = torch.autograd.grad((values * weight).real.sum(), (slices, density))
    step = torch.randn(slices.shape, generator=generator).to(slices) * slices.detach().abs().mean() * 1e-2
    up, down = ((seen(slices + s * step, density) * weight).real.sum().detach() for s in (1, -1))
    assert float((of_slices.conj() * step).real.sum()) == pytest.approx(float(up - down) / 2, rel=1e-2)
    more = ((seen(slices, density + 0.1 * FOUR * torch.arange(4)) - values) * weight).real.sum().detach()
    assert float(of_density @ (0.1 * FOUR * torch.arange(4))) == pytest.approx(float(more), rel=1e-3)


@pytest.mark.parametrize("defocus", [(8000.0, 20000.0), (5000.0, 30000.0)])
def test_a_few_gains_stand_in_for_many_ctfs(defocus, generator):
    ring = torch.arange(10) / 102.4
    h = ctf(CTFSettings(defocus).sample(2000, generator), torch.stack([ring, 0 * ring], dim=1)).double().square()
    optics = torch.einsum("na,nb,nc->abc", h, h, h) / 2000
    found, left = stand_ins(optics)
    assert left < 3e-3
    assert len(found) <= 16
    assert off(torch.einsum("ra,rb,rc->abc", found, found, found), optics) == pytest.approx(left, rel=1e-6)


def test_sums_through_other_filters_are_not_added(filters, centres, generator):
    images = blobs(centres)
    other = ThirdFilters.random(POLAR, 6, 5, generator, images)
    with pytest.raises(DataError, match="DATA408"):
        ThirdSums.of(filters, images, 0.1) + ThirdSums.of(other, images, 0.1)
    halves = [ThirdSums.of(filters, part, 0.1) for part in images.split(2)]
    added = (halves[0] + pickle.loads(pickle.dumps(halves[1]))).debiased(torch.ones(1))  # of another process
    whole = ThirdSums.of(filters, images, 0.1).debiased(torch.ones(1))
    torch.testing.assert_close(added.values, whole.values, rtol=1e-4, atol=1e-6 * float(whole.values.abs().max()))
    torch.testing.assert_close(added.spread, whole.spread, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("wrong", ["filters", "orders", "none", "zero", "infinite"])
def test_filters_that_see_nothing_are_refused(wrong, centres, generator):
    images = blobs(centres) * {"zero": 0.0, "infinite": math.inf}.get(wrong, 1.0)
    images = images[:0] if wrong == "none" else images
    settings = wrong in ("filters", "orders")
    with pytest.raises(ConfigError if settings else DataError, match="CONF123" if settings else "DATA424"):
        ThirdFilters.random(POLAR, 0 if wrong == "filters" else 2, 0 if wrong == "orders" else 3, generator, images)


def test_inner_rings_are_seen_by_filters_that_look_no_further(centres, generator):
    images = blobs(centres)
    both = ThirdFilters.random(POLAR, 6, 5, generator, images, reaches=(2, 4))
    assert both.last_rings.tolist() == [2] * 6 + [4] * 6
    noisy = images.repeat(50, 1, 1) + 0.2 * torch.randn(200, 16, 16, generator=generator)
    third = ThirdSums.of(both, noisy, 0.04).debiased(torch.ones(1))
    small = PolarBasis(16, 2, 8.0)
    alone = ThirdFilters(small, both.weights[:6, : small.orders + 1, :3], 5)
    inner = third.within(2)
    assert inner.filters.basis == small
    assert torch.equal(inner.filters.pairs, alone.pairs)
    there = ThirdSums.of(alone, noisy, 0.04).debiased(torch.ones(1))
    torch.testing.assert_close(inner.values, there.values, rtol=1e-4, atol=1e-5 * float(there.values.abs().max()))
    torch.testing.assert_close(inner.spread, there.spread, rtol=1e-3, atol=0.0)
    assert third.within(3).filters.weights.shape == (6, PolarBasis(16, 3, 8.0).orders + 1, 4)
    assert third.within(4).filters.last_rings.tolist() == [4] * 6
    with pytest.raises(DataError, match="DATA431"):
        third.within(1)
