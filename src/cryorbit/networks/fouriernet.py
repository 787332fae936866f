"""Coordinate networks with sine activations: a sum of waves to start from, so that fine detail is learnt as fast as coarse.

:class:`Siren` (Sitzmann et al. 2020) and the product of two of them, :class:`FourierNet` (papers/003 eq. 33; the decoder of papers/001).
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn


class Siren(nn.Module):
    """Fully connected layers with sines between them; zero everywhere until it is trained.

    Parameters
    ----------
    inputs, outputs
        Numbers in and out per point.
    width
        Of each hidden layer.
    depth
        How many hidden layers, at least 1.
    frequency
        Standard deviation of the first layer's weights along each axis, radian per unit of the input: how fast the waves turn that the
        network starts from. Later layers start from the uniform distribution of Sitzmann et al. 2020 (theorem 1.8).
    generator
        Draws the start.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int, depth: int, frequency: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        hidden = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.hidden = nn.ModuleList(hidden)
        self.last = nn.Linear(width, outputs)
        for index, layer in enumerate(hidden):
            if index == 0:
                nn.init.normal_(layer.weight, 0.0, frequency, generator)
            else:
                bound = math.sqrt(6 / width)
                nn.init.uniform_(layer.weight, -bound, bound, generator)
            nn.init.uniform_(layer.bias, -math.pi, math.pi, generator)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, points: Float[Tensor, "*b inputs"]) -> Float[Tensor, "*b outputs"]:
        """Value at each point; differentiable in the points."""
        for layer in self.hidden:
            points = torch.sin(layer(points))
        return self.last(points)


class FourierNet(nn.Module):
    """``a(x) exp(i b(x))``: a complex amplitude and a phase, each a :class:`Siren` (papers/003 eq. 33).

    The phase turns fast where a transform oscillates, so the amplitude may stay smooth. Parameters as for :class:`Siren`; the amplitude is
    zero until it is trained, the phase is not.
    """

    def __init__(self, inputs: int, *, width: int, depth: int, frequency: float, generator: torch.Generator) -> None:
        super().__init__()
        self.amplitude = Siren(inputs, 2, width=width, depth=depth, frequency=frequency, generator=generator)
        self.phase = Siren(inputs, 1, width=width, depth=depth, frequency=frequency, generator=generator)
        nn.init.normal_(self.phase.last.weight, 0.0, math.pi / math.sqrt(width), generator)

    def forward(self, points: Float[Tensor, "*b inputs"]) -> Complex[Tensor, "*b"]:
        """Value at each point; differentiable in the points."""
        phase = self.phase(points)[..., 0]
        return torch.view_as_complex(self.amplitude(points)) * torch.complex(torch.cos(phase), torch.sin(phase))
