"""Several starts of a map learnt by gradient: each makes its first steps, then the one that leaves least of the images unexplained goes on.

Joint training from a random start settles early on which view is which; where that went wrong it stays (papers/001 has one start). All starts
see the same images in the same order, so the power of these images' noise cancels where what they leave unexplained is compared.
"""

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from cryorbit.methods.decoding import Decoding
from cryorbit.training.checkpoint import State, fitted

_COMPARED = 0.5  # the last share of a trial's steps

D = TypeVar("D", bound=Decoding)


class Starts(Generic[D]):
    """Trials of one method one after the other, then the best of them to its end.

    Parameters
    ----------
    begun
        The method from its start of a number, 0 and up.
    count
        How many starts.
    trial
        Share of the method's steps that each makes before they are compared, by the later half of these. Rates rise for the first 50 steps, so
        trials of fewer than 100 say little.
    """

    def __init__(self, begun: Callable[[int], D], *, count: int, trial: float) -> None:
        self.starts = [begun(number) for number in range(count)]
        self.name = self.starts[0].name
        self.steps = self.starts[0].total_steps()
        self.trial = max(1, min(self.steps, round(trial * self.steps)))
        self.unexplained = torch.full((count, self.trial), math.nan, dtype=torch.float64)

    @property
    def best(self) -> D:
        """Of the starts that have made their trial: the one that goes on when all have."""
        left = self.unexplained[:, -math.ceil(_COMPARED * self.trial) :].mean(dim=1)
        return self.starts[int(left.nan_to_num(math.inf).argmin())]

    def _tried(self) -> bool:
        return not bool(self.unexplained.isnan().any())

    def total_steps(self) -> int:
        """Of all trials, and of what is left for the best."""
        return (len(self.starts) - 1) * self.trial + self.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """A step of a trial, or of the best."""
        start, inner = divmod(index, self.trial)
        if start < len(self.starts):
            values = self.starts[start].step(inner)
            self.unexplained[start, inner] = float(values["unexplained"])
            return {**values, "start": str(start)}
        return {
            **self.best.step(index - (len(self.starts) - 1) * self.trial),
            "start": str(self.starts.index(self.best)),
        }

    def _kept(self) -> list[tuple[str, D]]:
        """Starts that are still needed, with what their tensors are named after."""
        return [(f"start{i}.", start) for i, start in enumerate(self.starts) if not self._tried() or start is self.best]

    def state(self) -> State:
        """All starts, after their trials the best alone."""
        state: State = {"unexplained": self.unexplained}
        for prefix, start in self._kept():
            state |= {prefix + name: value for name, value in start.state().items()}
        return state

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        self.unexplained = fitted(state, {"unexplained": self.unexplained.shape})["unexplained"].double()
        for prefix, start in self._kept():
            start.load_state(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )
