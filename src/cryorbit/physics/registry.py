"""The orbit models by name. One added here inherits every check in ``tests/contracts``."""

from typing import Any

from cryorbit.orbit import OrbitModel
from cryorbit.physics.cryoem import CryoEM
from cryorbit.physics.mra import MRA
from cryorbit.physics.planar import Planar

ORBIT_MODELS: dict[str, type[OrbitModel[Any]]] = {"mra": MRA, "planar": Planar, "cryoem": CryoEM}
