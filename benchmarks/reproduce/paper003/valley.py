"""How near the truth a start must be for the inversion of moments to stay there, and what the map's functions have to do with it.

    python benchmarks/reproduce/paper003/valley.py ../shared/data --json benchmarks/results/paper003_valley.json

4AKE as in images.py, exact moments. ``margin``: Fourier pixels beyond the rings that the functions of the map reach. ``truth_mismatch``: what
the moments of the true map, in those functions and at the best density, are off, without the penalty on negative density;
``truth_negative``: that penalty, before its weight ``positivity``; ``truth_held_fsc_0.5_A``: of the true map in those functions.
Starts: the true map plus ``mix`` times itself with each degree of its harmonics turned by itself (same power, no molecule), all rings at
once, density uniform; once ``inner_rings_first``, as random starts go. ``random``: the random starts of prior.py on its cases, with the
margin that they lack there.
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
from images import molecule
from prior import (
    BOX,
    DEGREE,
    PIXEL,
    RADIUS,
    RANDOM,
    REFINED,
    RINGS,
    SEVERAL,
    degrees_turned,
    seen,
    truth,
    with_best_density,
)

from cryorbit.methods.moment_fit import MomentFit
from cryorbit.methods.moments import invert_from, invert_moments
from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.map_search import align_volumes
from cryorbit.types import Volume
from cryorbit.volumes.ball import BallBasis


def rows_of(margin: int, positivity: float, seed: int) -> list[dict[str, Any]]:
    """Every start for one set of functions and one set of views."""
    generator = torch.Generator().manual_seed(seed)
    real = molecule("4ake", generator)
    moments = seen(real, "4ake", seed)
    basis = BallBasis(BOX, RADIUS, RINGS + margin, DEGREE)
    exact = basis.nearest(real).float()
    free = replace(REFINED, margin=margin, positivity=0.0)
    free_fit = MomentFit(moments, free, RINGS)
    off, negative = with_best_density(free_fit, exact), float(free_fit.maps.penalty(exact))
    held = basis.volume(exact).float()
    wrong, out = degrees_turned(exact, basis, generator), []
    runs = ((0.0, 80, 0), (0.0, 600, 0), (0.3, 80, 0), (0.6, 80, 0), (1.0, 80, 0), (0.3, 80, 5))
    for mix, iterations, inner in runs:
        begun, config = (
            time.process_time(),
            replace(REFINED, margin=margin, positivity=positivity, iterations=iterations),
        )
        start = begin = (exact + mix * wrong) / (1 + mix**2) ** 0.5
        if inner:
            few = BallBasis(BOX, RADIUS, inner + margin, DEGREE).nearest(basis.volume(start)).float()
            begin = basis.nearest(invert_from(moments.within(inner), config, few).volume).float()
        found = invert_from(moments, config, begin)
        taken = time.process_time() - begun
        aligned = align_volumes(Volume(found.volume.float(), PIXEL), Volume(real, PIXEL))
        out.append(
            {
                "margin": margin,
                "seed": seed,
                "positivity": positivity,
                "truth_mismatch": off,
                "truth_negative": negative,
                "truth_held_fsc_0.5_A": resolution(fsc(held, real), 0.5, BOX, PIXEL),
                "mix": mix,
                "iterations": iterations,
                "inner_rings_first": inner,
                "start_correlation": float(torch.nn.functional.cosine_similarity(start, exact, dim=0)),
                "objective": found.objective,
                "fsc_0.5_A": resolution(fsc(aligned.map.data, real), 0.5, BOX, PIXEL),
                "correlation": aligned.correlation,
                "cpu_s": taken,
            }
        )
    return out


def random_starts(case: str, seed: int, data: Path) -> dict[str, Any]:
    """The best of random starts, as in prior.py but for the margin."""
    real, pixel = truth(case, seed, data)
    moments = seen(real, case, seed)
    begun = time.process_time()
    found = invert_moments(moments, replace(RANDOM, margin=REFINED.margin), torch.Generator().manual_seed(seed))
    taken = time.process_time() - begun
    aligned = align_volumes(Volume(found.volume.float(), pixel), Volume(real, pixel))
    at = resolution(fsc(aligned.map.data, real), 0.5, BOX, pixel)
    row = {"random": case, "seed": seed, "objective": found.objective, "fsc_0.5_A": at}
    return row | {"pixel_A": pixel, "correlation": aligned.correlation, "cpu_s": taken}


def main() -> None:
    """Starts at the truth, then random ones; JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--proteins", type=int, default=20)
    parser.add_argument("--only", choices=["truth", "random"], help="Measure these rows, keep the others of the JSON.")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"commit": commit, "device": f"CPU, {torch.get_num_threads()} thread, {platform.machine()}"}
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.only else []
    rows = [row for row in rows if ("random" in row) != (arguments.only == "random")]

    def add(row: dict[str, Any]) -> None:
        rows.append(about | row)
        print(json.dumps(rows[-1]), flush=True)
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")

    if arguments.only != "random":
        for margin, positivity in (
            (0, REFINED.positivity),
            (REFINED.margin, REFINED.positivity),
            (REFINED.margin, 0.0),
        ):
            for seed in range(arguments.seeds):
                for row in rows_of(margin, positivity, seed):
                    add(row)
    if arguments.only != "truth":
        wanted = [(case, seed) for case in SEVERAL for seed in range(arguments.seeds)]
        for case, seed in wanted + [("protein", seed) for seed in range(arguments.proteins)]:
            add(random_starts(case, seed, arguments.data))


if __name__ == "__main__":
    main()
