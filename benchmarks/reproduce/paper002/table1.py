"""Table 1 of papers/002: GroEL-GroES, 40,000 images of 128 px at 2.8 A without noise, poses known.

    python benchmarks/reproduce/paper002/table1.py ../shared/data --json benchmarks/results/paper002_table1.json

MSE: mean over voxels of the squared difference to the true map (band-limited to the ball below Nyquist), both divided by the true map's
largest value; the paper does not define its own. Three ways: the exact posterior, and what the paper does, variational inference from
minibatches (``methods/variational.py``), its Gaussian and its Dirac.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import APIX, BOX, Data, exact, simulate, write
from torch import Tensor

from cryorbit.methods.variational import Variational, VariationalConfig
from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.spectrum import predicted_resolution, ss_snr
from cryorbit.training.dataset import FourierStack
from cryorbit.training.loop import run

METHODS = ("exact", "gaussian", "dirac")


def solved(
    method: str, stack: FourierStack, data: Data, config: VariationalConfig
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Mean of the map, variance of its coefficients (of a Dirac zeros), and what it took, reading and transforming the images included."""
    wall, cpu = time.perf_counter(), time.process_time()
    if method == "exact":
        found = exact(stack, data.known)[0]
        mean, variance = found.mean, found.variance
    else:
        inference = Variational(stack, config, poses=data.known, symmetry=torch.eye(3)[None])
        run(inference)
        mean, variance = (x.detach() for x in (inference.volume.data, inference.volume.variance))
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return mean, variance, took if method == "exact" else took | {"epochs": config.epochs, "batch": config.batch}


def main() -> None:
    """Simulate, solve, compare with the truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--memory", type=float, default=4.0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epochs", type=int, default=1, help="Passes of the variational inference.")
    parser.add_argument("--batch", type=int, default=1000, help="Images at a time of the variational inference.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data, rows = simulate(arguments.data, arguments.count, None), []
    print(json.dumps({"simulated": arguments.count, "seconds": data.seconds}), flush=True)
    for method in arguments.methods:
        stack = data.stack(arguments.memory)  # anew, so that each reads the images itself
        posterior = "dirac" if method == "dirac" else "gaussian"
        config = VariationalConfig(posterior=posterior, epochs=arguments.epochs, batch=arguments.batch)
        mean, variance, took = solved(method, stack, data, config)
        truth = data.true_map(stack)
        curve = fsc(mean, truth)
        error = (mean - mean.mean()) - (truth - truth.mean())
        row: dict[str, object] = {
            "method": method,
            "images": arguments.count,
            **took,
            "simulation_seconds": data.seconds,
            "resolution_05_A": resolution(curve, 0.5, BOX, APIX),
            "fsc_last_full_shell": float(curve[BOX // 2 - 1]),
            "mse_over_max_squared": float(error.square().mean() / truth.max().square()),
            "error_over_signal": float(error.square().sum() / (truth - truth.mean()).square().sum()),
        }
        if method != "dirac":
            row["predicted_resolution_A"] = predicted_resolution(ss_snr(mean, variance), BOX, APIX)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
