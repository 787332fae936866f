"""Means of triple products of angular orders (``physics/third_moments.py``), differentiable."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cryorbit.physics.kernels.cpu_triples import mean_triples, mean_triples_back


class _MeanTriples(torch.autograd.Function):
    """By numba, float32 on a CPU."""

    @staticmethod
    def forward(ctx: Any, re: Tensor, im: Tensor, share: Tensor, orders: int) -> Tensor:
        """Kernels want memory in order."""
        re, im, share = re.contiguous(), im.contiguous(), share.contiguous()
        ctx.save_for_backward(re, im, share)
        ctx.orders = orders
        pairs = sum(b.stop - b.start for _, b, _ in parts(orders, len(re)))
        out = torch.zeros(re.shape[1], pairs, dtype=torch.complex128)
        mean_triples(re.detach().numpy(), im.detach().numpy(), share.detach().numpy(), orders, out.numpy())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Of all three factors, and of the shares."""
        re, im, share = ctx.saved_tensors
        of_re, of_im, of_share = (torch.zeros_like(x) for x in (re, im, re[0]))
        given = (x.detach().numpy() for x in (re, im, share))
        mean_triples_back(
            *given, ctx.orders, grad.to(torch.complex64).numpy(), *(x.numpy() for x in (of_re, of_im, of_share))
        )
        return of_re, of_im, of_share.sum(dim=0), None


def parts(orders: int, count: int) -> Iterator[tuple[int, slice, slice]]:
    """m, the m' from m on that go with it, and their sums, below ``count``."""
    for a in range(min(orders, (count - 1) // 2) + 1):
        b = slice(a, min(orders, count - 1 - a) + 1)
        yield a, b, slice(a + b.start, a + b.stop)


def mean_products(
    re: Float[Tensor, "m j n"], im: Float[Tensor, "m j n"], share: Float[Tensor, " n"], orders: int
) -> Complex[Tensor, "j p"]:
    """``sum_n p_n y_m y_m' y_(m+m')*`` of what filters see and shares p; pairs as in :attr:`ThirdFilters.pairs`; differentiable."""
    if re.device.type == "cpu" and re.dtype == torch.float32:
        values: Tensor = _MeanTriples.apply(re, im, share, orders)
        return values
    y = torch.complex(re, im)
    columns = []
    for a, b, c in parts(orders, len(y)):
        columns.append(((share * y[a]) * y[b] * y[c].conj()).sum(dim=-1))
    return torch.cat(columns).mT
