"""Atomic models as sums of Gaussians: positions, electron scattering factors, and a Debye-Waller factor for each atom.

The electron scattering factor of an element is ``f(s) = sum_i a_i exp(-b_i s^2 / 4)``, s in 1 / angstrom, with the
five Gaussians of the International Tables for Crystallography C (2004), table 4.3.2.2, as gemmi ships them.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import gemmi
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError, DataError, FileError

DEFAULT_BFACTOR, MAX_BFACTOR = 30.0, 1000.0
SHIPPED = {"4ake": "4ake_A.cif.gz"}


@dataclass(frozen=True)
class AtomicModel:
    """Atoms as sums of isotropic Gaussians.

    Attributes
    ----------
    positions
        (A, 3) xyz in angstrom from the centre of mass.
    amplitudes, widths
        (A, G) ``a_i`` (angstrom, times occupancy) and ``b_i`` (angstrom^2) of the scattering factor ``sum_i a_i
        exp(-b_i s^2 / 4)``, with the atom's B-factor already added to the widths.
    name
        What the model is called in files and messages.
    """

    positions: Float[Tensor, "a 3"]
    amplitudes: Float[Tensor, "a g"]
    widths: Float[Tensor, "a g"]
    name: str = "model"

    def __post_init__(self) -> None:
        if not len(self.positions):
            raise DataError(
                "DATA331", f"{self.name} has no atoms", "check that the file holds coordinates other than water"
            )
        for field in ("positions", "amplitudes", "widths"):
            if not bool(torch.isfinite(getattr(self, field)).all()):
                raise DataError("DATA332", f"{self.name}: {field} holds a value that is not finite")
        if bool((self.widths < 0).any()):
            raise DataError(
                "DATA333", f"{self.name}: a Gaussian has a negative width", "use a B-factor of zero or more"
            )

    def __len__(self) -> int:
        return self.positions.shape[0]

    @property
    def radius(self) -> float:
        """Distance in angstrom of the farthest atom from the centre of mass."""
        return float(self.positions.norm(dim=-1).max())

    def form_factors(self, s2: Float[Tensor, " k"]) -> Float[Tensor, "a k"]:
        """Scattering factor of every atom at squared spatial frequencies ``s2`` in 1 / angstrom^2."""
        result = torch.zeros(len(self), len(s2), dtype=torch.float64)
        for a, b in zip(self.amplitudes.T, self.widths.T, strict=True):
            result += a[:, None] * torch.exp(-0.25 * b[:, None] * s2[None])
        return result


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(SHIPPED)


def model_path(name: str | Path) -> Path:
    """The file of a model: a shipped name such as ``4ake``, or a path.

    Raises
    ------
    FileError
        FILE301 when there is no such model or file.
    """
    if str(name).lower() in SHIPPED:
        return Path(str(files("cryorbit.simulate") / "data" / SHIPPED[str(name).lower()]))
    path = Path(name)
    if not path.is_file():
        raise FileError(
            "FILE301",
            f"no model called {name}; expected a PDB, mmCIF or MRC file, phantom, or {', '.join(shipped_models())}",
            "check the path",
        )
    return path


def read_model(path: str | Path, *, bfactor: float | None = DEFAULT_BFACTOR, chains: str | None = None) -> AtomicModel:
    """Read a PDB or mmCIF file (gzipped or not), or a shipped model by name, and centre it at its centre of mass.

    The first model of the file is used. Waters are dropped; polymers, ligands and ions are kept, and so are hydrogens
    where the file has them (none are added). Of alternative locations the first is kept. Occupancies multiply the
    scattering factors.

    Parameters
    ----------
    path
        File, or the name of a shipped model.
    bfactor
        One B-factor in angstrom^2 for all atoms, or None for those of the file.
    chains
        Comma-separated names of the chains to keep; all by default.

    Raises
    ------
    FileError
        FILE301 no such file; FILE302 it cannot be read as coordinates.
    DataError
        DATA331 to DATA334: no atoms, values that are not finite, or an element without scattering factor.
    """
    source = model_path(path)
    try:
        structure = gemmi.read_structure(str(source))
    except (RuntimeError, ValueError, OSError) as error:
        raise FileError(
            "FILE302", f"{source.name} cannot be read as PDB or mmCIF: {error}", "is it a coordinate file?"
        ) from error
    if not len(structure):
        raise FileError("FILE302", f"{source.name} holds no atomic model", "is it a coordinate file?")
    structure.setup_entities()
    structure.remove_waters()
    structure.remove_alternative_conformations()
    keep = None if chains is None else {name.strip() for name in chains.split(",")}
    found = [chain.name for chain in structure[0]]
    if keep is not None and not keep <= set(found):
        raise ConfigError(
            "CONF339", f"{source.name} has no chain {', '.join(sorted(keep - set(found)))}; it has {', '.join(found)}"
        )
    atoms = [a for chain in structure[0] if keep is None or chain.name in keep for residue in chain for a in residue]
    if not atoms:
        raise DataError(
            "DATA331", f"{source.name} has no atoms", "check that the file holds coordinates other than water"
        )
    return _from_atoms(atoms, bfactor, source.name.split(".")[0])


def _from_atoms(atoms: list[gemmi.Atom], bfactor: float | None, name: str) -> AtomicModel:
    table = {}
    for element in {a.element.name: a.element for a in atoms}.values():
        coefficients = element.c4322
        if coefficients is None:
            raise DataError(
                "DATA334",
                f"{name}: element {element.name} has no electron scattering factor",
                "remove or rename the atom",
            )
        table[element.name] = (np.array(coefficients.a), np.array(coefficients.b))
    positions = np.array([a.pos.tolist() for a in atoms])
    mass = np.array([a.element.weight for a in atoms])
    positions -= (mass[:, None] * positions).sum(0) / mass.sum()
    occupancy = np.array([a.occ for a in atoms])
    b = np.array([a.b_iso for a in atoms]) if bfactor is None else np.full(len(atoms), bfactor)
    return AtomicModel(
        torch.from_numpy(positions),
        torch.from_numpy(np.array([table[a.element.name][0] for a in atoms]) * occupancy[:, None]),
        torch.from_numpy(np.array([table[a.element.name][1] for a in atoms]) + b[:, None]),
        name,
    )
