"""The one loop: history, resume, refusal of foreign checkpoints, NaN guard, signals in a real process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cryorbit.errors import RunError
from cryorbit.training.checkpoint import fitted, kept, load_checkpoint, save_checkpoint
from cryorbit.training.history import History
from cryorbit.training.loop import run


class Counter:
    """Adds (step + 1) to a total; slow on request."""

    name = "count"

    def __init__(self, steps: int, seconds: float = 0.0, bad: int = -1) -> None:
        self.steps, self.seconds, self.bad = steps, seconds, bad
        self.total = torch.zeros((), dtype=torch.int64)

    def total_steps(self) -> int:
        return self.steps

    def step(self, index: int) -> dict[str, float | str]:
        time.sleep(self.seconds)
        self.total = self.total + index + 1
        return {"total": float("nan") if index == self.bad else float(self.total)}

    def finished(self) -> bool:
        return False

    def state(self) -> dict[str, torch.Tensor]:
        return {"total": self.total}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.total = state["total"]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_history_holds_every_step_once_even_after_a_resume(tmp_path):
    history = History(tmp_path / "history.jsonl")
    first = Counter(3)
    run(first, checkpoint=tmp_path / "c", history=history)
    for extra in range(2):  # a crash after steps that no checkpoint holds
        history.append("count", 3 + extra, {"total": -1.0})
    longer = Counter(5)
    run(longer, checkpoint=tmp_path / "c", history=history)
    assert [r["step"] for r in lines(history.path)] == [0, 1, 2, 3, 4]
    assert [r["total"] for r in lines(history.path)] == [1, 3, 6, 10, 15]


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    run(Counter(2), checkpoint=tmp_path / "c", fingerprint="a")
    with pytest.raises(RunError, match="RUN011"):
        run(Counter(2), checkpoint=tmp_path / "c", fingerprint="b")


def test_nan_stops_the_run_and_names_the_value():
    with pytest.raises(RunError, match="step 1: total is not a number"):
        run(Counter(3, bad=1))


def test_broken_checkpoint_is_one_clear_error(tmp_path):
    (tmp_path / "c").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match="RUN013"):
        run(Counter(2), checkpoint=tmp_path / "c")


def test_checkpoint_that_does_not_say_where_it_stopped_is_named(tmp_path):
    run(Counter(2), checkpoint=tmp_path / "c")
    tensors, meta = load_checkpoint(tmp_path / "c")
    save_checkpoint(tmp_path / "c", tensors, {k: v for k, v in meta.items() if k != "next_step"})
    with pytest.raises(RunError, match=rf"RUN013: {tmp_path / 'c'} does not fit this run .*next_step"):
        run(Counter(3), checkpoint=tmp_path / "c")
    save_checkpoint(tmp_path / "c", tensors, meta | {"next_step": -1})
    with pytest.raises(RunError, match=r"RUN013.*next_step is -1"):
        run(Counter(3), checkpoint=tmp_path / "c")


def test_what_is_kept_is_made_once_and_must_fit(tmp_path):
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append({"x": torch.full((3, 2), float(len(made))), "y": torch.zeros(3)})
        return made[-1]

    shapes = {"x": (3, 2), "y": (3,)}
    for fingerprint, value in (("a", 0.0), ("a", 0.0), ("b", 1.0)):
        assert torch.equal(kept(tmp_path / "k", fingerprint, shapes, make)["x"], torch.full((3, 2), value))
    assert len(made) == 2
    assert set(fitted(made[0] | {"z": torch.ones(1)}, shapes)) == {"x", "y"}
    for other, words in ((shapes | {"x": (4, 2)}, r"x of shape \(3, 2\), expected \(4, 2\)"), ({"z": ()}, "lacks z")):
        with pytest.raises(RunError, match=f"RUN013: {tmp_path / 'k'} does not fit this run .*{words}"):
            kept(tmp_path / "k", "b", other, make)


def test_complex_tensors_survive_a_checkpoint(tmp_path, generator):
    z = torch.complex(torch.randn(3, 2, generator=generator), torch.randn(3, 2, generator=generator))
    save_checkpoint(tmp_path / "c", {"z": z, "x": z.real}, {"a": [1, "b"]})
    tensors, meta = load_checkpoint(tmp_path / "c")
    assert torch.equal(tensors["z"], z)
    assert torch.equal(tensors["x"], z.real)
    assert meta == {"a": [1, "b"]}


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_loop import Counter
from cryorbit.training.loop import Stopped, run
from cryorbit.training.history import History
folder = Path({folder!r})
method = Counter(40, seconds={seconds})
print("ready", flush=True)
try:
    run(method, checkpoint=folder / "c", history=History(folder / "history.jsonl"))
except Stopped as stop:
    print(stop)
    sys.exit(130)
print("total", int(method.total))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_after_the_step_and_the_rerun_finishes(tmp_path, number):
    def start(seconds: float) -> subprocess.Popen[str]:
        code = SCRIPT.format(here=str(Path(__file__).parent), folder=str(tmp_path), seconds=seconds)
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})

    process = start(0.05)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (tmp_path / "history.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped after step" in out
    done = len(lines(tmp_path / "history.jsonl"))
    assert 0 < done < 40
    rest, _ = start(0.0).communicate(timeout=30)
    assert rest.splitlines()[-1] == f"total {40 * 41 // 2}"
    assert [r["step"] for r in lines(tmp_path / "history.jsonl")] == list(range(40))
