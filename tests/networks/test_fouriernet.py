"""Coordinate networks: empty at first, differentiable in their points, able to learn a wave, the same from the same seed."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from cryorbit.networks.fouriernet import FourierNet, Siren


def made(kind: type[nn.Module], seed: int = 0, width: int = 16) -> nn.Module:
    sizes = (3, 2) if kind is Siren else (3,)
    return kind(*sizes, width=width, depth=2, frequency=2.0, generator=torch.Generator().manual_seed(seed))


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


KINDS = pytest.mark.parametrize("kind", [Siren, FourierNet])


@KINDS
def test_empty_at_first_and_drawn_from_the_seed(kind: type[nn.Module], generator: torch.Generator) -> None:
    points = torch.randn(4, 5, 3, generator=generator)
    found = made(kind)(points)
    assert found.shape == ((4, 5, 2) if kind is Siren else (4, 5))
    assert float(found.detach().abs().max()) == 0
    assert torch.equal(weights(made(kind)), weights(made(kind)))
    assert not torch.equal(weights(made(kind)), weights(made(kind, seed=1)))


@KINDS
def test_gradcheck(kind: type[nn.Module], generator: torch.Generator) -> None:
    net = made(kind, width=4).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    points = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(net, (points,))
    names = [name for name, _ in net.named_parameters()]

    def of_parameters(*values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (points.detach(),))

    assert gradcheck(of_parameters, tuple(net.parameters()))


@KINDS
def test_first_waves_set_the_detail_that_is_learnt(kind: type[nn.Module], generator: torch.Generator) -> None:
    """A wave of 6 radian per unit: learnt by a network that starts from waves of its kind, not by one that starts from slow ones."""
    points = 2 * torch.rand(200, 3, generator=generator) - 1
    wave = torch.sin(points @ torch.tensor([4.0, -4.0, 2.0]))
    left = {}
    for frequency in (0.05, 4.0):
        sizes = (3, 1) if kind is Siren else (3,)
        net = kind(*sizes, width=48, depth=2, frequency=frequency, generator=torch.Generator().manual_seed(0))
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(100):
            found = net(points)
            loss = (torch.view_as_real(found)[..., 0] if found.is_complex() else found[:, 0]).sub(wave).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        left[frequency] = float(loss.detach() / wave.square().mean())
    assert left[4.0] < 0.05
    assert left[0.05] > 2 * left[4.0]
