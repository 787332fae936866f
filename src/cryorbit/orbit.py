"""The two protocols behind orbit recovery, ``y_j = A(g_j . v) + noise`` (papers/003 eq. 2), and nothing else.

Used by the moment and marginal estimators, by map alignment and by the contract tests. Groups and models conform by
having these methods; they need not inherit. CTFs, shifts and noise belong to a particle, not to the group.
"""

from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Signal = TypeVar("Signal", contravariant=True)


@runtime_checkable
class Group(Protocol):
    """A compact group whose elements are tensors, the first axis counting elements. A metric on it is bi-invariant."""

    def identity(self) -> Tensor:
        """One element, without the counting axis."""
        ...

    def random(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` elements drawn from the Haar measure."""
        ...

    def quadrature(self, n: int) -> tuple[Tensor, Tensor]:
        """The smallest built-in rule of at least ``n`` elements (a finite group: all of it); weights sum to 1."""
        ...

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        """``a b``: act with ``b`` first."""
        ...

    def inverse(self, a: Tensor) -> Tensor:
        """The element that undoes ``a``."""
        ...

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Bi-invariant distance: radian, or samples for shifts."""
        ...


@runtime_checkable
class OrbitModel(Protocol[Signal]):
    """What a group element lets us see of a signal: it acts and measures in one step."""

    @property
    def group(self) -> Group:
        """The group that acts."""
        ...

    def observe(self, signal: Signal, g: Tensor) -> Tensor:
        """Noise-free measurements ``A(g . signal)``, one row per element: (G, P)."""
        ...
