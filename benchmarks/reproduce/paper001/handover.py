"""Joint training from a random start, end to end: what the networks came to, what refinement made of it, what the verdict says.

    python benchmarks/reproduce/paper001/handover.py --work DIR --seeds 3

Runs ``cryorbit reconstruct --method amortized`` on 3,000 particles; runs that are there are used.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import APIX, BOX, DIAMETER, Data, simulated, summary, write

from cryorbit.io.mrc import read_volume
from cryorbit.io.particles import open_particles
from cryorbit.methods.amortized import from_starts
from cryorbit.metrics.evaluation import compare_maps
from cryorbit.pipeline.config import AMORTIZED, RunConfig
from cryorbit.pipeline.finished import open_finished
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.training.checkpoint import load_checkpoint
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses, Volume

LOOKED_AT = 500


def of_networks(run: Path, data: Data) -> list[dict[str, float]]:
    """Errors of what each half's network says of images of the other half."""
    config, _ = open_finished(run)
    half_set = torch.as_tensor(open_particles(run / "particles.star", require_images=False).half_set)
    rows = []
    for half in (1, 2):
        state, _ = load_checkpoint(run / "checkpoint" / f"amortized_{half}.safetensors")
        stack = FourierStack(data.stack.particles, radius_of(config), mask_diameter=DIAMETER)
        method = from_starts(stack, config.amortized, mask_diameter=DIAMETER)
        method.load_state(state)
        unseen = torch.nonzero(half_set == 3 - half)[:LOOKED_AT, 0]
        rows.append(summary(data.errors(method.best.poses(unseen), unseen)))
    return rows


def radius_of(config: RunConfig) -> float:
    """Fourier radius of the stack a half was learnt from, as ``pipeline/reconstruct.py`` chose it."""
    return float(round(config.abinitio.radius_end * BOX * APIX / config.mask_diameter))


def measured(run: Path, data: Data, truth: Volume) -> dict[str, Any]:
    """Of one finished run."""
    metrics = json.loads((run / "metrics.json").read_text())
    found = open_particles(run / "particles.star", require_images=False)
    poses = Poses(torch.from_numpy(found.rotations), torch.from_numpy(found.shifts))
    volume, pixel_size = read_volume(run / "map.mrc")
    maps = compare_maps(Volume(torch.from_numpy(volume).float(), pixel_size), truth)
    return {
        "networks": of_networks(run, data),
        "refined": summary(data.errors(poses, torch.arange(len(found)))),
        "resolution_0143_masked_A": maps.resolution_0143_masked,
        "resolution_05_masked_A": maps.resolution_05_masked,
        "at_nyquist": maps.resolution_0143_masked < 2.02 * APIX,
        **{key: metrics[key] for key in ("verdict", "probability_right", "halves_periods", "halves_same_pose")},
        "wall_s": metrics["stage_seconds"],
    }


def main() -> None:
    """The levels and as many seeds of each as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--levels", nargs="+", default=["0 dB", "clean"], choices=["0 dB", "clean"])
    parser.add_argument("--only-finished", action="store_true", help="Measure runs that are there, start none.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper001_handover.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.levels:
        folder = arguments.work / name.replace(" ", "").lower()
        star = simulated(folder / "sim", 3000, name, 1)
        data, rows[name] = Data.of(star, 0.5 * BOX), {}
        volume, pixel_size = read_volume(star.with_name("truth.mrc"))
        for seed in range(arguments.seeds):
            run = folder / f"joint_{seed}"
            if not (run / "metrics.json").exists():
                if arguments.only_finished:
                    continue
                config = RunConfig(str(star.resolve()), mask_diameter=DIAMETER, method=AMORTIZED, seed=seed)
                reconstruct(config, run)
            rows[name][str(seed)] = measured(run, data, Volume(torch.from_numpy(volume).float(), pixel_size))
            print(name, seed, json.dumps(rows[name][str(seed)]), flush=True)
    write(arguments.output, {"box": BOX, "pixel_size_A": APIX, "particles": 3000, "rows": rows})


if __name__ == "__main__":
    main()
