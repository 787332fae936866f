"""Every error code of the file readers is documented, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_documented_codes_are_those_that_can_be_raised() -> None:
    raised = set()
    for path in (ROOT / "src/cryorbit/io").glob("*.py"):
        raised |= set(re.findall(r'"([A-Z]{2,4}\d{3})"', path.read_text(encoding="utf-8")))
    documented = re.findall(r"^\| ([A-Z]{2,4}\d{3}) \|", (ROOT / "docs/files.md").read_text(encoding="utf-8"), re.M)
    assert len(documented) == len(set(documented))
    assert set(documented) == raised
