"""The run folder: created, resumed or refused before any work is done."""

import shutil
from pathlib import Path

from cryorbit.errors import RunError
from cryorbit.pipeline.config import RunConfig, from_toml, to_toml
from cryorbit.pipeline.outputs import write_text


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a run of ours."""
    return (folder / "config.toml").is_file()


def open_run(folder: Path, config: RunConfig, *, overwrite: bool) -> bool:
    """Make ``folder`` ready for ``config``.

    Returns
    -------
    True when an interrupted run of the same config is there to be continued, False for a fresh folder.

    Raises
    ------
    RunError
        The folder cannot be written, holds other files, or a run with other settings.
    """
    try:
        if overwrite and is_run(folder):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
        if occupied and not is_run(folder):
            raise RunError("RUN001", f"{folder} is not empty and holds no cryorbit run", "choose a new --output folder")
        if occupied:
            before = from_toml((folder / "config.toml").read_text())
            if before != config:
                raise RunError(
                    "RUN002",
                    f"{folder} holds a run with other settings",
                    "choose a new --output folder, pass --overwrite to delete that run, or give the settings in its config.toml",
                )
            return True
        write_text(folder / "config.toml", to_toml(config))
        (folder / "checkpoint").mkdir()
    except OSError as error:
        raise RunError(
            "RUN003",
            f"{folder} cannot be written ({error.strerror or error})",
            "choose a writable --output folder with free space",
        ) from error
    return False
