"""Tables, the verdict's logistic weights and its reliability diagram from the rows of ``success_rate.py``."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import binomtest

from cryorbit.pipeline.verdict import DOUBTED, MIXED_CHANCE, TRUSTED, Evidence

Row = dict[str, object]
TWO = "two molecules"


def evidence_of(row: Row) -> Evidence:
    """What a run knew of itself; the expected error of its poses stands among its metrics where an older one did not take it for evidence."""
    return Evidence(**({"spread_deg": row["pose_spread_deg"]} | row["evidence"]))  # type: ignore[operator]


def table(rows: list[Row], ceilings: list[Row], superseded: list[Row]) -> str:
    """One Markdown row per cell: successes (95 % Wilson interval; without the mask), poses, and those under the true map, resolution in the
    mask, chance, time."""
    best = {str(row["cell"]): f"{float(str(row['median_deg'])):.2f}" for row in ceilings}
    lines = [
        "| cell | right | 95 % interval | right, no mask | poses, median (deg) | under the true map (deg) | FSC 0.5 (A) "
        "| known poses (A) | mean P(right) | CPU-s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    chances = left_out_chances(rows, superseded)[1]
    for cell in dict.fromkeys(str(row["cell"]) for row in rows):
        here = [row for row in rows if row["cell"] == cell]

        def middle(key: str, here: list[Row] = here) -> str:
            values = [float(str(row[key])) for row in here if key in row]
            return f"{np.median(values):.2f}" if values else "-"

        right, unmasked = (sum(bool(row[key]) for row in here) for key in ("success", "success_unmasked"))
        chance = np.mean([c for c, row in zip(chances, rows, strict=True) if row["cell"] == cell])
        low, high = binomtest(right, len(here)).proportion_ci(0.95, "wilson")
        lines.append(
            f"| {cell} | {right} of {len(here)} | {low:.2f} to {high:.2f} | {unmasked} | {middle('median_deg')} | {best.get(cell, '-')} | "
            f"{middle('fsc_0.5_masked_A')} | {middle('known_poses_masked_A')} | {chance:.2f} | {middle('cpu_seconds')} |"
        )
    return "\n".join(lines)


SIGNS = {"constant": 0, "periods": 1, "posed": 1, "spread": 1}
"""Which way each piece of evidence may count: no fit shall take agreement for a bad sign."""


def _logistic(x: NDArray[np.float64], y: NDArray[np.float64], ridge: float = 0.05) -> NDArray[np.float64]:
    """Weights of a logistic regression in the order of ``SIGNS``, of these signs, slightly shrunk (not the constant)."""
    sign = 2 * y - 1
    bounds = [(None, None) if s == 0 else (0, None) if s > 0 else (None, 0) for s in SIGNS.values()]

    def loss(w: NDArray[np.float64]) -> float:
        return float(np.logaddexp(0, -sign * (x @ w)).sum() + ridge * (w[1:] ** 2).sum())

    return np.asarray(
        minimize(
            loss, np.zeros(x.shape[1]), method="L-BFGS-B", bounds=bounds, options={"maxiter": 10_000, "ftol": 1e-12}
        ).x
    )


def _auc(score: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    gap = score[y == 1][:, None] - score[y == 0][None, :]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def _range(values: NDArray[np.float64]) -> str:
    return f"{values.min():.3f} to {values.max():.3f}" if len(values) else "-"


def _bins(chance: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float, int]]:
    """Mean chance, share of right runs and number of runs in ten equal bins of the chance."""
    index = np.minimum((chance * 10).astype(int), 9)
    return [(chance[index == b].mean(), y[index == b].mean(), int((index == b).sum())) for b in np.unique(index)]


def _calibration(chance: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Expected calibration error over those bins."""
    return sum(n * abs(p - q) for p, q, n in _bins(chance, y)) / len(y)


