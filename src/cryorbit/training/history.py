"""JSONL history: one line per step, appended and flushed, readable while the run goes on."""

import json
import math
from pathlib import Path

from cryorbit.io.atomic import write_text


class History:
    """Appends one JSON object per line to ``path``; values are numbers or strings, NaN becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate(self, stage: str, step: int) -> None:
        """Forget lines of ``stage`` at ``step`` or later, so that a resumed run does not write a step twice.

        A line cut short (the machine went down while it was written) is dropped too.
        """
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if not (record["stage"] == stage and record["step"] >= step):
                    kept.append(line)
            except (json.JSONDecodeError, TypeError, KeyError):
                continue
        write_text(self.path, "".join(line + "\n" for line in kept))

    def append(self, stage: str, step: int, values: dict[str, float | str]) -> None:
        """Write one step."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"stage": stage, "step": step, **clean}) + "\n")
