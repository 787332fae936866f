"""Slice and insert kernels, one module per backend: chosen by the device of the data beforehand, never by a failure."""

import torch

from cryorbit.errors import ConfigError
from cryorbit.physics.kernels import cpu, reference
from cryorbit.physics.kernels.interface import Kernels

_BACKENDS: dict[str, Kernels] = {"reference": reference, "cpu": cpu}
_BY_DEVICE = {"cpu": "cpu"}


def backend_names(device: str = "cpu") -> list[str]:
    """Backends that run on a type of device."""
    return [name for name in _BACKENDS if name == "reference" or _BY_DEVICE.get(device) == name]


def select(device: torch.device, backend: str | None = None) -> Kernels:
    """The kernels for data on ``device``, or those named ``backend``."""
    name = backend or _BY_DEVICE.get(device.type, "reference")
    if name not in backend_names(device.type):
        raise ConfigError(
            "CONF101",
            f'kernel backend "{name}" does not run on {device.type}; expected one of {backend_names(device.type)}',
        )
    return _BACKENDS[name]
