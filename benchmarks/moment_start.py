"""Whether the map of the moments is a better start than random poses: single ab initio runs from either.

    python benchmarks/moment_start.py ../shared/data --json benchmarks/results/moment_start.json      # continues where it stopped

One start, one heat, at the same settings, images and minibatches for all: what a start is worth, without the selection and the further
heats that mend bad ones. Each half of a set is a run of its own, right when the median error of its images' poses on the grid (15 degrees
apart) is below 15 degrees. ``random``: the default. ``moments``: as ``cryorbit reconstruct --init moments`` makes it, from the images of the
half. Sets are those of success_rate.py; seeds 0 to 2 chose the settings and are not measured.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cryorbit.io.particles import open_particles
from cryorbit.methods.halves import HALVES
from cryorbit.methods.marginal import Marginal
from cryorbit.metrics.align import align_poses
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.inputs import prepare
from cryorbit.pipeline.moment_start import moment_maps
from cryorbit.pipeline.start import fourier_stack
from cryorbit.training.loop import run
from cryorbit.types import Poses
from success_rate import CELLS, MOLECULES, particles_of

KINDS = ("random", "moments")
RIGHT = 15.0  # degrees


class Apart(Marginal):
    """The engine, but halves that disagree at the end of the heat are left as they are."""

    def _join(self) -> None:
        self.done = torch.ones_like(self.done)


def one(star: Path, true: Poses, diameter: float, seed: int, kind: str) -> dict[str, Any]:
    """One run on each half."""
    config = RunConfig(particles=str(star), mask_diameter=diameter, seed=seed, contrast="light")
    config = replace(config, abinitio=replace(config.abinitio, starts=1, heats=1))
    inputs = prepare(config)
    box_a = inputs.particles.box * inputs.particles.pixel_size
    stack = fourier_stack(config, inputs, float(round(config.abinitio.radius_end * box_a / diameter)))
    engine = Apart(
        stack,
        config.abinitio,
        mask_diameter=diameter,
        symmetry=torch.eye(3)[None],
        half_set=inputs.half_set,
        seed=seed,
    )
    begun = time.process_time()
    if kind == "moments":
        engine.begin_at(moment_maps(config, inputs, stack))
    making = time.process_time() - begun
    run(engine)
    errors = []
    for half, winner in zip(HALVES, engine.winners(), strict=True):
        own = engine.members[half]
        poses = winner.top_poses(own, engine.grids(winner, engine.radius()))[0]
        found = Poses(poses.rotations, poses.shifts * stack.pixel_size)
        errors.append(
            float(torch.rad2deg(align_poses(found, Poses(true.rotations[own], true.shifts[own])).error).median())
        )
    return {
        "kind": kind,
        "seed": seed,
        "median_deg": errors,
        "right": sum(e < RIGHT for e in errors),
        "cpu_seconds_first_maps": making,
        "cpu_seconds": time.process_time() - begun,
    }


def main() -> None:
    """Every cell, seed and start that is not in the file yet; JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["1k, -15 dB"], help="Names of cells of success_rate.py.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--seeds", nargs=2, type=int, default=(3, 11), help="First, and one beyond the last; 0 to 2 chose the settings."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    done = {(row["cell"]["name"], row["seed"], row["kind"]) for row in rows}
    origin = {"commit": commit, "device": f"CPU, 1 thread, {platform.machine()}"}
    for cell in (cell for cell in CELLS if cell.name in arguments.cells):
        for seed in range(*arguments.seeds):
            left = [kind for kind in arguments.kinds if (cell.name, seed, kind) not in done]
            if not left:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                star = particles_of(cell, 5000 + 10 * seed, arguments.data.resolve(), Path(scratch))
                posed = open_particles(Path(scratch) / "a" / "truth.star")
                true = Poses(torch.from_numpy(posed.rotations), torch.from_numpy(posed.shifts))
                for kind in left:
                    row = one(star, true, MOLECULES[cell.molecule].diameter, seed, kind)
                    rows.append({**origin, "cell": asdict(cell), **row})
                    print(
                        cell.name,
                        {k: row[k] for k in ("seed", "kind", "right", "median_deg", "cpu_seconds")},
                        flush=True,
                    )
                    arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
