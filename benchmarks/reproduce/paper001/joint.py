"""Joint training from a random start: what each addition to the paper's model is worth, and the curves of its Fig. 2.

    python benchmarks/reproduce/paper001/joint.py --work DIR --what ablation
    python benchmarks/reproduce/paper001/joint.py --work DIR --what ablation --rows all "one head" --seeds 2
    python benchmarks/reproduce/paper001/joint.py --work DIR --what figure2
    python benchmarks/reproduce/paper001/joint.py --work DIR --what trials --steps 1400 --seeds 2

Particles the network has not seen are posed by it; errors are after the best common rotation and hand. Rows
that are not run again stay in the JSON as they are; each run names its seed and commit. ``figure2`` trains the paper's model
(Euler angles, quaternions, S2 x S2), its yardsticks and ours on what 64 px images hold up to 15 Fourier pixels (6.8 A), for ``--steps``
(the paper: 10,000; ours: its own default). ``trials``: whether a start's trial tells how it ends.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from common import DIAMETER, Data, commit, simulated, summary, write
from matplotlib import pyplot as plt

from cryorbit.methods.amortized import Amortized, TablePoses, Tomo, from_starts
from cryorbit.methods.amortized_config import AmortizedConfig, DecoderConfig, TableConfig
from cryorbit.methods.starts import Starts, in_trial
from cryorbit.pipeline.config import RunConfig, preset
from cryorbit.training.loop import Method, run

RADIUS, TRAINED, HELD_OUT, LOOKS = 15.0, 2000, 500, 20
FIGURE2 = {"euler": "Euler angles", "quaternion": "quaternions", "s2s2": "S2 x S2", "ours": "ours"}
FIGURE2 |= {"ad": "a table of poses (AD)", "tomo": "known poses (tomo)"}
# What the other rows change one setting of.
BASE: dict[str, Any] = {"starts": 1, "polar": False, "heads": 4, "copies": "c2", "radius_start": 2.0}
ROWS: dict[str, dict[str, Any]] = {
    "all": {},
    "without the symmetrised loss": {"copies": "c1"},
    "one head": {"heads": 1},
    "plain L2": {"likelihood": "l2"},
    "no batch normalisation, PyTorch's start": {"normalised": False, "he": False},
    "no copies drawn": {"augmented": False},
    "quarter turns": {"copies": "c4"},
    "eight directions": {"polar": True, "copies": "c1", "heads": 2},
    "eight directions, more detail at first": {"polar": True, "copies": "c1", "heads": 2, "radius_start": 4.0},
    "eight directions, more detail at first, three starts": {
        "polar": True,
        "copies": "c1",
        "heads": 2,
        "radius_start": 4.0,
        "starts": 3,
    },
    "more detail at first": {"radius_start": 4.0},
    "quarter turns and mirror images": {"copies": "d4", "augmented": False},
    "a Gauss-Newton step": {"gauss_newton": 1},
    "a Gauss-Newton step from the start": {"gauss_newton": 1, "gauss_newton_from": 0.0},
    "neural field": {"volume": "neural"},
    "evidence bound": {"objective": "elbo"},
    "no march": {"radius_start": 8.0},
    "no shifts": {"fit_shift": False},
}


def trained(method: Method, data: Data, looks: int) -> list[dict[str, float]]:
    """Train ``method``, looking at its poses now and then; CPU seconds are of training alone."""
    rows: list[dict[str, float]] = []
    chosen = torch.arange(TRAINED, TRAINED + HELD_OUT) if isinstance(method, Starts) else torch.arange(HELD_OUT)
    every, seconds, losses = max(1, method.total_steps() // looks), 0.0, []

    def look(stage: str, step: int, total: int, values: dict[str, float | str]) -> None:
        nonlocal seconds
        losses.append(float(values["unexplained"]))
        if step % every == 0:
            seconds += time.process_time() - begun[0]
            row = {
                "step": step,
                "unexplained": float(f"{sum(losses[-every:]) / every:.3g}"),
                "cpu_s": round(seconds, 1),
            }
            known = method.starts[int(values["start"])] if isinstance(method, Starts) else method
            if isinstance(known, Amortized | TablePoses):
                row |= summary(data.errors(known.poses(chosen), chosen))
            rows.append(row)
            begun[0] = time.process_time()

    begun = [time.process_time()]
    run(method, progress=look)
    return rows


def ablation(
    data: Data,
    steps: int,
    seeds: int,
    names: list[str],
    out: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """The rows ``names``, each :data:`BASE` with what the row changes; added to ``out``."""
    members = torch.arange(TRAINED)
    for name in names:
        config = dataclasses.replace(AmortizedConfig(steps=steps), **{**BASE, **ROWS[name]})
        ends = []
        for seed in range(seeds):
            method = from_starts(data.stack, config, mask_diameter=DIAMETER, members=members, seed=seed)
            ends.append({"seed": seed, "commit": commit(), **trained(method, data, 1)[-1]})
            print(name, ends[-1], flush=True)
        out[name] = ends
        keep(out)


def figure2(
    data: Data, steps: int, seeds: int, names: list[str], out: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Loss and error against steps of the models ``names``, a run of each per seed; those ``out`` does not have yet are added to it."""
    printed = preset(RunConfig(particles="-", preset="paper001")).amortized
    printed = dataclasses.replace(printed, steps=steps, bfloat16=True)
    plain: dict[str, Any] = {
        name: getattr(printed, name) for name in ("batch", "likelihood", "radius_start", "radius_end")
    }
    members = torch.arange(TRAINED)
    common: dict[str, Any] = {"mask_diameter": DIAMETER, "members": members}
    named = {name: dataclasses.replace(printed, parametrisation=name) for name in ("euler", "quaternion", "s2s2")}
    named["ours"] = AmortizedConfig()

    def encoded(config: AmortizedConfig, seed: int) -> Method:
        return from_starts(data.stack, config, seed=seed, **common)

    kinds: dict[str, Callable[[int], Method]] = {name: partial(encoded, config) for name, config in named.items()}
    kinds["ad"] = lambda seed: TablePoses(data.stack, TableConfig(steps=steps, **plain), seed=seed, **common)
    kinds["tomo"] = lambda seed: Tomo(
        data.stack, DecoderConfig(steps=steps, **plain), poses=data.poses, seed=seed, **common
    )
    for seed, name in product(range(seeds), names):
        runs = out.setdefault(name, {})
        if str(seed) not in runs:
            runs[str(seed)] = {"commit": commit(), "looks": trained(kinds[name](seed), data, LOOKS)}
            print(name, seed, runs[str(seed)]["looks"][-1], flush=True)
            keep(out)


