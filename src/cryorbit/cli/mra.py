"""``cryorbit mra`` and ``cryorbit simulate-mra``: one-dimensional orbit recovery, cryo-EM in the small."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from cryorbit.cli.options import LARGEST_SEED
from cryorbit.errors import ConfigError, RunError

Option = typer.Option
RESULTS = ("mra.npz", "mra.csv", "mra.png", "metrics.json")
SET = ("observations.npy", "truth.npz", "simulation.json")


def _check(output: Path, names: tuple[str, ...], overwrite: bool) -> None:
    """Refuse a folder that holds an earlier run, unless it may be replaced; nothing is made yet."""
    if output.exists() and not output.is_dir():
        raise RunError("RUN302", f"{output} is a file, expected a folder", "give another --output")
    there = [name for name in names if (output / name).exists()]
    if there and not overwrite:
        raise RunError("RUN301", f"{output / there[0]} exists already", "give another --output, or --overwrite")


def _sigma(text: str) -> float | None:
    if not text:
        raise ConfigError(
            "CONF407",
            "the noise is not known: --sigma is missing",
            "give its standard deviation, for example --sigma 1.0, or --sigma auto where the signal is smooth",
        )
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError("CONF407", f"--sigma {text}: expected a number or auto") from None


def mra(
    observations: Annotated[Path, typer.Argument(help="Table with one observation per row: .npy, .npz or .csv.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for mra.npz, mra.csv, mra.png and metrics.json.")],
    sigma: Annotated[
        str,
        Option("--sigma", help="Noise per sample, a standard deviation; auto takes it from the highest frequencies."),
    ] = "",
    method: Annotated[
        Literal["auto", "spectral", "em", "bispectrum", "lbfgs"],
        Option(
            "--method",
            help="spectral: from first and second moments, fast. em: marginal likelihood, started there. "
            "bispectrum: works for uniform shifts too. auto: em with noise, spectral without.",
        ),
    ] = "auto",
    truth: Annotated[
        Path | None, Option("--truth", help="File with signal and density (.npz) to compare with.")
    ] = None,
    seed: Annotated[int, Option("--seed", help="Random starts of lbfgs.", min=0, max=LARGEST_SEED)] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace earlier results in the folder.")] = False,
) -> None:
    """Recover a signal, and the density of its circular shifts, from noisy shifted copies (multi-reference alignment)."""
    noise = _sigma(sigma)
    import numpy as np
    import torch
    from rich.console import Console

    from cryorbit.cli.console import plain
    from cryorbit.io.atomic import atomic_path, write_text
    from cryorbit.io.observations import read_observations, read_pair
    from cryorbit.pipeline.mra import compare, into_frame_of, recover
    from cryorbit.report.mra import mra_figure
    from cryorbit.report.style import write_bytes

    table = read_observations(observations)
    true = None if truth is None else read_pair(truth)
    _check(output, RESULTS, overwrite)
    with Console(stderr=True).status(f"{method}: {len(table):,} observations"):
        result = recover(table, noise, method, seed)
    pair = (result.signal, result.density)
    metrics = {"input": str(observations), **result.metrics}
    if true is not None:
        signal, density = (torch.from_numpy(x) for x in true)
        metrics |= {"truth": str(truth), **compare(result, signal, density)}
        pair = into_frame_of(result, signal)
    columns = tuple(x.numpy() for x in pair)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_path(output / "mra.npz") as temporary:
        np.savez(temporary, signal=columns[0], density=columns[1])
    lines = [f"{i},{v:.9g},{p:.9g}" for i, (v, p) in enumerate(zip(*columns, strict=True))]
    write_text(output / "mra.csv", "\n".join(["sample,signal,density", *lines]) + "\n")
    write_bytes(output / "mra.png", mra_figure((columns[0], columns[1]), true))
    write_text(output / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    console = plain()
    kind = "estimated" if noise is None else "given"
    console.print(f"observations  {metrics['observations']:,} of {metrics['length']} samples")
    console.print(f"noise         {metrics['sigma']:.4g} per sample ({kind})")
    console.print(
        f"moments       first within {metrics['first_moment_error']:.2%}, second {metrics['second_moment_error']:.2%}"
    )
    if true is not None:
        console.print(
            f"truth         signal off by {metrics['signal_error']:.2%}, density by {metrics['density_error']:.2%}"
        )
    for warning in result.warnings:
        console.print(f"warning       {warning}")
    console.print(f"written       {output / RESULTS[0]}, {', '.join(RESULTS[1:])}")


def simulate_mra(
    output: Annotated[Path, Option("--output", "-o", help="Folder for observations.npy, truth.npz, simulation.json.")],
    count: Annotated[int, Option("--count", "-n", help="Number of observations.", min=2)] = 100_000,
    length: Annotated[int, Option("--length", help="Samples in each.", min=4, max=4096)] = 41,
    components: Annotated[
        int, Option("--components", help="Gaussians in the signal and in the density.", min=1, max=1000)
    ] = 2,
    width: Annotated[tuple[float, float], Option("--width", help="Their widths, in periods.")] = (0.04, 0.10),
    sigma: Annotated[float, Option("--sigma", help="Noise per sample; the signal has root mean square 1.")] = 1.0,
    seed: Annotated[int, Option("--seed", help="Fixes every random draw.", min=0, max=LARGEST_SEED)] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier set in the folder.")] = False,
) -> None:
    """Simulate noisy circularly shifted copies of a random signal, and keep the truth beside them."""
    from itertools import chain

    import numpy as np
    import torch

    from cryorbit.cli.console import plain
    from cryorbit.io.atomic import atomic_path, write_text
    from cryorbit.simulate.mra import Mixtures, observations

    family = Mixtures(length=length, components=components, width=width)
    generator = torch.Generator().manual_seed(seed)
    signals, densities = family.draw(1, generator)
    blocks = observations(signals[0], densities[0], count, sigma, generator)
    first = next(blocks)  # settings no set can have are refused before there is a folder
    _check(output, SET, overwrite)
    output.mkdir(parents=True, exist_ok=True)
    needed, free = 4 * count * length, shutil.disk_usage(output).free
    if needed > free:
        raise RunError(
            "RUN303",
            f"{count:,} observations of {length} samples take {needed / 1e9:,.1f} GB, {output} has {free / 1e9:,.1f} GB left",
            "use another disk, or fewer observations",
        )
    with atomic_path(output / SET[0]) as temporary:
        table = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(count, length))
        done = 0
        for block in chain([first], blocks):
            table[done : done + len(block)] = block.numpy()
            done += len(block)
        table.flush()
    with atomic_path(output / SET[1]) as temporary:
        np.savez(temporary, signal=signals[0].numpy(), density=densities[0].numpy())
    record = {"count": count, "length": length, "components": components, "width": width, "sigma": sigma, "seed": seed}
    write_text(output / SET[2], json.dumps(record, indent=2) + "\n")
    plain().print(
        f"observations  {output / SET[0]}: {count:,} of {length} samples, sigma {sigma:g}\ntruth         {output / SET[1]}"
    )
