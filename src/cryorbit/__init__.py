"""cryorbit: a particle stack in; a map, every particle's pose, and how sure we are of both out."""

from importlib.metadata import version

__version__ = version("cryorbit")
