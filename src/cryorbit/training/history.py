"""JSONL history: one line per step, appended and flushed, readable while the run goes on."""

import json
import math
from pathlib import Path


class History:
    """Appends one JSON object per line to ``path``; values are numbers or strings, NaN becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate(self, stage: str, step: int) -> None:
        """Forget lines of ``stage`` at ``step`` or later, so that a resumed run does not write a step twice."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines() if line.strip()]
        records = [json.loads(line) for line in lines]
        kept = [line for line, r in zip(lines, records, strict=True) if not (r["stage"] == stage and r["step"] >= step)]
        self.path.write_text("".join(line + "\n" for line in kept))

    def append(self, stage: str, step: int, values: dict[str, float | str]) -> None:
        """Write one step."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        with self.path.open("a") as stream:
            stream.write(json.dumps({"stage": stage, "step": step, **clean}) + "\n")
