"""``cryorbit moments``: a coarse map from averages over images, without the pose of any."""

import re
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from cryorbit.cli import options
from cryorbit.cli.reconstruct import configured
from cryorbit.errors import ConfigError


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    part, parts = (int(x) for x in found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ConfigError("CONF408", f"--part {text}: expected the number of a part and of how many, as in 2/4")
    return part, parts


def moments(
    particles: options.Particles,
    output: options.Output,
    mask_diameter: options.MaskDiameter = 0.0,
    shift_sigma: Annotated[
        float,
        typer.Option(
            "--shift-sigma", help="Standard deviation (A) of each coordinate of shifts that are left in the images."
        ),
    ] = 0.0,
    resolution: Annotated[
        float,
        typer.Option(
            "--resolution", help="Angstrom to follow the map to, beyond 8 periods per particle diameter (0: not)."
        ),
    ] = 0.0,
    prior: Annotated[
        Path | None,
        typer.Option(
            "--prior",
            help="Also start from a network's maps; its weights are kept in this file and taught first where it is not there.",
        ),
    ] = None,
    part: Annotated[
        str, typer.Option("--part", help="Only sum this part of the images, as in 2/4; other processes sum the others.")
    ] = "1/1",
    others: Annotated[
        list[Path], typer.Option("--with", help="Run folder of another part: add its sums, then invert. Repeatable.")
    ] = [],  # noqa: B006 - typer's default
    datadir: options.Datadir = None,
    pixel_size: options.PixelSize = 0.0,
    contrast: options.Contrast = "auto",
    no_ctf: options.NoCTF = False,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Half sets, filters and random starts.")] = 0,
    set_: options.Set = [],  # noqa: B006 - typer's default
    overwrite: options.Overwrite = False,
) -> None:
    """Average images into moments in one pass, and find the map that has them: coarse, with no pose of any particle."""
    number, parts = _part(part)
    from cryorbit.cli.console import plain
    from cryorbit.cli.progress import reported
    from cryorbit.pipeline.config import MOMENTS
    from cryorbit.pipeline.moments import map_of_moments
    from cryorbit.report.moments import write_moments_figure

    config = configured(
        particles,
        datadir,
        [
            f"moments.part={number}",
            f"moments.parts={parts}",
            f"moments.shift_sigma={shift_sigma}",
            f"moments.resolution={resolution}",
            *set_,
        ],
        start=MOMENTS,
        mask_diameter=mask_diameter,
        seed=seed,
        device=device,
        pixel_size=pixel_size,
        contrast=contrast,
        no_ctf=no_ctf,
    )
    console = plain()
    with reported(console) as progress:
        m, found = map_of_moments(config, output, others=others, prior=prior, overwrite=overwrite, progress=progress)
    console.print(
        f"moments    of {m['particles']:,} of {m['particles_in_file']:,} particles, {m['rings']} rings, to {m['finest_A']:.1f} A"
    )
    for warning in m["warnings"]:
        console.print(f"note: {warning}")
    if found is None:
        console.print(f"\nsums       {output}: add them with --with {quote(str(output))} when the last part is summed")
        return
    first, second = m["moments_off"]
    over = m["third_moments_over_noise"]
    console.print(
        f"matched    first moment within {first:.2%}, second {second:.2%}"
        + ("" if over is None else f"; third moments {over:.0f} times their error")
    )
    reached = m["resolution_0.5_A"]
    console.print(
        "halves     "
        + (
            "do not agree: this map is not to be trusted"
            if reached is None
            else f"agree to {reached:.1f} A (FSC 0.5)" + (", the last ring" if reached == m["finest_A"] else "")
        )
    )
    arrays = (x.numpy() for x in (found.curve, found.directions, found.density))
    page = write_moments_figure(output / "moments.png", found.volume.data.numpy(), found.volume.pixel_size, *arrays)
    console.print(f"\nmap        {output / 'map.mrc'}\nviews      {output / 'views.csv'}\npicture    {page}")
