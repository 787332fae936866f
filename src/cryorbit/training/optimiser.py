"""What methods that train by Adam share: its averages as tensors of a checkpoint, the pace of its steps, and which items a step sees."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from cryorbit.training.checkpoint import State

_WARM_UP = 50


def warm_cosine(index: int, steps: int) -> float:
    """Share of the highest rate at step ``index`` of ``steps``: up in 50 steps while half a period of a cosine falls to nothing."""
    return min(1.0, (index + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * index / steps))


def adam_state(optimiser: torch.optim.Optimizer, prefix: str = "adam") -> State:
    """The averages of every parameter by name, ready for a checkpoint."""
    entries = optimiser.state_dict()["state"]
    return {f"{prefix}.{i}.{k}": torch.as_tensor(v).clone() for i, entry in entries.items() for k, v in entry.items()}


def load_adam(optimiser: torch.optim.Optimizer, state: State, prefix: str = "adam") -> None:
    """Inverse of :func:`adam_state`; other tensors in ``state`` are ignored."""
    entries: dict[int, dict[str, Tensor | int]] = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if first == prefix:
            i, key = rest.split(".")
            counted = value.ndim == 0 and not value.is_floating_point()  # SparseAdam counts its steps in Python
            entries.setdefault(int(i), {})[key] = int(value) if counted else value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": entries})


def epoch_batch(count: int, batch: int, index: int, seed: int) -> tuple[int, Int[Tensor, " b"], torch.Generator]:
    """Epoch, items and generator of step ``index``: every epoch passes over all ``count`` items in an order of its own."""
    per_epoch = math.ceil(count / batch)
    epoch, part = divmod(index, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return epoch, order[part * batch : (part + 1) * batch], torch.Generator().manual_seed(seed * 7_919 + 13 * index + 1)
