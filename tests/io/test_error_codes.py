"""Every error code of the file readers is documented, and no other."""

import pickle
import re
from pathlib import Path

from cryorbit.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def test_documented_codes_are_those_that_can_be_raised() -> None:
    raised = set()
    for path in (ROOT / "src/cryorbit/io").glob("*.py"):
        raised |= set(re.findall(r'"([A-Z]{2,4}\d{3})"', path.read_text(encoding="utf-8")))
    documented = re.findall(r"^\| ([A-Z]{2,4}\d{3}) \|", (ROOT / "docs/files.md").read_text(encoding="utf-8"), re.M)
    assert len(documented) == len(set(documented))
    assert set(documented) == raised


def test_errors_survive_the_way_back_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(DataError("DATA999", "found 1, expected 2", "count again")))
    assert (type(error), error.code, error.hint, str(error)) == (
        DataError,
        "DATA999",
        "count again",
        "DATA999: found 1, expected 2\n\nhint: count again",
    )
