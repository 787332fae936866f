"""cryorbit: a particle stack in; a map, every particle's pose, and how sure we are of both out."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

__version__ = version("cryorbit")


def _writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or it can be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(there, os.W_OK)


def _keep_compiled_code() -> None:
    """Where neither the package nor the user's cache can be written, as in many containers, numba refuses to import what it would keep there:
    give it a folder for the time of this process.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    if "NUMBA_CACHE_DIR" in os.environ or _writable(Path(__file__).parent) or _writable(cache):
        return
    folder = tempfile.mkdtemp(prefix="cryorbit-")
    os.environ["NUMBA_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


_keep_compiled_code()
