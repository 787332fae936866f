"""From an image to candidate poses: a convolutional network whose outputs are turned into rotations (papers/001 section 3), shifts, and how
sure each of several heads is of its own."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from cryorbit.errors import ConfigError
from cryorbit.groups import so3
from cryorbit.networks.cnn import ConvEncoder
from cryorbit.networks.polar import TURNS, RingEncoder
from cryorbit.physics.fourier import FourierDisk, disk_subset, disk_to_images, fourier_disk

PARAMETRISATIONS = {"euler": 3, "quaternion": 3, "s2s2": 6}
"""Numbers that each takes per rotation."""
_TINY = 1e-4  # length below which a vector has no direction
_SEEN = 1.25  # particle diameters that the encoder sees
_CONCENTRATION = (0.1, 2e4)  # 1 / radian^2: from no knowledge to 0.4 degrees
_START = math.log(4.0)


def euler_rotations(x: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """RELION's matrix A of (rot, tilt, psi) in radian; smooth, though tilt 0 and pi have more than one set of angles."""
    rot, tilt, psi = x.unbind(dim=-1)
    zero, one = torch.zeros_like(rot), torch.ones_like(rot)

    def about_z(angle: Tensor) -> Tensor:
        c, s = angle.cos(), angle.sin()
        return torch.stack([c, s, zero, -s, c, zero, zero, zero, one], dim=-1).unflatten(-1, (3, 3))

    c, s = tilt.cos(), tilt.sin()
    about_y = torch.stack([c, zero, -s, zero, one, zero, s, zero, c], dim=-1).unflatten(-1, (3, 3))
    return about_z(psi) @ about_y @ about_z(rot)


