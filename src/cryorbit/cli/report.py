"""``cryorbit report``: write the report of a run again."""

from pathlib import Path

import typer


def report(run: Path = typer.Argument(..., help="Run folder of cryorbit reconstruct.")) -> None:
    """Write report.html and figures/ of a run folder again, from its files alone."""
    from cryorbit.cli.console import plain
    from cryorbit.report.render import write_report

    plain().print(f"report     {write_report(run)}")
