"""Train the encoders of papers/003 section 5.1.1 and keep their weights; table1.py and figure4.py read them.

    python benchmarks/reproduce/paper003/train.py weights/ --network equivariant --components 1 2 3

Fresh pairs at every step, one thread. Stopped runs go on when the command is given again. Each run leaves NETWORK_K.safetensors and
NETWORK_K.json with its settings, CPU-seconds and commit.
"""

import argparse
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cryorbit.methods.mra_networks import NETWORKS, Supervised, SupervisedConfig
from cryorbit.simulate.mra import Mixtures
from cryorbit.training.history import History
from cryorbit.training.loop import run


def about() -> dict[str, object]:
    """Commit, device and library version of a result."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {"commit": commit, "device": f"CPU, {torch.get_num_threads()} thread", "torch": torch.__version__}


def main() -> None:
    """Train each combination asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default=NETWORKS[0])
    parser.add_argument("--components", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.weights.mkdir(parents=True, exist_ok=True)
    for components in arguments.components:
        name = f"{arguments.network}_{components}"
        family = Mixtures(components=components)
        method = Supervised(family, SupervisedConfig(network=arguments.network, steps=arguments.steps))
        history = History(arguments.weights / f"{name}.jsonl")
        origin, started = about(), time.process_time()
        run(method, checkpoint=arguments.weights / f"{name}.safetensors", history=history)
        row: dict[str, Any] = {"family": asdict(family), "config": asdict(method.config), "about": origin}
        seconds = time.process_time() - started
        row |= {"pairs": arguments.steps * method.config.batch, "cpu_seconds": seconds}
        row |= {"parameters": sum(p.numel() for p in method.network.parameters())}
        (arguments.weights / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n")
        print(name, round(seconds), "CPU-s", flush=True)


if __name__ == "__main__":
    main()
