"""A Wasserstein critic and the penalty that makes it Lipschitz (Gulrajani et al. 2017, the reference [8] of papers/004)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Critic(nn.Module):
    """One number per picture: two strided convolutions and a linear layer, no normalisation (the penalty is per picture)."""

    def __init__(self, side: int, channels: int = 32) -> None:
        super().__init__()
        reduced = (((side + 1) // 2) + 1) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * channels * reduced**2, 1),
        )

    def forward(self, pictures: Float[Tensor, "b d d"]) -> Float[Tensor, " b"]:
        return self.layers(pictures[:, None])[:, 0]


def gradient_penalty(
    critic: nn.Module, real: Float[Tensor, "b d d"], made: Float[Tensor, "b d d"], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Mean squared distance from 1 of the critic's slope between real and made pictures (Gulrajani et al. 2017, eq. 3, without its weight).

    Clamping weights, the older way, was tried by the authors of papers/004 on a local name and changed nothing; a slope that is
    part of the loss can be measured.
    """
    share = torch.rand(len(real), 1, 1, generator=generator, device=generator.device).to(real)
    between = (share * real + (1 - share) * made).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()
