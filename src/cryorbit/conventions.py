"""Every sign, axis, centre and unit, and the converters to and from RELION and cryoSPARC. Nothing else decides these.

The rules (each has a test in ``tests/test_conventions.py``; prose in ``docs/conventions.md``):

* Arrays are ``zyx`` (maps) and ``yx`` (images); the centre of a side of length D is index ``D // 2``, odd and even alike.
* Rotations act on ``xyz`` columns, ``(R.v)(x) = v(R^T x)``; an atom at r lands at image ``(R r)[:2]`` and a projection's transform
  is ``v^(R^T (kx, ky, 0))``. R is RELION's matrix A of (rot, tilt, psi): the transpose of
  ``scipy.spatial.transform.Rotation.from_euler("ZYZ", [rot, tilt, psi]).as_matrix()``.
* ``image(x) = P(x - shift)``: shifts move the particle. RELION stores the way back: ``rlnOriginXAngst = -shift_x``.
* Protein is bright (positive) in particles.
* ``CTF = -sin(gamma)`` as RELION has it, so ``CTF(0) = +Q0``.
* Units inside: angstrom, radian, kV, mm. Degrees only in files and on the command line.

This module is numpy only, so that file readers need not load torch.
"""

import numpy as np
from numpy.typing import NDArray

from cryorbit.errors import ConfigError

Array = NDArray[np.float64]

MAX_SNR_DB = 100.0
"""Largest SNR, and least with a minus sign, in dB."""

PARTICLE_COLUMNS = {
    "log_likelihood": "rlnLogLikeliContribution",
    "effective_poses": "rlnNrOfSignificantSamples",
    "top_mass": "rlnMaxValueProbDistribution",
    "rotation_sd": "cryorbitRotationSpread",
    "shift_sd": "cryorbitShiftSpreadAngst",
    "entropy": "cryorbitPoseEntropy",
    "scale": "cryorbitScale",
    "scale_error": "cryorbitScaleError",
    "defocus_u": "rlnDefocusU",
    "defocus_v": "rlnDefocusV",
    "defocus_sd": "cryorbitDefocusErrorAngst",
    "confidence": "cryorbitConfidence",
    "searched": "cryorbitSearched",
    "class_number": "rlnClassNumber",
    "junk": "cryorbitJunkScore",
}
"""Columns for what we say of each particle beside its pose: log-likelihood at the pose; effective poses after ab initio; share of the
posterior in its heaviest mode; root mean square angle (degrees) and distance (angstrom) from it that the posterior expects; entropy
(nats, radian^3 angstrom^2); strength relative to the map and its standard deviation; where it was refined, defocus and its standard
deviation (angstrom); of particles assigned to a known structure, the chance that the pose is right, and whether it was searched for; 2-D
class from 1 on, and nats by which the image is likelier to be something else than a particle. RELION keeps those it does not know."""


def centre(side: int) -> int:
    """Index of the centre of an axis of ``side`` samples."""
    return side // 2


def euler_to_matrix(angles_deg: Array) -> Array:
    """RELION's matrix A = Rz(psi) Ry(tilt) Rz(rot) (passive form) from angles in degrees.

    Parameters
    ----------
    angles_deg
        (..., 3) array of rot, tilt, psi in degrees (``rlnAngleRot``, ``rlnAngleTilt``, ``rlnAnglePsi``).

    Returns
    -------
    (..., 3, 3) rotation matrices; an atom at r lands at image ``(A r)[:2]``.
    """
    alpha, beta, gamma = np.moveaxis(np.deg2rad(np.asarray(angles_deg, dtype=np.float64)), -1, 0)
    ca, sa, cb, sb, cg, sg = np.cos(alpha), np.sin(alpha), np.cos(beta), np.sin(beta), np.cos(gamma), np.sin(gamma)
    rows = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(rotations: Array) -> Array:
    """RELION's (rot, tilt, psi) in degrees, tilt in [0, 180], rot and psi in (-180, 180]; psi carries everything where tilt is 0 or 180.

    Parameters
    ----------
    rotations
        (..., 3, 3) rotation matrices A.

    Returns
    -------
    (..., 3) angles in degrees.
    """
    a = np.asarray(rotations, dtype=np.float64)
    sin_beta = np.hypot(a[..., 2, 0], a[..., 2, 1])
    beta = np.arctan2(sin_beta, a[..., 2, 2])
    regular = sin_beta > 1e-7
    alpha = np.where(regular, np.arctan2(a[..., 2, 1], a[..., 2, 0]), 0.0)
    gamma = np.where(
        regular,
        np.arctan2(a[..., 1, 2], -a[..., 0, 2]),
        np.arctan2(-np.sign(a[..., 2, 2]) * a[..., 1, 0], a[..., 1, 1]),
    )
    return np.rad2deg(np.stack([alpha, beta, gamma], axis=-1))


