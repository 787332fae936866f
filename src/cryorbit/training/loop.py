"""The one training loop: it owns *when* (steps, checkpoints, history, progress, stopping); a method owns *what*."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol, runtime_checkable

from cryorbit.errors import RunError
from cryorbit.training.checkpoint import State, in_use, load_checkpoint, save_checkpoint
from cryorbit.training.history import History

Progress = Callable[[str, int, int, dict[str, float | str]], None]


@runtime_checkable
class Method(Protocol):
    """What the loop runs. Randomness comes from (seed, step) alone, so a resumed run repeats an uninterrupted one."""

    name: str

    def total_steps(self) -> int:
        """How many steps at most."""
        ...

    def step(self, index: int) -> dict[str, float | str]:
        """Do step ``index``; return what to write down."""
        ...

    def finished(self) -> bool:
        """Whether nothing more would change."""
        ...

    def state(self) -> State:
        """Tensors that, loaded, continue the run exactly."""
        ...

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        ...


class Stopped(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has written its checkpoint."""


@contextmanager
def _graceful() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; a second signal kills as usual."""
    caught: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals belong to someone else
        previous = {}
    try:
        yield caught
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def run(
    method: Method,
    *,
    checkpoint: Path | None = None,
    history: History | None = None,
    progress: Progress | None = None,
    checkpoint_seconds: float = 20.0,
    fingerprint: str = "",
) -> None:
    """Run ``method`` to its end, continuing from ``checkpoint`` when there is one.

    Parameters
    ----------
    method
        The method.
    checkpoint
        File to resume from and to write at least every ``checkpoint_seconds``, at the end and when asked to stop.
    history
        Where each step's values go.
    progress
        Called after each step with (stage, step, total, values).
    checkpoint_seconds
        Longest time between checkpoints.
    fingerprint
        Must equal the checkpoint's; guards against resuming with other settings or data.

    Raises
    ------
    Stopped
        After SIGINT or SIGTERM, once the checkpoint is written.
    RunError
        When a step returns a number that is not finite, or the checkpoint belongs to another run.
    """
    first = 0
    if checkpoint is not None and checkpoint.exists():
        tensors, meta = load_checkpoint(checkpoint)
        if meta.get("fingerprint") != fingerprint or meta.get("stage") != method.name:
            raise RunError(
                "RUN011",
                f"{checkpoint} was written with other settings or data, or by another version",
                "use a new --output folder, or --overwrite to start over",
            )
        with in_use(checkpoint):
            method.load_state(tensors)
            first = int(str(meta["next_step"]))
            if first < 0:
                raise ValueError(f"next_step is {first}")
    if history is not None:
        history.truncate(method.name, first)

    def save(next_step: int) -> None:
        if checkpoint is not None:
            save_checkpoint(
                checkpoint, method.state(), {"fingerprint": fingerprint, "stage": method.name, "next_step": next_step}
            )

    last_saved = time.monotonic()
    with _graceful() as caught:
        for index in range(first, method.total_steps()):
            if method.finished():
                break
            values = method.step(index)
            bad = [k for k, v in values.items() if isinstance(v, float) and math.isnan(v)]
            if bad:
                raise RunError(
                    "RUN012",
                    f"{method.name} step {index}: {bad[0]} is not a number",
                    "run `cryorbit inspect` on the input",
                )
            if history is not None:
                history.append(method.name, index, values)
            if progress is not None:
                progress(method.name, index + 1, method.total_steps(), values)
            is_last = index + 1 == method.total_steps() or method.finished()
            if caught or is_last or time.monotonic() - last_saved > checkpoint_seconds:
                save(index + 1)
                last_saved = time.monotonic()
            if caught:
                raise Stopped(f"{method.name} stopped after step {index + 1}")
