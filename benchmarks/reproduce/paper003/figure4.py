r"""Figure 4 of papers/003: a network's weights fitted to noisy moments (eq. 28), from trained and from untrained weights.

    python benchmarks/reproduce/paper003/figure4.py weights/ --json benchmarks/results/paper003_figure4.json \
        --png docs/images/paper003_figure4.png

Mixtures of 2 Gaussians, sigma 1, 1,000,000 observations each. The spectral method on the same moments is drawn in.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from table1 import errors, trained
from torch import Tensor
from train import about

from cryorbit.methods.mra_classical import spectral
from cryorbit.methods.mra_networks import NETWORKS, Refinement, make_network
from cryorbit.physics.moments import Moments, MomentSums, analytic_moments, relative_errors
from cryorbit.report.style import BLUE, GREEN, ORANGE, figure, plain, png, write_bytes
from cryorbit.simulate.mra import Mixtures, observations
from cryorbit.training.loop import run

SEED = 404
CURVES = {"moments": "sum of relative errors of M1, M2", "signal": "signal error", "density": "density error"}


class Recorded(Refinement):
    """Refinement that keeps the errors against the truth as it goes."""

    def watch(self, true: tuple[Tensor, Tensor], every: int) -> None:
        """Record before every ``every``-th step."""
        self.true, self.every = true, every
        self.curve: list[dict[str, float]] = []

    def look(self, index: int) -> None:
        """Write down where every problem stands."""
        with torch.no_grad():
            found = self.pairs()
            first, second = relative_errors(analytic_moments(*found), self.given)
            off = errors(found, self.true)
        values = {"moments": (first + second).tolist(), "signal": off["signal"], "density": off["density"]}
        self.curve.append({"step": index, **{k: sum(v) / len(v) for k, v in values.items()}})

    def step(self, index: int) -> dict[str, float | str]:
        """One step, looked at now and then."""
        if index % self.every == 0:
            self.look(index)
        return super().step(index)


def empirical(signal: Tensor, density: Tensor, count: int, generator: torch.Generator) -> Moments:
    """Debiased moments of ``count`` simulated observations with sigma 1."""
    sums = None
    for block in observations(signal, density, count, 1.0, generator):
        sums = MomentSums.of(block) if sums is None else sums + MomentSums.of(block)
    assert sums is not None
    return sums.debiased(1.0)


def draw(record: dict, path: Path) -> None:
    """One panel per error, logarithmic."""
    made = figure(11.0, 3.2)
    for axes, (key, label) in zip(made.subplots(1, 3), CURVES.items(), strict=True):
        plain(axes, "iteration", label)
        for start, colour in (("trained", BLUE), ("untrained", ORANGE)):
            points = record["curves"][start]
            axes.plot([p["step"] for p in points], [p[key] for p in points], color=colour, label=f"{start} weights")
        axes.axhline(record["spectral"][key], color=GREEN, linestyle="--", label="spectral, no iterations")
        axes.set_yscale("log")
    made.axes[0].legend(frameon=False, fontsize=9)
    write_bytes(path, png(made))


def main() -> None:
    """Fit, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default=NETWORKS[0])
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    true = Mixtures(components=2).draw(arguments.instances, generator)
    given = [empirical(*pair, arguments.count, generator) for pair in zip(*true, strict=True)]
    pairs = [spectral(moments) for moments in given]
    both = (torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]))
    fits = [relative_errors(analytic_moments(*p), m) for p, m in zip(pairs, given, strict=True)]
    level = {k: sum(v) / len(v) for k, v in errors(both, true).items()}
    level["moments"] = sum(float(a + b) for a, b in fits) / len(fits)
    settings = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}
    record = {"about": about(), "settings": settings, "spectral": level, "curves": {}, "cpu_seconds": {}}
    networks = {"trained": trained(arguments.weights, arguments.network, 2)}
    networks["untrained"] = make_network(arguments.network, Mixtures().length, seed=1)
    for start, network in networks.items():
        if network is None:
            parser.error(f"no trained weights of {arguments.network} for 2 Gaussians: run train.py first")
        began = time.process_time()
        method = Recorded(network, given, steps=arguments.iterations, rate=arguments.rate)
        method.watch(true, max(1, arguments.iterations // 30))
        run(method)
        method.look(arguments.iterations)
        record["curves"][start], record["cpu_seconds"][start] = method.curve, time.process_time() - began
        print(start, method.curve[0], method.curve[-1], round(record["cpu_seconds"][start]), "CPU-s", flush=True)
    print("spectral", level)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.png:
        draw(record, arguments.png)


if __name__ == "__main__":
    main()
