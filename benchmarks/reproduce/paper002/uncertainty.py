"""Figures 4, 5 and 9 of papers/002 and what they promise: resolution without half-sets, missing views, coverage; poses known.

    python benchmarks/reproduce/paper002/uncertainty.py ../shared/data --json benchmarks/results/paper002_uncertainty.json

`fig4`: resolution predicted from the posterior of all images, beside that measured between posterior means of half-sets (FSC 0.143) and
against the truth (FSC 0.5), and that of each half's own mean against the truth (section 6.2: what is lost by splitting the images); coverage
of 90 % intervals, overall and of shells 2 to Nyquist. `4 over seeds`: the means of these over new poses and noise, the shells' coverage before
its least and most are taken, and the range of `shells_off_truth`. `fig5`: a cone of 30 degrees, without and with noise (`fig9`):
mean of variance over prior (with noise: up to the predicted resolution) where no slice passes within half a Fourier pixel and where many
do, and the rank correlation of what is learnt with the number of slices that pass.
"""

import argparse
import json
from pathlib import Path

import torch
from common import Data, exact, half, simulate, write
from scipy.stats import spearmanr
from torch import Tensor

from cryorbit.methods.map_posterior import MapPosterior
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.spectrum import half_set_fsc, predicted_resolution, ss_snr, truth_fsc
from cryorbit.physics.fourier import shell_index

SETS = {"4ake": (64, 1.6), "1aon": (64, 5.6), "1igy": (64, 3.2)}


def figure4(data: Data, cell: dict[str, object]) -> dict[str, object]:
    """One noise level and view distribution."""
    stack = data.stack(4.0)
    truth, box, apix = data.true_map(stack), stack.box, stack.pixel_size
    found, _ = exact(stack, data.known)
    halves = [exact(stack, half(data.known, which))[0].mean for which in (0, 1)]
    alpha = ss_snr(found.mean, found.variance)
    between, against = fsc(*halves), fsc(found.mean, truth)
    alone = sum(resolution(fsc(mean, truth), 0.5, box, apix) for mean in halves) / 2
    coverage = interval_coverage(found.mean, found.variance, truth)
    predicted, measured = predicted_resolution(alpha, box, apix), resolution(between, 0.143, box, apix)
    return cell | {
        "predicted_A": predicted,
        "half_sets_0143_A": measured,
        "truth_05_A": resolution(against, 0.5, box, apix),
        "half_truth_05_A": alone,
        "shells_off_half_sets": abs(box * apix / predicted - box * apix / measured),
        "shells_off_truth": abs(box * apix / predicted - box * apix / resolution(against, 0.5, box, apix)),
        "largest_difference_half_sets": float((half_set_fsc(alpha) - between)[2:-1].abs().max()),
        "largest_difference_truth": float((truth_fsc(alpha) - against)[2:-1].abs().max()),
        "covered_90": coverage.overall,
        "covered_90_by_shell": coverage.by_shell[2 : box // 2].tolist(),
    }


def over_seeds(cell: dict[str, object], rows: list[dict[str, object]]) -> dict[str, object]:
    """Means of a cell's rows."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, float) and key not in cell]
    table = {key: torch.tensor([row[key] for row in rows]) for key in numbers}
    shells = torch.tensor([row["covered_90_by_shell"] for row in rows]).mean(dim=0)
    return cell | {
        "figure": "4 over seeds",
        "seeds": len(rows),
        **{key: float(values.mean()) for key, values in table.items()},
        "shells_off_truth_range": [float(table["shells_off_truth"].min()), float(table["shells_off_truth"].max())],
        "covered_90_least_shell": float(shells.min()),
        "covered_90_most_shell": float(shells.max()),
        "covered_90_shells_within_2": float(((shells - 0.9).abs() <= 0.02).double().mean()),
    }


def passing(rotations: Tensor, points: Tensor) -> Tensor:
    """How many slices pass within half a Fourier pixel of each point (x, y, z)."""
    return torch.cat([((p @ rotations[:, 2].T).abs() < 0.5).sum(dim=1) for p in points.split(2000)])


def figure5(data: Data, found: MapPosterior, cell: dict[str, object]) -> dict[str, object]:
    """Variance over prior against how many slices pass."""
    box = found.mean.shape[-1]
    index = shell_index(box)
    alpha = ss_snr(found.mean, found.variance)
    resolved = round(box * data.truth.pixel_size / predicted_resolution(alpha, box, data.truth.pixel_size))
    limit = box // 2 - 2 if cell["snr"] is None else max(6, min(box // 2 - 2, resolved))
    chosen = torch.nonzero((index >= 3) & (index <= limit) & (found.variance > 0))
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:20000]]
    z, y = (torch.where(2 * c < box, c, c - box) for c in chosen[:, :2].T)
    count = passing(data.truth.poses.rotations, torch.stack([chosen[:, 2], y, z], dim=1).float())
    shell = index[chosen[:, 0], chosen[:, 1], chosen[:, 2]]
    ratio = found.variance[chosen[:, 0], chosen[:, 1], chosen[:, 2]] / found.prior[shell]
    many = count > count[count > 0].double().median()
    return cell | {
        "last_shell": limit,
        "uncertainty_unseen": float(ratio[count == 0].mean()),
        "uncertainty_seen": float(ratio[many].mean()),
        "unseen_share": float((count == 0).double().mean()),
        "rank_correlation": float(spearmanr((1 - ratio).numpy(), count.numpy()).statistic),
    }


def main() -> None:
    """Every cell, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for snr in (None, 0.04):
        box, apix = SETS["1aon"]
        data = simulate(arguments.data, arguments.count, snr, box=box, pixel_size=apix, kind="cone")
        found, _ = exact(data.stack(4.0), data.known)
        rows.append(figure5(data, found, {"figure": "5" if snr is None else "9", "set": "1aon", "snr": snr}))
        print(json.dumps(rows[-1]), flush=True)
    for name, (box, apix) in SETS.items():
        for snr in (0.1, 0.04, 0.01):
            for kind in ("uniform", "preferred"):
                cell: dict[str, object] = {"set": name, "snr": snr, "views": kind, "images": arguments.count}
                own = []
                for seed in range(arguments.seeds):
                    data = simulate(
                        arguments.data,
                        arguments.count,
                        snr,
                        name=name,
                        box=box,
                        pixel_size=apix,
                        kind=kind,
                        seed=seed,
                    )
                    own.append(figure4(data, cell | {"figure": "4", "seed": seed}))
                rows += [*own, over_seeds(cell, own)]
                print(json.dumps(rows[-1]), flush=True)
                if arguments.json:
                    write(arguments.json, rows)


if __name__ == "__main__":
    main()
