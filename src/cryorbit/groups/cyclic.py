"""Circular shifts of a sampled signal: the group of multi-reference alignment (papers/003 section 3.1)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError


@dataclass(frozen=True)
class Cyclic:
    """Shifts 0 .. ``order`` - 1, in samples, composed modulo ``order``.

    Raises
    ------
    ConfigError
        ``CONF111`` where ``order`` is below 1.
    """

    order: int

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ConfigError("CONF111", f"a cyclic group has at least one element, found order {self.order}")

    def identity(self) -> Int[Tensor, ""]:
        """No shift."""
        return torch.tensor(0)

    def random(self, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``n`` uniform shifts."""
        return torch.randint(self.order, (n,), generator=generator, device=generator.device)

    def quadrature(self, n: int) -> tuple[Int[Tensor, " g"], Float[Tensor, " g"]]:
        """Every element, equally weighted, whatever ``n`` asks for."""
        return torch.arange(self.order), torch.full((self.order,), 1.0 / self.order)

    def compose(self, a: Int[Tensor, "*b"], b: Int[Tensor, "*c"]) -> Int[Tensor, "*d"]:
        """Sum of shifts modulo the order."""
        return (a + b) % self.order

    def inverse(self, a: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """The shift back."""
        return (-a) % self.order

    def distance(self, a: Int[Tensor, "*b"], b: Int[Tensor, "*c"]) -> Int[Tensor, "*d"]:
        """Samples between two shifts, the short way round."""
        forward = (a - b) % self.order
        return torch.minimum(forward, self.order - forward)
