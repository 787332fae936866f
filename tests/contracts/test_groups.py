"""Laws every group of ``groups/registry.py`` keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cryorbit.groups.registry import GROUPS
from cryorbit.groups.so3 import SO3
from cryorbit.orbit import Group

TOLERANCE = 3e-6  # radian in float32; shifts are integers


def _wide(elements: Tensor) -> Tensor:
    return elements.double() if elements.is_floating_point() else elements


def _apart(group: Group, a: Tensor, b: Tensor) -> float:
    return float(group.distance(a, b).max())


def associative(group: Group, a: Tensor, b: Tensor, c: Tensor) -> float:
    """Largest violation of (ab)c = a(bc)."""
    return _apart(group, group.compose(group.compose(a, b), c), group.compose(a, group.compose(b, c)))


def neutral(group: Group, a: Tensor, _b: Tensor, _c: Tensor) -> float:
    """Largest violation of ea = ae = a."""
    e = group.identity().to(a.dtype)
    return max(_apart(group, group.compose(e, a), a), _apart(group, group.compose(a, e), a))


def invertible(group: Group, a: Tensor, b: Tensor, _c: Tensor) -> float:
    """Largest violation of a a^-1 = e and (ab)^-1 = b^-1 a^-1."""
    e = group.identity().to(a.dtype)
    product = group.inverse(group.compose(a, b))
    return max(
        _apart(group, group.compose(a, group.inverse(a)), e),
        _apart(group, product, group.compose(group.inverse(b), group.inverse(a))),
    )


def bi_invariant(group: Group, a: Tensor, b: Tensor, c: Tensor) -> float:
    """Largest violation of d(ca, cb) = d(a, b) = d(ac, bc) = d(b, a)."""
    d = group.distance(a, b)
    left = group.distance(group.compose(c, a), group.compose(c, b))
    right = group.distance(group.compose(a, c), group.compose(b, c))
    return max(float((d - other).abs().max()) for other in (left, right, group.distance(b, a)))


LAWS = [associative, neutral, invertible, bi_invariant]


@pytest.fixture(params=sorted(GROUPS))
def group(request: pytest.FixtureRequest) -> Group:
    return GROUPS[request.param]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(group: Group, law: Callable[..., float], generator: torch.Generator) -> None:
    a, b, c = (_wide(group.random(50, generator)) for _ in range(3))
    assert law(group, a, b, c) <= TOLERANCE


def test_conforms_to_the_protocol(group: Group) -> None:
    assert isinstance(group, Group)


def test_distance_is_a_metric(group: Group, generator: torch.Generator) -> None:
    a, b, c = (_wide(group.random(200, generator)) for _ in range(3))
    assert _apart(group, a, a) <= TOLERANCE
    assert float(group.distance(a, b).min()) >= 0
    slack = group.distance(a, b) + group.distance(b, c) - group.distance(a, c)
    assert float(slack.min()) >= -TOLERANCE


def test_same_seed_draws_the_same_elements(group: Group) -> None:
    first, second, other = (group.random(5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_quadrature_weights_sum_to_one(group: Group, n: int) -> None:
    elements, weights = group.quadrature(n)
    assert len(elements) == len(weights)
    assert float(weights.min()) > 0
    assert float(weights.double().sum()) == pytest.approx(1, abs=1e-6)


def test_random_and_quadrature_average_alike(group: Group, generator: torch.Generator) -> None:
    """Haar averages of a smooth function of the distance to a fixed element: draws against nodes."""
    pole = _wide(group.random(1, generator))
    nodes, weights = group.quadrature(4000)
    reach = float(group.distance(_wide(nodes), pole).max())
    by_nodes = (weights.double() * torch.cos(group.distance(_wide(nodes), pole) * (2 / reach))).sum()
    draws = torch.cos(group.distance(_wide(group.random(20000, generator)), pole) * (2 / reach)).double()
    assert float(draws.mean() - by_nodes) == pytest.approx(0, abs=5 * float(draws.std()) / 20000**0.5 + 2e-3)


class _Transposing(SO3):
    """A wrong group: composes in the wrong order on one side only."""

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT


def test_laws_can_fail(generator: torch.Generator) -> None:
    a, b, c = (SO3().random(20, generator).double() for _ in range(3))
    broken = [law.__name__ for law in LAWS if law(_Transposing(), a, b, c) > 0.1]
    assert set(broken) >= {"associative", "neutral", "invertible"}
