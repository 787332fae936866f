"""The groups by name. One added here inherits every check in ``tests/contracts``."""

from cryorbit.groups.cyclic import Cyclic
from cryorbit.groups.so2 import SO2
from cryorbit.groups.so3 import SO3
from cryorbit.orbit import Group

GROUPS: dict[str, Group] = {"cyclic": Cyclic(12), "cyclic-odd": Cyclic(7), "so2": SO2(), "so3": SO3()}
