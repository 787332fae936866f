"""Exact Fourier slices of a voxel map by non-uniform FFT (``pytorch-finufft``, extra ``nufft``), the oracle."""

import importlib
import math
from types import ModuleType

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.physics.fourier import FourierDisk


def _finufft() -> ModuleType:
    try:
        return importlib.import_module("pytorch_finufft.functional")
    except ImportError as error:
        raise ConfigError(
            "CONF110",
            f"the NUFFT projector needs pytorch-finufft, which does not import ({error})",
            "pip install 'cryorbit[nufft]'",
        ) from error


def slice_nufft(
    volume: Float[Tensor, "d d d"], rotations: Float[Tensor, "b 3 3"], disk: FourierDisk, tolerance: float = 1e-5
) -> Complex[Tensor, "b p"]:
    """``sum_x v(x) exp(-2 pi i q.x / D)`` at ``q = R^T (kx, ky, 0)``: the transform of the voxels themselves, no
    interpolation.

    Parameters
    ----------
    volume
        (D, D, D) real map, centre at ``D // 2``, D even or odd.
    rotations
        (B, 3, 3) rotation matrices.
    disk
        Fourier pixels to evaluate.
    tolerance
        Relative error asked of the NUFFT.

    Returns
    -------
    (B, P), once differentiable in ``volume`` and ``rotations``.

    Raises
    ------
    ConfigError
        pytorch-finufft is not installed.
    """
    kind = volume.dtype
    k = (disk.k.to(dtype=kind, device=volume.device) * (2 * math.pi / disk.box)) @ rotations[:, :2].to(
        kind
    )  # (B, P, 3): xyz
    points = k.flip(-1).reshape(-1, 3).mT.contiguous()
    modes = torch.complex(volume, torch.zeros_like(volume))
    values: Tensor = _finufft().finufft_type2(points, modes, eps=tolerance, modeord=0, isign=-1)
    return values.reshape(len(rotations), len(disk))
