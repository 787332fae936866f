"""The command as a process of its own, and what a finished run must hold."""

import subprocess
import sys
from pathlib import Path

FINAL = [
    "map.mrc",
    "map_sharpened.mrc",
    "local_resolution.mrc",
    "half_map_1.mrc",
    "half_map_2.mrc",
    "particles.star",
    "fsc.csv",
    "metrics.json",
    "poses.npz",
    "report_data.npz",
    "report.html",
]


def command(*arguments: str | Path) -> list[str]:
    """Arguments of a process that runs ``cryorbit`` with these."""
    return [sys.executable, "-m", "cryorbit", *map(str, arguments)]


def cryorbit(*arguments: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run it to its end; the time is for a machine where nothing is compiled yet."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600, check=False, **options)
