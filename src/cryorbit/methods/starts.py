"""Several starts of a map learnt by gradient: each makes its first steps, then the one that leaves least of the images unexplained goes on.

Joint training from a random start settles early on which view is which; where that went wrong it stays (papers/001 has one start). All starts
see the same images in the same order, so the power of these images' noise cancels where what they leave unexplained is compared.
"""

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.methods.decoding import Decoding
from cryorbit.training.checkpoint import State, fitted

_COMPARED = 0.5  # the last share of a trial's steps

D = TypeVar("D", bound=Decoding)


def in_trial(unexplained: Float[Tensor, "*b t"]) -> Float[Tensor, "*b"]:
    """What starts are compared by, of what each step of a trial left unexplained: the mean of the later half."""
    return unexplained[..., -math.ceil(_COMPARED * unexplained.shape[-1]) :].mean(dim=-1)


class Starts(Generic[D]):
    """Trials of one method one after the other, then the best of them to its end. No more than the best so far and the one on trial are kept.

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
        self.begun, self.count = begun, count
        self.starts = {0: begun(0)}
        self.name = self.starts[0].name
        self.steps = self.starts[0].total_steps()
        self.trial = max(1, min(self.steps, round(trial * self.steps)))
        self.unexplained = torch.full((count, self.trial), math.nan, dtype=torch.float64)

    @property
    def chosen(self) -> int:
        """Number of the best of the starts that have made their trial; the first before."""
        return int(in_trial(self.unexplained).nan_to_num(math.inf).argmin())

    @property
    def best(self) -> D:
        """The start of that number."""
        return self.starts[self.chosen]

    def total_steps(self) -> int:
        """Of all trials, and of what is left for the best."""
        return (self.count - 1) * self.trial + self.steps

    def finished(self) -> bool:
        """Never before the last step."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """A step of a trial, or of the best."""
        start, inner = divmod(index, self.trial)
        if start < self.count:
            if start not in self.starts:
                self.starts = {self.chosen: self.best, start: self.begun(start)}
            values = self.starts[start].step(inner)
            self.unexplained[start, inner] = float(values["unexplained"])
            return {**values, "start": str(start)}
        self.starts = {self.chosen: self.best}
        return {**self.best.step(index - (self.count - 1) * self.trial), "start": str(self.chosen)}

    def state(self) -> State:
        """Starts that are still needed, and what all left unexplained."""
        state: State = {"unexplained": self.unexplained}
        for number, start in self.starts.items():
            state |= {f"start{number}.{name}": value for name, value in start.state().items()}
        return state

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        unexplained = fitted(state, {"unexplained": self.unexplained.shape})["unexplained"].double()
        made = unexplained.flatten().isfinite()
        numbers = sorted({int(name[5:].partition(".")[0]) for name in state if name.startswith("start")})
        complete = unexplained.isfinite().all(dim=1).sum()
        self.unexplained = unexplained
        if bool((made[1:] & ~made[:-1]).any()) or (int(complete) and self.chosen not in numbers) or not numbers:
            raise ValueError("starts that do not fit their trials")
        self.starts = {number: self.begun(number) for number in numbers}
        for number, start in self.starts.items():
            own = f"start{number}."
            start.load_state({name.removeprefix(own): v for name, v in state.items() if name.startswith(own)})
