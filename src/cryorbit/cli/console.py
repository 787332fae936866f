"""Where commands print their results."""

from rich.console import Console


def plain() -> Console:
    """Text as it stands on stdout: no markup, so that brackets in paths and messages stay, no colours for numbers, no wrapping."""
    return Console(highlight=False, soft_wrap=True, markup=False)
