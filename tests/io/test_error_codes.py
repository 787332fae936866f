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


def test_a_code_belongs_to_one_layer() -> None:
    """Modules of one folder may share a code for the same finding; readers' and commands' codes are passed on."""
    layers: dict[str, set[str]] = {}
    for path in (ROOT / "src/cryorbit").rglob("*.py"):
        for code in re.findall(r'Error\(\s*"([A-Z]{2,4}\d{3})"', path.read_text(encoding="utf-8")):
            layers.setdefault(code, set()).add(path.relative_to(ROOT / "src/cryorbit").parts[0])
    assert len(layers) > 100
    assert {code: sorted(where) for code, where in layers.items() if len(where) > 1} == {
        "RUN301": ["cli", "simulate"],
        "RUN302": ["cli", "simulate"],
        "RUN303": ["cli", "simulate"],
    }


def test_errors_survive_the_way_back_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(DataError("DATA999", "found 1, expected 2", "count again")))
    assert (type(error), error.code, error.hint, str(error)) == (
        DataError,
        "DATA999",
        "count again",
        "DATA999: found 1, expected 2\n\nhint: count again",
    )
