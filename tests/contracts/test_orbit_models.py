"""What every model of ``physics/registry.py`` keeps: equivariance, gradients, respect for its arguments."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_cases import CASES, OrbitCase
from torch import Tensor
from torch.autograd import gradcheck

from cryorbit.orbit import OrbitModel
from cryorbit.physics.registry import ORBIT_MODELS

TOLERANCE = 1e-10


def equivariance_error(case: OrbitCase) -> float:
    """Largest relative difference between ``observe(h . v, g)`` and ``observe(v, g h)`` over exact g and h."""
    worst = 0.0
    for h in case.exact:
        acted = case.model.observe(case.signal(case.act(h, case.array)), case.exact)
        composed = case.model.group.compose(case.exact, h.expand_as(case.exact))
        direct = case.model.observe(case.signal(case.array), composed)
        worst = max(worst, float((acted - direct).abs().max() / direct.abs().max()))
    return worst


@pytest.fixture(
    params=[(name, odd) for name in ORBIT_MODELS for odd in (False, True)],
    ids=lambda p: f"{p[0]}-{'odd' if p[1] else 'even'}",
)
def case(request: pytest.FixtureRequest, generator: torch.Generator) -> OrbitCase:
    name, odd = request.param
    return CASES[name](odd, generator)


def test_every_registered_model_has_a_case() -> None:
    assert set(CASES) == set(ORBIT_MODELS)


def test_case_is_of_the_registered_class(generator: torch.Generator) -> None:
    for name, build in CASES.items():
        model = build(False, generator).model
        assert type(model) is ORBIT_MODELS[name]
        assert isinstance(model, OrbitModel)


def test_equivariance(case: OrbitCase) -> None:
    assert equivariance_error(case) < TOLERANCE


def test_rows_belong_to_elements(case: OrbitCase) -> None:
    """A batch equals its elements one by one; an empty batch is an empty answer."""
    signal = case.signal(case.array)
    together = case.model.observe(signal, case.generic)
    alone = torch.cat([case.model.observe(signal, g[None]) for g in case.generic])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)
    assert case.model.observe(signal, case.generic[:0]).shape == (0, together.shape[1])


def test_linear_in_the_signal(case: OrbitCase) -> None:
    other = case.array.flip(0) * 0.5

    def observe(array: Tensor) -> Tensor:
        return case.model.observe(case.signal(array), case.generic)

    torch.testing.assert_close(
        observe(2 * case.array + other), 2 * observe(case.array) + observe(other), atol=1e-10, rtol=1e-10
    )


def test_gradcheck(case: OrbitCase, generator: torch.Generator) -> None:
    """In the signal along random directions and, where elements are continuous, in the element."""
    directions = torch.randn(2, *case.array.shape, generator=generator, dtype=torch.float64)

    def observe(step: Tensor, *g: Tensor) -> Tensor:
        array = case.array + torch.tensordot(step, directions, dims=1)
        out = case.model.observe(case.signal(array), g[0] if g else case.generic)
        return torch.view_as_real(out)[:, ::11] if out.is_complex() else out[:, ::11]

    step = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    elements = (case.generic.clone().requires_grad_(),) if case.smooth else ()
    assert gradcheck(observe, (step, *elements))


def test_arguments_are_not_written_to(case: OrbitCase) -> None:
    array, elements = case.array.clone(), case.generic.clone()
    case.model.observe(case.signal(array), elements)
    torch.testing.assert_close(array, case.array, atol=0, rtol=0)
    torch.testing.assert_close(elements, case.generic, atol=0, rtol=0)


def test_accepts_leaves_that_want_gradients(case: OrbitCase) -> None:
    array = case.array.clone().requires_grad_()
    elements = case.generic.clone().requires_grad_() if case.smooth else case.generic
    case.model.observe(case.signal(array), elements).abs().square().sum().backward()
    assert array.grad is not None
    assert bool(torch.isfinite(array.grad).all())
    if case.smooth:
        assert bool(torch.isfinite(elements.grad).all())


class _TransposedElement:
    """A wrong model: uses ``g`` where its inverse belongs."""

    def __init__(self, right: Any) -> None:
        self.group = right.group
        self._right = right

    def observe(self, signal: Any, g: Tensor) -> Tensor:
        return self._right.observe(signal, self.group.inverse(g).contiguous())


def test_equivariance_contract_can_fail(case: OrbitCase) -> None:
    assert equivariance_error(replace(case, model=_TransposedElement(case.model))) > 0.1
