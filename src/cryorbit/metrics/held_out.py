"""Importance-weighted bounds on how probable data are under a model whose latent variables cannot be integrated.

papers/002 section 7 asks for the likelihood of held-out data by importance weighting (Rezende et al. 2014; as a bound: Burda et al. 2016,
"Importance weighted autoencoders", ICLR): with z_k drawn from any q, ``log 1/K sum_k p(x | z_k) p(z_k) / q(z_k)`` is on average below
``log p(x)``, rises with K and comes to it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def importance_weighted(log_weights: Float[Tensor, "*n k"]) -> Float[Tensor, " *n"]:
    """The bound in nats from ``log_weights = log p(x | z_k) + log p(z_k) - log q(z_k)`` of K draws from q."""
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def effective_samples(log_weights: Float[Tensor, "*n k"]) -> Float[Tensor, " *n"]:
    """How many of the K draws carry the bound, ``1 / sum share^2``: near 1, it may lie far below."""
    return 1 / torch.softmax(log_weights, dim=-1).square().sum(dim=-1)
