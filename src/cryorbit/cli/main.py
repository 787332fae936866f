"""The ``cryorbit`` command: verbs, and the one place where errors become messages and exit codes.

Exit codes: 0 done; 1 bad input or settings (a coded message); 2 wrong usage; 130 stopped by the user (resumable).
"""

import sys
from typing import NoReturn

import typer
from rich.console import Console

from cryorbit.cli.align2d import align2d
from cryorbit.cli.assign import assign
from cryorbit.cli.demo import demo
from cryorbit.cli.evaluate import evaluate
from cryorbit.cli.inspect import inspect
from cryorbit.cli.moments import moments
from cryorbit.cli.mra import mra, simulate_mra
from cryorbit.cli.posterior import posterior
from cryorbit.cli.reconstruct import reconstruct
from cryorbit.cli.refine import refine
from cryorbit.cli.report import report
from cryorbit.cli.select import select
from cryorbit.cli.simulate import simulate
from cryorbit.errors import CryorbitError

app = typer.Typer(
    name="cryorbit",
    help="Ab initio cryo-EM: a particle stack in; a map and every particle's pose out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in (
    demo,
    inspect,
    simulate,
    reconstruct,
    refine,
    align2d,
    select,
    evaluate,
    posterior,
    assign,
    report,
    moments,
    mra,
):
    app.command()(verb)
app.command("simulate-mra")(simulate_mra)


def _version(show: bool) -> None:
    if show:
        from cryorbit import __version__

        typer.echo(f"cryorbit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Options of the command itself."""


def _out_of_memory(error: Exception) -> bool:
    """Torch raises a RuntimeError, numpy a MemoryError."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def _refuse(code: str, message: str, hint: str = "") -> NoReturn:
    """One message on stderr, and exit code 1."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error[/] [bold]{code}[/]: ", end="")
    console.print(message, markup=False)
    if hint:
        console.print("\nhint: ", style="cyan", end="")
        console.print(hint, markup=False)
    sys.exit(1)


def main() -> None:
    """Run the command line; bad input ends in one message and exit code 1, never in a traceback."""
    try:
        app()
    except CryorbitError as error:
        _refuse(error.code, error.message, error.hint)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _refuse("FILE900", f"{name}{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        first, *_ = str(error).splitlines() or ["of numpy"]
        _refuse(
            "RUN015",
            f"memory does not suffice: {first}",
            "lower --memory, in which particles are kept, or use a larger machine",
        )
