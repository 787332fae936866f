"""Figures 3 and 4 of papers/001 by joint training alone: FSC to the truth while it trains, at several noise levels, with a CTF; pictures.

    python benchmarks/reproduce/paper001/figures.py --work DIR --steps 2000

4AKE, 64 px at 1.6 A (the paper: 128 px at 0.8 A), 3,000 images, all of them learnt from, up to Nyquist; one run per data set, nothing
refined. FSC is that of the network's own map, aligned to the truth over rotation, shift and hand, inside the molecule's mask.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import matplotlib as mpl
import torch
from common import APIX, BOX, DIAMETER, LEVELS, Data, commit, simulated, summary, write
from matplotlib import pyplot as plt
from torch import Tensor

from cryorbit.io.mrc import read_volume
from cryorbit.methods.amortized import Amortized, from_starts
from cryorbit.methods.amortized_config import AmortizedConfig
from cryorbit.metrics.evaluation import MapComparison, compare_maps
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import disk_to_images
from cryorbit.physics.slicing import slicing_grid
from cryorbit.simulate.settings import CTFSettings
from cryorbit.training.loop import run
from cryorbit.types import Volume

COUNT, LOOKS, NYQUIST = 3000, 8, BOX // 2 - 1
SETS = {"A": "clean", "B": "10 dB", "C": "5 dB", "D": "0 dB", "E": "-5 dB", "F": "-10 dB", "G": "0 dB, CTF"}
LEVELS |= {f"{db} dB": {"snr_db": float(db)} for db in (10, 5, -5, -10)}
LEVELS["0 dB, CTF"] = {"snr_db": 0.0, "ctf": CTFSettings()}
SHOWN = ("A", "F", "G")


def learnt(
    data: Data, truth: Volume, steps: int, looks: int
) -> tuple[Amortized, list[dict[str, object]], MapComparison]:
    """A network and its map; rows of how the map stood now and then."""
    config = dataclasses.replace(AmortizedConfig(steps=steps), radius_end=0.0)
    method = from_starts(data.stack, config, mask_diameter=DIAMETER)
    rows: list[dict[str, object]] = []
    begun, chosen, found = time.process_time(), torch.arange(500), None

    def look(stage: str, step: int, total: int, values: dict[str, float | str]) -> None:
        nonlocal found
        if step % max(1, total // looks) == 0 or step == total:
            best = method.best
            found = compare_maps(Volume(best.map().cpu(), APIX), truth)
            row = {"step": step, "cpu_s": round(time.process_time() - begun, 1), "commit": commit()}
            row |= summary(data.errors(best.poses(chosen), chosen))
            curve = [round(float(v), 4) for v in found.fsc_masked]
            rows.append(row | {"resolution_0143_masked_A": found.resolution_0143_masked, "fsc_masked": curve})

    run(method, progress=look)
    assert found is not None
    return method.best, rows, found


def pictures(method: Amortized, data: Data, which: int) -> tuple[Tensor, Tensor]:
    """An image, and how the network and its map redraw it."""
    one = torch.tensor([which])
    disk, pose = data.stack.disk, method.poses(one)
    grid = slicing_grid(method.map().cpu(), disk.radius)
    drawn = forward(grid, pose.rotations, pose.shifts, disk, data.stack.ctf(one))
    return disk_to_images(data.stack.images(one), disk)[0], disk_to_images(drawn, disk)[0]


def drawn(
    curves: dict[str, list[dict[str, object]]], shown: dict[str, list[Tensor]], truth: Volume, folder: Path
) -> None:
    """Both figures."""
    mpl.rcParams["font.size"] = 8
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, layout="constrained")
    frequency = [shell / (BOX * APIX) for shell in range(BOX // 2 + 1)]
    rows = curves.get("A", [])
    for i, row in enumerate(rows):
        shade = str(0.85 - 0.85 * i / max(1, len(rows) - 1))
        axes[0].plot(frequency, row["fsc_masked"], color=shade, label=f"{row['step']} steps")
    for name in "ABCDEF":
        if name in curves:
            axes[1].plot(frequency, curves[name][-1]["fsc_masked"], label=f"{name}: {SETS[name]}")
    for name in "DG":
        if name in curves:
            axes[2].plot(frequency, curves[name][-1]["fsc_masked"], label=f"{name}: {SETS[name]}")
    for axis, title in zip(axes, ("without noise, by steps", "by noise", "with and without CTF"), strict=True):
        axis.axhline(0.143, color="tab:red", linestyle=":")
        axis.set(title=title, xlabel="spatial frequency (1/A)", ylim=(-0.1, 1.05))
        axis.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("FSC to the truth, masked")
    figure.savefig(folder / "paper001_figure3.png", dpi=110)
    if not shown:
        return
    figure, axes = plt.subplots(len(shown), 4, figsize=(7.2, 1.9 * len(shown)), layout="constrained", squeeze=False)
    for line, (name, images) in zip(axes, shown.items(), strict=True):
        titles = (f"{name}: {SETS[name]}", "redrawn", "map, projected", "truth, projected")
        for axis, image, title in zip(line, [*images, truth.data.sum(dim=0)], titles, strict=True):
            axis.imshow(image.numpy(), cmap="gray", origin="lower")
            axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(folder / "paper001_figure4.png", dpi=110)


def main() -> None:
    """Train on each set, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder for data; what is there is used.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--figures", type=Path, default=Path("docs/images"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper001_figure3.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.figures.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[dict[str, object]]] = {}
    shown: dict[str, list[Tensor]] = {}
    truth = None
    for name in arguments.sets:
        star = simulated(arguments.work / SETS[name].replace(" ", "").replace(",", "_").lower(), COUNT, SETS[name], 1)
        volume, pixel_size = read_volume(star.with_name("truth.mrc"))
        truth = Volume(torch.from_numpy(volume).float(), pixel_size)
        data = Data.of(star, NYQUIST)
        method, curves[name], last = learnt(data, truth, arguments.steps, LOOKS if name == "A" else 1)
        if name in SHOWN:
            shown[name] = [*pictures(method, data, 0), last.aligned.data.sum(dim=0)]
        print(name, {k: v for k, v in curves[name][-1].items() if k != "fsc_masked"}, flush=True)
        write(
            arguments.output,
            {"box": BOX, "pixel_size_A": APIX, "particles": COUNT, "steps": arguments.steps, "rows": curves},
        )
    assert truth is not None
    drawn(curves, shown, truth, arguments.figures)


if __name__ == "__main__":
    main()