def trials(
    data: Data, steps: int, seeds: int, names: list[str], out: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Every start that the default would try, each to its end: what it left unexplained in its trial, and where it ends."""
    config, chosen = AmortizedConfig(steps=steps), torch.arange(TRAINED, TRAINED + HELD_OUT)
    trial = round(config.trial * steps)
    for seed, start in product(range(seeds), range(config.starts)):
        method = Amortized(
            data.stack, config, mask_diameter=DIAMETER, members=torch.arange(TRAINED), seed=seed, start=start
        )
        left: list[float] = []
        run(method, progress=lambda stage, step, total, values, left=left: left.append(float(values["unexplained"])))  # type: ignore[misc]
        row = {"commit": commit(), "unexplained_in_trial": float(in_trial(torch.tensor(left[:trial]).double()))}
        row |= {"unexplained": sum(left[-50:]) / 50, **summary(data.errors(method.poses(chosen), chosen))}
        out.setdefault(str(seed), {})[str(start)] = row
        print(seed, start, row, flush=True)
        keep(out)


def drawn(rows: dict[str, Any], path: Path) -> None:
    """Power left unexplained and pose error against steps: a line per run."""
    mpl.rcParams["font.size"] = 8
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for i, (name, runs) in enumerate(rows.items()):
        for j, found in enumerate(runs.values()):
            looks = found["looks"]
            style = {"color": f"C{i}", "label": FIGURE2[name] if j == 0 else None, "linewidth": 1.0}
            steps = [look["step"] for look in looks]
            axes[0].semilogy(steps, [look["unexplained"] for look in looks], **style)
            if "median_deg" in looks[0]:
                axes[1].semilogy(steps, [look["median_deg"] for look in looks], **style)
    axes[0].set(xlabel="steps", ylabel="power left unexplained")
    axes[1].set(xlabel="steps", ylabel="median error of poses (degrees)")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


MEASURED: dict[str, tuple[dict[str, Any], Callable[..., None]]] = {
    "ablation": (ROWS, ablation),
    "figure2": (FIGURE2, figure2),
    "trials": ({}, trials),
}


def main() -> None:
    """One of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Folder for data; what is there is used.")
    parser.add_argument("--what", choices=tuple(MEASURED), required=True)
    parser.add_argument("--level", default="clean", choices=("clean", "0 dB"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--rows", nargs="+", choices=[*ROWS, *FIGURE2], help="Some of the ablation, or models of figure 2."
    )
    parser.add_argument("--figures", type=Path, default=Path("docs/images"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.figures.mkdir(parents=True, exist_ok=True)
    star = simulated(arguments.work / arguments.level.replace(" ", "").lower() / "sim", 3000, arguments.level, 1)
    data = Data.of(star, RADIUS)
    output = arguments.output or Path(f"benchmarks/results/paper001_{arguments.what}.json")
    sizes = {"level": arguments.level, "trained": TRAINED, "held_out": HELD_OUT, "radius_px": RADIUS}
    sizes["steps"] = arguments.steps
    before = json.loads(output.read_text()) if output.exists() else sizes | {"rows": {}}
    if {name: before[name] for name in sizes} != sizes:
        parser.error(f"{output} holds runs of other sizes, give another --output")
    known, measure = MEASURED[arguments.what]
    measure(
        data,
        arguments.steps,
        arguments.seeds,
        [name for name in known if name in (arguments.rows or known)],
        before["rows"],
        lambda rows: write(output, sizes | {"rows": rows}),
    )
    if arguments.what == "figure2":
        drawn(before["rows"], arguments.figures / "paper001_figure2.png")


if __name__ == "__main__":
    main()
