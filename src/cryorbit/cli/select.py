"""``cryorbit select``: the particles of some 2-D classes, or those least likely to be junk, as a STAR file."""

from pathlib import Path
from typing import Annotated

import typer

from cryorbit.errors import ConfigError


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError("CONF420", f"--classes {text}: expected numbers with commas, for example 1,2,5") from None


def select(
    particles: Annotated[Path, typer.Argument(help="particles.star of `cryorbit align2d`, or its run folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="STAR file to write.")],
    classes: Annotated[str, typer.Option("--classes", help="Classes to keep, comma-separated [all].")] = "",
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="Fraction to keep of these, the least junk first, in place of --max-junk."),
    ] = None,
    max_junk: Annotated[float | None, typer.Option("--max-junk", help="Largest junk score kept, in nats [0].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Select particles by 2-D class and junk score, for `reconstruct` or RELION."""
    from cryorbit.cli.console import plain
    from cryorbit.pipeline.selection import select as run

    source = particles / "particles.star" if particles.is_dir() else particles
    kept, total = run(source, output, classes=_numbers(classes), keep=keep, max_junk=max_junk, overwrite=overwrite)
    console = plain()
    console.print(f"particles  {output}: {kept:,} of {total:,}")