def _evidence(rows: list[Row]) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Features, one column for each of ``SIGNS``; which runs were seen to be mixed; and whether each was right."""
    found = [evidence_of(row) for row in rows]
    x = np.array([[one.features()[name] for name in SIGNS] for one in found])
    return x, np.array([one.mixed for one in found]), np.array([float(bool(row["success"])) for row in rows])


def _chance(x: NDArray[np.float64], mixed: NDArray[np.bool_], w: NDArray[np.float64]) -> NDArray[np.float64]:
    chance = 1 / (1 + np.exp(-x @ w))
    return np.where(mixed, np.minimum(chance, MIXED_CHANCE), chance)


def weights_of(rows: list[Row]) -> dict[str, float]:
    """The verdict's weights, fitted to all runs."""
    x, _, y = _evidence(rows)
    return dict(zip(SIGNS, (_logistic(x, y).round(2) + 0.0).tolist(), strict=True))


def left_out_chances(rows: list[Row], superseded: list[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Chance of each of ``rows``, all runs of its cell left out of the fit: by agreement alone, and with the signal that is left."""
    x, mixed, y = _evidence([*rows, *superseded])
    cells = np.array([str(row["cell"]) for row in [*rows, *superseded]])
    agreed, both = np.empty(len(y)), np.empty(len(y))
    for cell in np.unique(cells):
        here = cells == cell
        w = _logistic(x[~here], y[~here])
        agreed[here], both[here] = _chance(x[here], np.zeros_like(mixed[here]), w), _chance(x[here], mixed[here], w)
    return agreed[: len(rows)], both[: len(rows)]


def fit(rows: list[Row], superseded: list[Row], picture: Path) -> str:
    """Weights on all runs, ``superseded`` ones of older engines too; AUC, expected calibration error and diagram of ``rows``, each cell left
    out in turn."""
    _, _, y = _evidence(rows)
    agreed, left_out = left_out_chances(rows, superseded)
    weights = weights_of([*rows, *superseded])
    bins = _bins(left_out, y)
    ece, alone = _calibration(left_out, y), _calibration(agreed, y)
    near = np.array([2.0 < float(str(row.get("median_deg", 0.0))) < 10.0 for row in rows])
    hopeless = np.array([bool(row["hopeless"]) for row in rows])
    told = np.array([evidence_of(row).unexplained is not None for row in rows])
    left = np.array([evidence_of(row).unexplained or 0.0 for row in rows])
    two = np.array([row["cell"] == TWO for row in rows])
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#9aa1a9", lw=1)
    axes.scatter([b[0] for b in bins], [b[1] for b in bins], s=[20 + 3 * b[2] for b in bins], color="#2b6cb0")
    for p, q, n in bins:
        axes.annotate(str(n), (p, q), textcoords="offset points", xytext=(8, -4), fontsize=8)
    axes.set_xlabel("stated chance of being right (cell left out of the fit)")
    axes.set_ylabel("share of runs that were right")
    axes.set_title(f"{len(y)} runs, AUC {_auc(left_out, y):.3f}, calibration error {ece:.3f}", fontsize=9)
    figure.savefig(picture, dpi=130)
    return "\n".join(
        [
            "WEIGHTS = {" + ", ".join(f'"{name}": {weight}' for name, weight in weights.items()) + "}",
            f"{len(y)} runs, {int(y.sum())} right. Cell left out: AUC {_auc(left_out, y):.3f}, calibration error {ece:.3f}; by agreement alone "
            f"{_auc(agreed, y):.3f}, {alone:.3f}",
            f"trusted (>= {TRUSTED}): {int((left_out >= TRUSTED).sum())}, wrong among them {int(((left_out >= TRUSTED) & (y == 0)).sum())}",
            f"not trusted (< {DOUBTED}): {int((left_out < DOUBTED).sum())}, right among them {int(((left_out < DOUBTED) & (y == 1)).sum())}",
            f"poses 2 to 10 degrees off: {int(near.sum())} runs, AUC {_auc(left_out[near], y[near]):.3f}, calibration error "
            f"{_calibration(left_out[near], y[near]):.3f}",
            f"signal unexplained, {int((told & two).sum())} runs on two molecules: {_range(left[told & two])}; "
            f"{int((told & ~two).sum())} other runs in which it was measured: {_range(left[told & ~two])}",
            f"largest chance given to a hopeless run: {left_out[hopeless].max() if hopeless.any() else math.nan:.3f}, "
            f"by agreement alone {agreed[hopeless].max() if hopeless.any() else math.nan:.3f}",
        ]
    )
