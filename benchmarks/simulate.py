"""Time and memory of `cryorbit simulate`: particles of 4AKE written to disk, each case in a process of its own.

    python benchmarks/simulate.py [--count 10000] [--box 128] [--pixel-size 0.8] [--fast] [--output FILE.json]

CTF with astigmatism, shifts of sigma 2 px and white noise at -10 dB, everything that costs time. Wall time includes
reading the model and writing all files, not starting Python or importing torch; the compiled kernels are warm (a
first run in a fresh install takes ten seconds more). CPU time is that of all threads: on a machine that does other
work as well, half of it is what two free cores need at least.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from cryorbit.simulate.atoms import read_model
from cryorbit.simulate.particles import CTFSettings, make_projector
from cryorbit.simulate.settings import SimulationSettings
from cryorbit.simulate.write import write_simulation


def measure(count: int, box: int, pixel_size: float, fast: bool) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of one simulation."""
    make_projector(read_model("4ake"), box, pixel_size, fast)(torch.eye(3)[None])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    wall, cpu = time.perf_counter(), time.process_time()
    settings = SimulationSettings(count, -10.0, CTFSettings(astigmatism=500.0), 2.0)
    with tempfile.TemporaryDirectory() as folder:
        summary = write_simulation(folder, make_projector(read_model("4ake"), box, pixel_size, fast), settings)
    return {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "mib_before": round(before),
        "snr": round(summary.snr, 5),
    }


def commit() -> str:
    """The commit of the checkout this file is in."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> None:
    """Run, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--pixel-size", type=float, default=0.8)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    result = measure(args.count, args.box, args.pixel_size, args.fast)
    record = {
        "benchmark": "simulate",
        "commit": commit(),
        "model": "4ake (1656 atoms)",
        "count": args.count,
        "box": args.box,
        "pixel_size": args.pixel_size,
        "projector": "slices" if args.fast else "atoms",
        **result,
        "images_per_second": round(args.count / result["seconds"], 1),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(json.dumps(record, indent=2))
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
