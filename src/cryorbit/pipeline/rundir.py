"""The run folder: created, resumed, locked or refused before any work is done."""

import fcntl
import os
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cryorbit.errors import ConfigError, RunError
from cryorbit.io.atomic import unfinished, write_text
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig, decisive, flat, from_toml, to_toml
from cryorbit.pipeline.inputs import Inputs

OURS = (
    "map.mrc",
    "map_sharpened.mrc",
    "local_resolution.mrc",
    "half_map_1.mrc",
    "half_map_2.mrc",
    "particles.star",
    "poses.npz",
    "fsc.csv",
    "metrics.json",
    "history.jsonl",
    "provenance.json",
    "report.html",
    "report_data.npz",
    "evaluation.json",
    "map_aligned.mrc",
    "map_mean.mrc",
    "map_std.mrc",
    "missing_views.mrc",
    "ss_snr.csv",
    "directions.csv",
    "posterior.json",
    "classes.mrcs",
    "classes.csv",
    "classes.png",
    "classes_frc.csv",
    "features.npy",
    "views.csv",
    "moments.png",
    "config.toml",
)
"""Everything this program writes into a run folder, and so all that --overwrite removes; last what says that it is one."""

FOLDERS = {
    "checkpoint": ("*.safetensors", "lock"),
    "encoder": ("*.safetensors", "history.jsonl"),
    "figures": tuple(
        f"{name}.png"
        for name in ("fsc", "slices", "orientations", "examples", "history", "noise", "overview", "posterior")
    ),
}
"""The same of folders in it: what is in them."""

_UNLOCKED = ("config.toml", "provenance.json", "evaluation.json", "map_aligned.mrc", "report.html")
"""Of these, what is written without the lock, perhaps at this moment."""


def config_of(folder: Path) -> RunConfig:
    """Settings of the run in ``folder``; RUN004 where they cannot be read."""
    try:
        return from_toml((folder / "config.toml").read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise RunError(
            "RUN004",
            f"{folder / 'config.toml'} is not the configuration of a cryorbit run ({error})",
            "choose a new --output folder, or pass --overwrite if it is a run of another version that may go",
        ) from error


def _must_be_ours(folder: Path) -> None:
    """A configuration of any version will do: settings come and go."""
    try:
        settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        settings = {}
    if not {"particles", "abinitio", "refine"} <= settings.keys():
        raise RunError(
            "RUN004",
            f"{folder / 'config.toml'} is not the configuration of a cryorbit run",
            "choose a new --output folder; if it is a run whose config.toml was damaged, remove that folder yourself",
        )


def _clear(folder: Path, read: Sequence[Path]) -> None:
    """Remove what a previous run wrote, and nothing else."""
    _must_be_ours(folder)
    if (folder / "checkpoint" / "lock").exists():
        with locked(folder):  # by nobody else
            pass
    ours = written(folder)
    removed = {path.resolve() for path in ours}
    for path in read:
        kept = path.resolve()
        if removed & {kept, *kept.parents}:
            raise RunError(
                "RUN006", f"{kept} is the input: --overwrite would delete it", "choose another --output folder"
            )
    for parent in (folder, *(folder / name for name in FOLDERS)):
        if parent.is_dir() and not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
            raise RunError("RUN003", f"{parent} cannot be read and written", "choose a writable --output folder")
    for path in ours:
        path.unlink(missing_ok=True)
    for name in FOLDERS:
        inner = folder / name
        if inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()


def written(folder: Path) -> list[Path]:
    """Files of a run that are there, the configuration last; a link to a folder counts as a file."""
    inside = []
    for name, patterns in FOLDERS.items():
        inner = folder / name
        if inner.is_symlink():
            inside.append(inner)
        elif inner.is_dir():
            inside += [path for pattern in patterns for path in sorted(inner.glob(pattern))]
    return inside + [path for name in OURS if (path := folder / name).is_symlink() or path.is_file()]


def differences(before: RunConfig, now: RunConfig) -> str:
    """What changed, at most three settings."""
    old, new = flat(asdict(before)), flat(asdict(now))
    changed = [f"{name} {old[name]!r} there, {new[name]!r} now" for name in new if old[name] != new[name]]
    return "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")


def open_run(folder: Path, config: RunConfig, read: Sequence[Path] = (), *, overwrite: bool) -> None:
    """Make ``folder`` ready for ``config``: fresh, or an interrupted run of the same config to be continued; ``read``: what it must not delete.

    Raises
    ------
    RunError
        The folder cannot be written, holds other files, or a run with other settings.
    """
    try:
        cleared = overwrite and (folder / "config.toml").is_file()
        if cleared:
            _clear(folder, read)
        folder.mkdir(parents=True, exist_ok=True)
        there = config_of(folder) if (folder / "config.toml").is_file() else None
        if there is not None:
            before, now = decisive(there), decisive(config)
            if before != now:
                raise RunError(
                    "RUN002",
                    f"{folder} holds a run with other settings ({differences(before, now)})",
                    "choose a new --output folder, pass --overwrite to delete that run, or give the settings in its config.toml",
                )
        elif not cleared and set(folder.iterdir()) - unfinished(folder).keys():
            raise RunError("RUN001", f"{folder} is not empty and holds no cryorbit run", "choose a new --output folder")
        if there != config:  # one that an older version wrote stays as that version can read it
            write_text(folder / "config.toml", to_toml(config))
        (folder / "checkpoint").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            "RUN003",
            f"{folder} cannot be written ({error.strerror or error})",
            "choose a writable --output folder with free space",
        ) from error


@contextmanager
def opened(folder: Path, config: RunConfig, inputs: Inputs, *, overwrite: bool) -> Iterator[str]:
    """The run folder ready, described and locked; yields what a checkpoint in it must have been made from: settings and files."""
    read = _read(config, inputs)
    open_run(folder, config, read, overwrite=overwrite)
    if not (folder / "provenance.json").exists():  # a continued run keeps how it began
        outputs.write_json(folder / "provenance.json", outputs.provenance(Path(config.particles), str(inputs.device)))
    with locked(folder):
        yield fingerprint_of(config, inputs)


def _read(config: RunConfig, inputs: Inputs) -> list[Path]:
    """The files that a run works on."""
    stacks = inputs.particles.images.stacks if inputs.particles.images else ()
    return [Path(config.particles), *(s.path for s in stacks), *([Path(config.mask)] if config.mask else [])]


def fingerprint_of(config: RunConfig, inputs: Inputs) -> str:
    """What a checkpoint of such a run was made from: settings and files."""
    return " ".join([to_toml(decisive(config)), *(outputs.checksum(path) for path in _read(config, inputs))])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the run folder; the lock goes with the process, however it ends.

    What a killed process left half written in it is removed.
    """
    with (folder / "checkpoint" / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                "RUN005", f"another process is writing {folder}", "wait for it, or choose another --output folder"
            ) from error
        left = [path for path, name in unfinished(folder).items() if name in OURS and name not in _UNLOCKED]
        for inner in (folder / "checkpoint", folder / "encoder"):  # figures are drawn without the lock
            left += unfinished(inner) if inner.is_dir() else []
        for path in left:
            path.unlink(missing_ok=True)
        yield