def shift_from_relion(origin_angst: Array) -> Array:
    """Particle shift (x, y) in angstrom from ``rlnOriginXAngst``, ``rlnOriginYAngst`` (RELION stores the way back)."""
    return -np.asarray(origin_angst, dtype=np.float64)


def shift_to_relion(shift: Array) -> Array:
    """``rlnOriginXAngst``, ``rlnOriginYAngst`` from the particle shift (x, y) in angstrom."""
    return 0.0 - np.asarray(shift, dtype=np.float64)


def rotvec_to_matrix(rotvec: Array) -> Array:
    """Rodrigues' formula: (..., 3) rotation vectors in radian to (..., 3, 3) matrices."""
    v = np.asarray(rotvec, dtype=np.float64)
    angle = np.linalg.norm(v, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(v, -1, 0)
    zero = np.zeros_like(x)
    k = np.stack([np.stack([zero, -z, y], -1), np.stack([z, zero, -x], -1), np.stack([-y, x, zero], -1)], -2)
    safe = np.where(angle > 1e-12, angle, 1.0)
    a = np.where(angle > 1e-12, np.sin(safe) / safe, 1.0)
    b = np.where(angle > 1e-12, (1 - np.cos(safe)) / safe**2, 0.5)
    return np.eye(3) + a * k + b * (k @ k)


def rotation_from_cryosparc(rotvec: Array) -> Array:
    """RELION's A from cryoSPARC's ``alignments3D/pose`` rotation vector: the transpose of the vector's rotation matrix.

    pyem's ``expmap`` and cryoDRGN's ``parse_pose_csparc`` both transpose; checked against a ``.cs`` file and the ``poses.pkl``
    cryoDRGN made of it (2,019 poses, largest difference 4e-7).
    """
    return np.swapaxes(rotvec_to_matrix(rotvec), -1, -2)


def shift_from_cryosparc(shift_px: Array, pixel_size: float | Array) -> Array:
    """Particle shift in angstrom from cryoSPARC's ``alignments3D/shift`` (pixels, same sign as RELION's origin)."""
    return -np.asarray(shift_px, dtype=np.float64) * np.asarray(pixel_size, dtype=np.float64)


def rotation_from_cryodrgn(rotation: Array) -> Array:
    """RELION's A from a matrix of cryoDRGN's ``poses.pkl``: the same matrix.

    Checked on three counts: the ``toy_projections`` images (correlation 1.000), tomoDRGN's 1,296 poses and their STAR files (3e-7),
    and cryoDRGN's ``pose.star.pkl`` with its STAR file (6e-17).
    """
    return np.asarray(rotation, dtype=np.float64)


def shift_from_cryodrgn(shift_fraction: Array, box: int, pixel_size: float) -> Array:
    """Particle shift in angstrom from cryoDRGN's translation, a fraction of the box with RELION's sign."""
    return -np.asarray(shift_fraction, dtype=np.float64) * box * pixel_size


def snr_from_db(db: float) -> float:
    """Signal variance over noise variance from decibels: ``10 ** (db / 10)``.

    Raises
    ------
    ConfigError
        ``CONF331``: not a number from -100 to 100 dB; beyond that signal or noise is lost in float32.
    """
    if not -MAX_SNR_DB <= db <= MAX_SNR_DB:
        raise ConfigError(
            "CONF331",
            f"the SNR must be from -{MAX_SNR_DB:g} to {MAX_SNR_DB:g} dB, found {db:g}",
            "for images without noise: --noise none (snr_db=None in Python)",
        )
    return float(10.0 ** (db / 10.0))
