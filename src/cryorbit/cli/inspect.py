"""``cryorbit inspect``: what is in a file, and what is wrong with it."""

from pathlib import Path
from typing import Any

import typer


def _value(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"min", "median", "max"}:
        low, middle, high = (f"{value[key]:.6g}" for key in ("min", "median", "max"))
        return low if low == high else f"{low} to {high} (median {middle})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
        return ", ".join(f"{key.replace('_', ' ')} {_value(item)}" for key, item in value.items())
    return "none" if value is None else str(value)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        title = name.replace("_", " ")
        if name == "columns":
            rows.append((title, str(len(value))))
        elif name in ("ctf", "images", "shifts") and isinstance(value, dict):
            rows += [(f"{title}: {key.replace('_', ' ')}", _value(item)) for key, item in value.items()]
        elif name == "optics_groups":
            rows += [(f"optics group {row['group']}", _value(row | {"group": None})) for row in value]
        else:
            rows.append((title, _value(value)))
    return rows


def inspect(
    file: Path = typer.Argument(..., help="STAR, .cs, .mrcs, .mrc, .map, list of stacks (.txt), or cryoDRGN .pkl."),
    datadir: Path | None = typer.Option(None, "--datadir", help="Folder of the image stacks."),
    pixel_size: float | None = typer.Option(None, "--pixel-size", help="Angstrom per pixel; overrides the file."),
    passthrough: Path | None = typer.Option(None, "--passthrough", help="cryoSPARC passthrough file of a .cs file."),
    invert_contrast: bool = typer.Option(False, "--invert-contrast", help="The protein is dark: use images times -1."),
    as_json: bool = typer.Option(False, "--json", help="Print the facts and findings as JSON."),
) -> None:
    """Say what is in a file and what is wrong with it. Exit code 0: usable; 1: not."""
    import json

    from cryorbit.io.examine import examine

    found = examine(
        file, datadir=datadir, pixel_size=pixel_size, passthrough=passthrough, invert_contrast=invert_contrast
    )
    if as_json:
        findings = [vars(finding) for finding in found.findings]
        answer: dict[str, Any] = {"file": str(file), "kind": found.kind, "usable": found.usable}
        answer |= {"facts": found.facts, "findings": findings}
        typer.echo(json.dumps(answer, indent=2))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console(highlight=False, soft_wrap=True)
        console.print(f"[bold]{escape(str(file))}[/bold]: {found.kind}")
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in _rows(found.facts):
            table.add_row(name, escape(value))
        console.print(table)
        colour = {"error": "red", "warning": "yellow", "note": "blue"}
        for finding in found.findings:
            code = f" {finding.code}" if finding.code else ""
            console.print(f"[{colour[finding.level]}]{finding.level}{code}[/]: {escape(finding.message)}")
            if finding.hint:
                console.print(f"  hint: {escape(finding.hint)}")
        console.print("usable" if found.usable else "[red]not usable as it is[/red]")
    raise typer.Exit(0 if found.usable else 1)