def quaternion_rotations(x: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Rotations of the unit quaternions ``(1 - |x|^2, 2 x) / (1 + |x|^2)``.

    papers/001 names "a fixed transformation" from three numbers and not which; this one, stereographic, is smooth everywhere and leaves out
    one quaternion alone, whose rotation (none) it reaches at zero.
    """
    square = x.square().sum(dim=-1, keepdim=True)
    w, i, j, k = torch.cat([1 - square, 2 * x], dim=-1).div(1 + square).unbind(dim=-1)
    rows = [
        1 - 2 * (j * j + k * k),
        2 * (i * j - k * w),
        2 * (i * k + j * w),
        2 * (i * j + k * w),
        1 - 2 * (i * i + k * k),
        2 * (j * k - i * w),
        2 * (i * k - j * w),
        2 * (j * k + i * w),
        1 - 2 * (i * i + j * j),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def s2s2_rotations(x: Float[Tensor, "*b 6"]) -> Float[Tensor, "*b 3 3"]:
    """Rotations whose first two rows, the image's axes in the molecule's frame, are two vectors made orthonormal (Gram-Schmidt).

    Where a vector is shorter than 1e-4, or lies along the other, a fixed direction stands in for it and no gradient passes.
    """
    first, second = x.unflatten(-1, (2, 3)).unbind(dim=-2)
    one = _unit(first, torch.eye(3).to(x)[0].expand_as(first))
    along = (one * second).sum(dim=-1, keepdim=True)
    least = nn.functional.one_hot(one.detach().abs().argmin(dim=-1), 3).to(x)
    two = _unit(second - along * one, torch.linalg.cross(one.detach(), least))
    two = _unit(two - (one * two).sum(dim=-1, keepdim=True) * one, two)  # what rounding left
    return torch.stack([one, two, torch.linalg.cross(one, two)], dim=-2)


def _unit(vector: Float[Tensor, "*b 3"], otherwise: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
    has = vector.detach().norm(dim=-1, keepdim=True) > _TINY
    vector = torch.where(has, vector, otherwise)
    return vector / vector.norm(dim=-1, keepdim=True)


_ROTATIONS = {"euler": euler_rotations, "quaternion": quaternion_rotations, "s2s2": s2s2_rotations}


def rotations_of(name: str, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b 3 3"]:
    """Rotations of the parametrisation ``name`` (one of :data:`PARAMETRISATIONS`); gradients are finite for every finite ``x``.

    Raises
    ------
    ConfigError
        CONF501 no such parametrisation.
    """
    if name not in _ROTATIONS:
        raise ConfigError("CONF501", f"unknown parametrisation {name}", f"known: {', '.join(PARAMETRISATIONS)}")
    return _ROTATIONS[name](x)


@dataclass(frozen=True)
class View:
    """What an encoder sees of an image: Fourier pixels up to its own Nyquist, the middle ``side`` of ``box`` pixels.

    Attributes
    ----------
    disk
        The Fourier pixels it is given, in the box of the images.
    box
        Pixels to which the whole image is Fourier cropped.
    side
        Pixels of these around the centre that are shown.
    """

    disk: FourierDisk
    box: int
    side: int

    @staticmethod
    def around(disk: FourierDisk, side: int, diameter_px: float) -> "View":
        """``side`` pixels across 1.25 particle diameters of images with the Fourier pixels ``disk``; none finer than the images'.

        ``diameter_px`` counts pixels of the disk's box.
        """
        side = min(side, disk.box)
        box = min(max(round(side * disk.box / min(_SEEN * diameter_px, disk.box)), side), disk.box)
        return View(fourier_disk(disk.box, min(0.5 * box - 0.5, disk.radius)), box, side)

    def columns(self, disk: FourierDisk) -> Int[Tensor, " q"]:
        """Where in ``disk`` (same box, at least as wide) the pixels are that the encoder is given."""
        return disk_subset(disk, self.disk.to(disk.kx.device))

    def __call__(self, values: Complex[Tensor, "b p"]) -> Float[Tensor, "b s s"]:
        """Images of variance about 1 (for transforms of power 1) from their Fourier pixels."""
        d = self.disk
        cropped = FourierDisk(self.box, d.radius, d.kx, d.ky, d.weight).to(values.device)
        images = disk_to_images(values, cropped) * self.box
        begin = self.box // 2 - self.side // 2
        return images[:, begin : begin + self.side, begin : begin + self.side]


@dataclass(frozen=True)
class EncodedPoses:
    """H candidate poses of each image.

    Attributes
    ----------
    rotations, shifts
        (B, H, 3, 3), and (B, H, 2) in pixels of the images' box.
    log_weight
        (B, H) log probability that the pose is near this candidate; sums to one over the candidates.
    concentration
        (B, H) 1 / radian^2: one over the variance of the rotation about each axis.
    """

    rotations: Float[Tensor, "b h 3 3"]
    shifts: Float[Tensor, "b h 2"]
    log_weight: Float[Tensor, "b h"]
    concentration: Float[Tensor, "b h"]

    @staticmethod
    def certain(rotations: Float[Tensor, "b 3 3"], shifts: Float[Tensor, "b 2"]) -> "EncodedPoses":
        """One candidate per image, beyond doubt."""
        none = shifts.new_zeros(len(shifts), 1)
        return EncodedPoses(rotations[:, None], shifts[:, None], none, none + math.inf)

    def best(self) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
        """Rotation and shift of each image's likeliest candidate."""
        row, head = torch.arange(len(self.log_weight), device=self.log_weight.device), self.log_weight.argmax(dim=1)
        return self.rotations[row, head], self.shifts[row, head]


class PoseEncoder(nn.Module):
    """Image to candidate poses.

    Parameters
    ----------
    view
        What it sees of an image.
    parametrisation
        One of :data:`PARAMETRISATIONS`.
    heads
        Candidates per image, with ``polar`` from each direction.
    fit_shift
        Whether it says where the particle is; shifts are zero otherwise.
    polar
        Look at the image from 8 directions of its plane: there are as many candidates for each of ``heads``, and they turn with the image.
    normalised, he, bfloat16, seed
        As for :class:`~cryorbit.networks.cnn.ConvEncoder`.

    Raises
    ------
    ConfigError
        CONF501 no such parametrisation.
    """

    turns: Tensor

    def __init__(
        self,
        view: View,
        *,
        parametrisation: str = "s2s2",
        heads: int = 1,
        fit_shift: bool = True,
        polar: bool = False,
        normalised: bool = True,
        he: bool = True,
        bfloat16: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rotations_of(parametrisation, torch.zeros(1, PARAMETRISATIONS.get(parametrisation, 1)))
        self.view, self.parametrisation, self.heads, self.fit_shift = view, parametrisation, heads, fit_shift
        self.numbers = PARAMETRISATIONS[parametrisation]
        each = self.numbers + 4  # shift, weight, concentration
        network = RingEncoder if polar else ConvEncoder
        self.network = network(view.side, heads * each, normalised=normalised, he=he, bfloat16=bfloat16, seed=seed)
        angle = torch.arange(TURNS if polar else 1) * (2 * math.pi / TURNS)
        self.register_buffer("turns", so3.exp(angle[:, None] * torch.eye(3)[2]), persistent=False)

    def forward(self, values: Complex[Tensor, "b p"]) -> EncodedPoses:
        """Candidates from Fourier pixels on the view's disk, of power about 1."""
        out = self.network(self.view(values)).view(len(values), len(self.turns), self.heads, -1)
        parts = out.split([self.numbers, 2, 1, 1], dim=3)
        low, high = (math.log(x) for x in _CONCENTRATION)
        rotations = self.turns[:, None] @ rotations_of(self.parametrisation, parts[0])
        shifts = (self.turns[:, None, :2, :2] @ parts[1][..., None])[..., 0] * (self.view.disk.box / self.view.box)
        weight, concentration = (part.flatten(1) for part in parts[2:])
        return EncodedPoses(
            rotations.flatten(1, 2),
            (shifts if self.fit_shift else torch.zeros_like(shifts)).flatten(1, 2),
            weight.log_softmax(dim=1),
            (concentration + _START).clamp(low, high).exp(),
        )
