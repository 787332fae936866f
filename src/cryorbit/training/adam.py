"""What methods that train by Adam share: its averages as tensors of a checkpoint, and the pace of its steps."""

import math

import torch

from cryorbit.training.checkpoint import State

_WARM_UP = 50


def warm_cosine(index: int, steps: int) -> float:
    """Share of the highest rate at step ``index`` of ``steps``: up in 50 steps while half a period of a cosine falls to nothing."""
    return min(1.0, (index + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * index / steps))


def adam_state(optimiser: torch.optim.Optimizer) -> State:
    """The averages of every parameter, as tensors."""
    entries = optimiser.state_dict()["state"]
    return {f"adam.{i}.{k}": torch.as_tensor(v) for i, entry in entries.items() for k, v in entry.items()}


def load_adam(optimiser: torch.optim.Optimizer, state: State) -> None:
    """Inverse of :func:`adam_state`; other tensors in ``state`` are ignored."""
    entries: dict[int, dict[str, torch.Tensor | int]] = {}
    for name, value in state.items():
        if name.startswith("adam."):
            _, i, key = name.split(".")
            counted = value.ndim == 0 and not value.is_floating_point()  # SparseAdam counts its steps in Python
            entries.setdefault(int(i), {})[key] = int(value) if counted else value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": entries})
