"""Table 1 of papers/003 with the classical methods beside the networks: errors (eq. 22) of signal and density for 1, 2, 3 Gaussians.

    python benchmarks/reproduce/paper003/table1.py weights/ --json benchmarks/results/paper003_table1.json

Without noise: networks on 2,000 fresh problems, classical methods on the first of them. With the paper's noise (sigma 1, the signal's root
mean square, 1,000,000 observations): everything on the same few problems. Networks from train.py; those not trained are left out. The
bispectrum and EM read the observations one by one; they get fewer, and the table says how many. Errors over continuous shifts, and over the
shifts of the grid as the paper takes them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from train import about

from cryorbit.methods.mra_classical import bispectrum, lbfgs, spectral
from cryorbit.methods.mra_em import em
from cryorbit.methods.mra_networks import NETWORKS, make_network, predict
from cryorbit.metrics.signals import FINE, signal_error
from cryorbit.physics.moments import Moments, MomentSums, analytic_moments, mean_bispectrum
from cryorbit.physics.moments import bispectrum as exact_bispectrum
from cryorbit.simulate.mra import Mixtures, observations
from cryorbit.training.checkpoint import load_checkpoint

Pair = tuple[Tensor, Tensor]
PAPER = {1: (0.052, 0.048), 2: (0.170, 0.141), 3: (0.206, 0.195)}  # signal, density: test columns of Table 1
SEED = 77


def trained(weights: Path, name: str, components: int) -> torch.nn.Module | None:
    """The network that train.py left, if it did."""
    path = weights / f"{name}_{components}.safetensors"
    if not path.with_suffix(".json").exists():
        return None
    state, _ = load_checkpoint(path)
    network = make_network(name, Mixtures().length)
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
    return network


def errors(found: Pair, true: Pair) -> dict[str, list[float]]:
    """Errors of a batch of pairs."""
    return {
        f"{name}{suffix}": signal_error(a.detach().double(), b, oversample).tolist()
        for name, a, b in zip(("signal", "density"), found, true, strict=True)
        for suffix, oversample in (("", FINE), ("_grid", 1))
    }


def summary(rows: list[dict[str, list[float]]], seconds: float) -> dict[str, float]:
    """Mean and median over problems, CPU-seconds of one."""
    out: dict[str, float] = {}
    for key in rows[0]:
        values = torch.tensor([v for row in rows for v in row[key]])
        out |= {key: float(values.mean()), f"{key}_median": float(values.median())}
    count = sum(len(row["signal"]) for row in rows)
    return out | {"problems": count, "cpu_seconds_each": seconds / count}


def measure(solve: Callable[[int], Pair], true: Pair, count: int) -> dict[str, float]:
    """Solve the first ``count`` problems one by one."""
    rows, started = [], time.process_time()
    for i in range(count):
        signal, density = solve(i)
        rows.append(errors((signal[None], density[None]), (true[0][i : i + 1], true[1][i : i + 1])))
    return summary(rows, time.process_time() - started)


def clean_rows(components: int, weights: Path, networks: int, classical: int) -> dict[str, dict[str, float]]:
    """Noise-free: exact moments."""
    true = Mixtures(components=components).draw(networks, torch.Generator().manual_seed(SEED + components))
    moments = analytic_moments(*true)
    rows = {}
    for name in NETWORKS:
        network = trained(weights, name, components)
        if network is not None:
            started = time.process_time()
            with torch.no_grad():
                found = predict(network, moments)
            rows[name] = summary([errors(found, true)], time.process_time() - started)
    each = [Moments(moments.first[i], moments.second[i]) for i in range(classical)]
    generator = torch.Generator().manual_seed(SEED)
    rows["spectral"] = measure(lambda i: spectral(each[i]), true, classical)
    rows["eigenvector alone"] = measure(lambda i: spectral(each[i], sweeps=0), true, classical)
    rows["bispectrum"] = measure(lambda i: bispectrum(exact_bispectrum(true[0][i]), each[i]), true, classical)
    rows["L-BFGS, 3 starts"] = measure(lambda i: lbfgs(each[i], generator), true, min(classical, 10))
    return rows


def noisy_rows(
    components: int, weights: Path, problems: int, count: int, read_again: int
) -> dict[str, dict[str, float]]:
    """sigma 1, ``count`` observations; ``read_again`` of them for EM and the bispectrum."""
    true = Mixtures(components=components).draw(problems, torch.Generator().manual_seed(SEED + components))
    generator = torch.Generator().manual_seed(SEED + 10 * components)
    moments: list[Moments] = []
    kept: list[Tensor] = []
    started = time.process_time()
    for signal, density in zip(*true, strict=True):
        sums, few = None, list[Tensor]()
        for block in observations(signal, density, count, 1.0, generator):
            sums = MomentSums.of(block) if sums is None else sums + MomentSums.of(block)
            if sum(len(kept_block) for kept_block in few) < read_again:
                few.append(block)
        assert sums is not None
        moments.append(sums.debiased(1.0))
        kept.append(torch.cat(few)[:read_again])
    rows = {"simulation and moments": {"cpu_seconds_each": (time.process_time() - started) / problems}}
    for name in NETWORKS:
        network = trained(weights, name, components)
        if network is not None:
            batch = Moments(torch.stack([m.first for m in moments]), torch.stack([m.second for m in moments]))
            with torch.no_grad():
                rows[name] = summary([errors(predict(network, batch), true)], 0.0)
    rows["spectral"] = measure(lambda i: spectral(moments[i]), true, problems)
    rows["eigenvector alone"] = measure(lambda i: spectral(moments[i], sweeps=0), true, problems)
    rows["L-BFGS, 3 starts"] = measure(lambda i: lbfgs(moments[i], generator), true, problems)

    def by_em(i: int, hold: bool) -> Pair:
        result = em(kept[i], 1.0, spectral(moments[i]), hold_density=hold)
        return result.signal, result.density

    rows[f"EM, density of spectral, {read_again} read"] = measure(lambda i: by_em(i, True), true, problems)
    rows[f"EM, density free, {read_again} read"] = measure(lambda i: by_em(i, False), true, problems)
    rows[f"bispectrum, {read_again} read"] = measure(
        lambda i: bispectrum(mean_bispectrum(kept[i]), moments[i]), true, problems
    )
    return rows


def main() -> None:
    """Measure every row, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--networks", type=int, default=2000, help="Problems for the networks, without noise.")
    parser.add_argument("--classical", type=int, default=50, help="Problems for the classical methods, without noise.")
    parser.add_argument("--problems", type=int, default=6, help="Problems with noise.")
    parser.add_argument("--count", type=int, default=1_000_000, help="Observations of each.")
    parser.add_argument("--read-again", type=int, default=200_000, help="Of them for EM and the bispectrum.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, origin = {}, about()
    for components in PAPER:
        clean = clean_rows(components, arguments.weights, arguments.networks, arguments.classical)
        noisy = noisy_rows(components, arguments.weights, arguments.problems, arguments.count, arguments.read_again)
        paper = dict(zip(("signal", "density"), PAPER[components], strict=True))
        table[str(components)] = {"paper": paper, "clean": clean, "noisy": noisy}
        for kind, rows in (("clean", clean), ("noisy", noisy)):
            for name, row in rows.items():
                if "signal" in row:
                    print(f"{components} {kind} {name}: v {row['signal']:.2g} rho {row['density']:.2g}", flush=True)
    training = {p.stem: json.loads(p.read_text()) for p in sorted(arguments.weights.glob("*.json"))}
    record = {"about": origin, "family": asdict(Mixtures()), "training": training, "gaussians": table}
    record["settings"] = {k: v for k, v in vars(arguments).items() if isinstance(v, int)}
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
