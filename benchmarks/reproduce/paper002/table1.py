"""Table 1 of papers/002: GroEL-GroES, 40,000 images of 128 px at 2.8 A without noise, poses known.

    python benchmarks/reproduce/paper002/table1.py ../shared/data --json benchmarks/results/paper002_table1.json

MSE: mean over voxels of the squared difference to the true map (band-limited to the ball below Nyquist), both divided by the true map's
largest value; the paper does not define its own.
"""

import argparse
import json
import time
from pathlib import Path

from common import APIX, BOX, exact, simulate, write

from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.spectrum import predicted_resolution, ss_snr


def main() -> None:
    """Simulate, solve, compare with the truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--memory", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data, rows = simulate(arguments.data, arguments.count, None), []
    print(json.dumps({"simulated": arguments.count, "seconds": data.seconds}), flush=True)
    stack = data.stack(arguments.memory)
    begun = time.process_time()
    found, seconds = exact(stack, data.known)
    used = time.process_time() - begun
    truth = data.true_map(stack)
    curve = fsc(found.mean, truth)
    error = (found.mean - found.mean.mean()) - (truth - truth.mean())
    row: dict[str, object] = {
        "images": arguments.count,
        "seconds": seconds,
        "cpu_seconds": used,
        "simulation_seconds": data.seconds,
        "resolution_05_A": resolution(curve, 0.5, BOX, APIX),
        "fsc_last_full_shell": float(curve[BOX // 2 - 1]),
        "mse_over_max_squared": float(error.square().mean() / truth.max().square()),
        "error_over_signal": float(error.square().sum() / (truth - truth.mean()).square().sum()),
        "predicted_resolution_A": predicted_resolution(ss_snr(found.mean, found.variance), BOX, APIX),
    }
    rows.append(row)
    print(json.dumps(row), flush=True)
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
