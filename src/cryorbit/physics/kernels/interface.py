"""What every kernel backend offers; the functions are documented in ``reference``."""

from typing import Protocol, runtime_checkable

from torch import Tensor

NormalEquations = tuple[Tensor, Tensor, Tensor]
Posterior = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@runtime_checkable
class Kernels(Protocol):
    """A backend: a module with these seven functions."""

    def slice_forward(self, data: Tensor, rotations: Tensor, kx: Tensor, ky: Tensor, oversampling: int) -> Tensor: ...

    def slice_backward(
        self,
        gradient: Tensor,
        data: Tensor,
        rotations: Tensor,
        kx: Tensor,
        ky: Tensor,
        oversampling: int,
        need_data: bool,
        need_rotations: bool,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def insert(
        self,
        values: Tensor,
        weights: Tensor,
        rotations: Tensor,
        kx: Tensor,
        ky: Tensor,
        oversampling: int,
        numerator: Tensor,
        weight: Tensor,
    ) -> None: ...

    def normal_equations(
        self,
        data: Tensor,
        images: Tensor,
        ctf: Tensor,
        precision: Tensor,
        rotations: Tensor,
        shifts_px: Tensor,
        kx: Tensor,
        ky: Tensor,
        oversampling: int,
        box: int,
    ) -> NormalEquations: ...

    def losses(
        self,
        data: Tensor,
        images: Tensor,
        ctf: Tensor,
        precision: Tensor,
        rotations: Tensor,
        shifts_px: Tensor,
        kx: Tensor,
        ky: Tensor,
        oversampling: int,
        box: int,
    ) -> Tensor: ...

    def product(self, left: Tensor, right: Tensor) -> Tensor: ...

    def posterior(
        self,
        even: Tensor,
        odd: Tensor,
        power: Tensor,
        log_prior: Tensor,
        real: Tensor,
        imag: Tensor,
        ctf2: Tensor,
        out: tuple[Tensor, Tensor, Tensor] | None,
        modes: int,
    ) -> Posterior: ...
