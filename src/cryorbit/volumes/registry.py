"""The volumes by name. A class added here inherits every check in ``tests/contracts``."""

from cryorbit.volumes.gaussian import GaussianVolume
from cryorbit.volumes.neural import NeuralVolume
from cryorbit.volumes.voxel import VoxelVolume

VOLUMES = {"voxel": VoxelVolume, "neural": NeuralVolume, "gaussian": GaussianVolume}
