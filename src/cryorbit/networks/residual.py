"""A fully connected network with residual blocks, normalised before each (pre-norm)."""

from jaxtyping import Float
from torch import Tensor, nn


class ResidualNetwork(nn.Module):
    """``inputs`` -> ``width`` -> ``blocks`` times (normalise, width, GELU, width, added) -> normalise -> ``outputs``."""

    def __init__(self, inputs: int, outputs: int, width: int = 1024, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        """(B, inputs) to (B, outputs)."""
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        y: Tensor = self.last(h)
        return y
