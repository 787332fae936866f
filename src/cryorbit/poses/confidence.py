"""How likely a pose is right, from what one knows of it: a logistic function fitted to poses of known outcome, and where to draw a line."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from torch import Tensor

_RIDGE = 0.1  # of one squared weight, in nats of all observations: keeps weights finite where every pose is right


@dataclass(frozen=True)
class Confidence:
    """Chance of being right as a logistic function of numbers.

    Attributes
    ----------
    centre, scale
        (F,) of poses that are right, by which the numbers are made comparable; values further than 4 scales off count as 4.
    weight
        (F + 1,) of each, and the constant.
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]

    def __call__(self, features: Float[Tensor, "n f"]) -> Float[Tensor, " n"]:
        """Chance of each row."""
        centre, scale = torch.tensor(self.centre), torch.tensor(self.scale)
        x = ((features.float().cpu() - centre) / scale).clamp(-4, 4)
        weight = torch.tensor(self.weight)
        return torch.sigmoid(x @ weight[:-1] + weight[-1])


def fit_confidence(features: Float[Tensor, "n f"], right: Bool[Tensor, " n"]) -> Confidence:
    """Logistic regression, slightly ridged, on poses that are known to be ``right`` or not.

    One right and one wrong pose of average features are added: n observations never prove a chance of 0 or 1.
    """
    x = features.double().cpu()
    usual = x[right.cpu()] if bool(right.any()) else x
    centre = usual.median(dim=0).values
    scale = (usual - centre).abs().mean(dim=0).clamp_min(1e-6)
    z = ((x - centre) / scale).clamp(-4, 4)
    design = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], dim=1)
    prior = design.new_zeros(2, design.shape[1])
    prior[:, -1] = 1
    a = torch.cat([design, prior]).numpy()
    sign = np.where(np.concatenate([right.cpu().numpy(), [True, False]]), 1.0, -1.0)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (a @ w)
        value = np.logaddexp(0, -margin).sum() + _RIDGE * (w[:-1] ** 2).sum()
        slope = -(sign / (1 + np.exp(np.clip(margin, -60, 60)))) @ a
        slope[:-1] += 2 * _RIDGE * w[:-1]
        return float(value), slope

    found = minimize(objective, np.zeros(a.shape[1]), jac=True, method="L-BFGS-B").x
    return Confidence(tuple(centre.tolist()), tuple(scale.tolist()), tuple(float(w) for w in found))


def threshold(confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], wanted: float, least: float = 0.5) -> float:
    """The lowest confidence at and above which a share ``wanted`` of the poses are right; never below ``least``.

    ``least`` where that holds of all, 1 where of none.
    """
    order = torch.argsort(confidence, descending=True)
    share = right[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    fine = torch.nonzero(share >= wanted)[:, 0]
    if not len(fine):
        return 1.0
    return least if int(fine[-1]) == len(order) - 1 else max(least, float(confidence[order[fine[-1]]]))
