"""What particles are made from, by name: a shipped model, ``phantom``, a PDB or mmCIF file, or an MRC map."""

import torch

from cryorbit.errors import ConfigError
from cryorbit.io.mrc import read_volume
from cryorbit.simulate.atoms import DEFAULT_BFACTOR, MAX_BFACTOR, AtomicModel, model_path, read_model
from cryorbit.simulate.phantom import phantom
from cryorbit.types import Volume

MAP_SUFFIXES = (".mrc", ".map", ".ccp4")


def open_source(
    name: str, *, bfactor: float | None = DEFAULT_BFACTOR, chains: str | None = None
) -> AtomicModel | Volume:
    """The object called ``name``.

    Parameters
    ----------
    name
        ``phantom``, a shipped model such as ``4ake``, or a file: PDB or mmCIF (gzipped or not), or a map (.mrc, .map,
        .ccp4).
    bfactor, chains
        For coordinate files: see :func:`cryorbit.simulate.atoms.read_model`.

    Raises
    ------
    ConfigError
        CONF338 a B-factor that cannot be used.
    FileError, DataError
        The file is missing or cannot be used.
    """
    if bfactor is not None and not 0 <= bfactor <= MAX_BFACTOR:
        raise ConfigError(
            "CONF338",
            f"the B-factor must be from 0 to {MAX_BFACTOR:g} A^2, found {bfactor:g}",
            "change --bfactor; a negative one takes the file's own",
        )
    if name.lower() == "phantom":
        return phantom()
    path = model_path(name)
    if path.name.lower().removesuffix(".gz").endswith(MAP_SUFFIXES):
        data, pixel_size = read_volume(path)
        return Volume(torch.from_numpy(data), pixel_size)
    return read_model(path, bfactor=bfactor, chains=chains)
