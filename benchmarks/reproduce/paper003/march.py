"""Molecules larger than 4AKE to 14 A: the map that a learned prior and third moments find on nine rings, followed outwards.

    python benchmarks/reproduce/paper003/march.py ../shared/data --weights prior.safetensors --json benchmarks/results/paper003_march.json

Antibody 1IGY and GroEL 1AON, the farthest atom at 0.8 of the ball, 100,000 images at SNR 1, views as in images.py, no CTF, no shifts. On nine
rings as ``prior.py --only-third`` (32 px); then moments of images in a box of more pixels, 64 filters for each stop of the march
(``cryorbit.methods.moments.march``). ``from_truth``: the last stop again, from the true map. Weights are those that prior.py has learnt.
"""

import argparse
import json
import platform
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from images import noisy_images, views
from prior import BASIS, FIRST, IMAGES, MODELS, POLAR, RADIUS, RINGS, WHOLE, compared, measured, truth
from torch import Tensor

from cryorbit.methods.moment_fit import view_directions
from cryorbit.methods.moment_prior import MomentPrior, PriorConfig
from cryorbit.methods.moments import invert_from, march, marched, marched_rings
from cryorbit.physics.fourier import resize_volume
from cryorbit.physics.image_moments import ImageMomentSums
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.third_moments import ThirdFilters, ThirdSums
from cryorbit.simulate.atoms import read_model
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.proteins import Proteins
from cryorbit.training.loop import run
from cryorbit.volumes.ball import BallBasis

BOXES = {"1igy": (44, 18), "1aon": (60, 24)}  # pixels, last ring: 13.3 and 13.7 A
MARCHED = replace(FIRST, iterations=200)


def first_map(prior: MomentPrior, case: str, seed: int, data: Path) -> tuple[Tensor, dict[str, Any]]:
    """On nine rings, and what it is worth."""
    real, pixel = truth(case, seed, data)
    moments, third, _ = measured(real, views(seed), case, seed, 64)
    begun = time.process_time()
    tried = [invert_from(moments, FIRST, x, third) for x in prior.predict(moments)]
    best = min(tried, key=lambda found: found.objective)
    found = invert_from(moments, WHOLE, BASIS.nearest(best.volume).float(), third)
    return found.volume, compared(found.volume, real, pixel) | {"cpu_s": time.process_time() - begun}


def one(prior: MomentPrior, case: str, seed: int, data: Path) -> dict[str, Any]:
    """From nine rings to the last."""
    box, rings = BOXES[case]
    start, worth = first_map(prior, case, seed, data)
    model, radius = read_model(data / "models" / MODELS[case]), RADIUS * box / POLAR.box
    pixel = model.radius / (0.8 * radius)
    real, basis = make_projector(model, box, pixel).volume(), PolarBasis(box, rings, radius)
    generator, stops = torch.Generator().manual_seed(seed), marched_rings(RINGS, rings)
    sums, thirds, begun = None, None, time.process_time()
    for images, sd, _ in noisy_images(real, views(seed), IMAGES, generator):
        part = ImageMomentSums.of(basis, images, sd**2)
        filters = thirds.filters if thirds else ThirdFilters.random(basis, 64, 12, generator, images, reaches=stops)
        more = ThirdSums.of(filters, images, sd**2)
        sums, thirds = (part, more) if sums is None or thirds is None else (sums + part, thirds + more)
    assert sums is not None
    assert thirds is not None
    moments, third = sums.debiased(torch.ones(1)), thirds.debiased(torch.ones(1))
    about = {"case": case, "seed": seed, "pixel_A": pixel, "box": box, "last_ring_A": box * pixel / rings}
    out: dict[str, Any] = about | {"on_9_rings": worth, "simulating_and_summing_cpu_s": time.process_time() - begun}
    begun = time.process_time()
    found = march(moments, MARCHED, resize_volume(start.float(), box), third, RINGS)
    out["marched"] = compared(found.volume, real, pixel) | {"objective": found.objective, "stops": stops}
    out["marching_cpu_s"] = time.process_time() - begun
    last = marched(MARCHED, RINGS, rings)
    held = BallBasis(box, radius, rings + last.margin, last.degree)
    ideal = invert_from(moments, last, held.nearest(real).float(), third.within(rings))
    out["from_truth"] = compared(ideal.volume, real, pixel) | {"objective": ideal.objective}
    return out | {"truth_held": compared(held.volume(held.nearest(real)), real, pixel), "functions": len(held)}


def main() -> None:
    """Every molecule; JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=list(BOXES), choices=list(BOXES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"commit": commit, "device": f"CPU, {torch.get_num_threads()} thread, {platform.machine()}"}
    prior = MomentPrior(BASIS, view_directions(2), RINGS, Proteins(), PriorConfig())
    run(prior, checkpoint=arguments.weights)
    rows: list[dict[str, Any]] = []
    for case in arguments.cases:
        for seed in range(arguments.seeds):
            rows.append(one(prior, case, seed, arguments.data))
            print(json.dumps(rows[-1]), flush=True)
            arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
