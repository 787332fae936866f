"""Progress on stderr: a live bar on a terminal, one plain line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_WORDS = {
    "abinitio": "ab initio",
    "refine": "refine",
    "amortized": "learn",
    "align2d": "2-D classes",
    "moment_prior": "learn molecules",
}
_QUIET_SECONDS = 5.0


class Reporter:
    """Callable for ``training.loop.run``; use as a context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.last: dict[str, float] = {}

    def __enter__(self) -> "Reporter":
        if self.live:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.bar.stop()

    def __call__(self, stage: str, step: int, total: int, values: dict[str, float | str]) -> None:
        note = f"{float(values['resolution_A']):5.1f} A" if "resolution_A" in values else ""
        if "images" in values:
            note += f"  {float(values['images']):,.0f} images"
        if "mismatch" in values:
            note += f"  maps of fresh molecules off by {float(values['mismatch']):5.3f}"
        if "effective_poses" in values:
            note += f"  {float(values['effective_poses']):9.1f} poses per particle"
        if "error_deg" in values:
            note += f"  poses of fresh images off by {float(values['error_deg']):6.2f} deg"
        if "confidence" in values:
            note += f"  median confidence {float(values['confidence']):5.3f}"
        if "pose_change_deg" in values:
            note += f"  poses moved {float(values['pose_change_deg']):6.2f} deg"
        name, _, number = stage.partition(" ")
        words = f"{_WORDS.get(name, name)} {number}".strip()
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.bar.add_task(words, total=total, note=note)
            self.bar.update(self.tasks[stage], completed=step, total=total, note=note)
        elif step in (1, total) or time.monotonic() - self.last.get(stage, 0.0) > _QUIET_SECONDS:
            self.console.print(f"{words} {step}/{total}: {note}", soft_wrap=True)
            self.last[stage] = time.monotonic()


@contextmanager
def reported(console: Console) -> Iterator[Reporter]:
    """Progress on stderr; a run that is interrupted says how to go on, and ends with exit code 130."""
    from cryorbit.training.loop import Stopped

    try:
        with Reporter() as progress:
            yield progress
    except (Stopped, KeyboardInterrupt) as stopped:
        console.print(f"{str(stopped) or 'stopped'}: run the same command again to continue.")
        raise typer.Exit(130) from None
