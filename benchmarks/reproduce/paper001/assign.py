"""New particles of a known structure: an encoder's one pass, Gauss-Newton steps after it, and the grid search they replace.

    python benchmarks/reproduce/paper001/assign.py --work DIR

Simulates 3,000 particles to reconstruct and 1,000 others to pose, teaches the encoder of the run, and compares poses with the truth.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import APIX, BOX, DIAMETER, LEVELS, Data, simulated, summary, write

from cryorbit.methods.distillation import DistillationConfig
from cryorbit.pipeline.assign import assign
from cryorbit.pipeline.config import RunConfig, override_section
from cryorbit.pipeline.finished import open_finished
from cryorbit.pipeline.knowledge import assigner_of, taught
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.poses.assignment import Assigned
from cryorbit.types import Poses

BATCH = 500


def measured(data: Data, scale: float, way: Callable[..., Assigned], proposed: bool) -> dict[str, float]:
    """Errors and speed of one way of posing every image; the images' Fourier pixels are in memory before the clock starts."""
    every = torch.arange(len(data.stack))
    images, ctf = data.stack.images(every) * (scale / data.stack.scale), data.stack.ctf(every)
    way(images[:2], ctf[:2])  # kernels compiled, slices of the grid read
    begun = time.process_time()
    found = Assigned.joined([way(y, c) for y, c in zip(images.split(BATCH), ctf.split(BATCH), strict=True)])
    seconds = time.process_time() - begun
    rotations = found.proposed if proposed else found.rotations
    error = data.errors(Poses(rotations, found.shifts * APIX), every)
    return summary(error) | {"images_per_cpu_s": round(len(every) / seconds, 1)}


def main() -> None:
    """Both levels of noise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Folder for data and runs; what is there is used.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper001_assign.json"))
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--new", type=int, default=1000)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="Settings of the teaching; taught anew."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    teaching = override_section(DistillationConfig(), arguments.set)
    for name in arguments.levels:
        folder = arguments.work / name.replace(" ", "").replace(",", "_").lower()
        star = simulated(folder / "sim", arguments.count, name, 1)
        new = simulated(folder / "new", arguments.new, name, 7)
        run = folder / "run"
        if not (run / "metrics.json").exists():
            reconstruct(RunConfig(particles=str(star.resolve()), mask_diameter=DIAMETER), run)
        summary_path = folder / "_".join(["assigned", *arguments.set]) / "assign.json"
        if not summary_path.exists():
            assign(new, run, summary_path.parent, teaching=teaching)
        values = json.loads(summary_path.read_text())
        config, metrics = open_finished(run)
        weights, known = taught(run, config, metrics, teaching, None)
        data, row = Data.of(new, 0.5 * BOX), {}
        for steps in (0, 1, 2, 4):
            assigner = assigner_of(run, config, known, weights, steps, torch.device("cpu"))
            row[f"{steps} steps"] = measured(data, known.scale, assigner.encoded, steps == 0)
        assigner = assigner_of(run, config, known, weights, 2, torch.device("cpu"))
        row["grid search"] = measured(data, known.scale, assigner.searched, False)
        names = ("seconds_teaching", "encoder", "held_out", "searched", "searched_below")
        row["command"] = {key: values[key] for key in names}
        rows[name] = row
        print(name, json.dumps(row, indent=1))
        sizes = {
            "set": arguments.set,
            "box": BOX,
            "pixel_size_A": APIX,
            "particles": arguments.count,
            "new": arguments.new,
        }
        write(arguments.output, sizes | {"rows": rows})


if __name__ == "__main__":
    main()
