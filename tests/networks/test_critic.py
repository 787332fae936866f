"""The critic is Lipschitz because it is made so: the penalty measures slopes rightly, and training under it bounds them."""

import torch
from torch import Tensor, nn

from cryorbit.networks.critic import Critic, gradient_penalty


class _Linear(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.direction = torch.ones(5, 5) * slope / 5.0  # a unit vector of 25 pixels, times the slope

    def forward(self, pictures: Tensor) -> Tensor:
        return (pictures * self.direction).sum(dim=(1, 2))


def test_penalty_is_the_distance_of_the_slope_from_one(generator):
    real, made = torch.randn(2, 6, 5, 5, generator=generator)
    for slope in (0.0, 1.0, 3.0):
        found = float(gradient_penalty(_Linear(slope), real, made, generator))
        assert abs(found - (slope - 1) ** 2) < 1e-5


def _steepest(critic: Critic, real: Tensor, made: Tensor) -> float:
    """Largest difference of the critic over the distance, pair by pair."""
    with torch.no_grad():
        rise = (critic(real) - critic(made)).abs()
    return float((rise / (real - made).flatten(1).norm(dim=1)).max())


def test_trained_with_the_penalty_the_critic_is_lipschitz_and_without_it_is_not(generator):
    real = torch.rand(48, 12, 12, generator=generator)
    made = torch.rand(48, 12, 12, generator=generator) * 0.5
    steepest = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        critic = Critic(12, channels=8)
        optimiser = torch.optim.Adam(critic.parameters(), lr=5e-3)
        for _ in range(60):
            loss = critic(real).mean() - critic(made).mean()
            loss = loss + weight * gradient_penalty(critic, real, made, generator)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert critic(real).mean() < critic(made).mean()
        steepest[weight] = _steepest(critic, real, made)
    assert steepest[10.0] < 1.2
    assert steepest[0.0] > 3.0


def test_the_penalty_trains_the_critic(generator):
    critic = Critic(9, channels=4)
    gradient_penalty(critic, torch.rand(4, 9, 9), torch.rand(4, 9, 9), generator).backward()
    slopes = [p.grad for p in critic.parameters() if p.ndim > 1]
    assert all(g is not None and bool(g.any()) for g in slopes)
