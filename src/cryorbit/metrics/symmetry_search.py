"""A map's correlation with itself turned about any axis through any point, and point groups laid on it. Call it through
``metrics/symmetry.py``.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.conventions import centre
from cryorbit.errors import DataError
from cryorbit.groups.point import asymmetric_unit, point_group
from cryorbit.groups.so3 import exp, healpix_directions, healpix_grid, log
from cryorbit.metrics.climb import Slope, climb, correlated
from cryorbit.metrics.fsc import shell_power
from cryorbit.metrics.masks import lowpass, otsu, soft_sphere
from cryorbit.metrics.resample import Spectrum, spectrum

MAX_FOLD = 12
WEAK = 0.3  # expected correlation at which the shells end
FIRST_SHELL = 2  # the lower ones hold the overall shape, and the centre
_HIGHEST = 0.97  # correlation beyond which a shell is worth no more


@lru_cache(maxsize=64)
def group_elements(name: str) -> Float[Tensor, "e 3 3"]:
    """Rotations of the group but the identity, one of each pair of inverses."""
    members = point_group(name)[1:].to(torch.float32)
    kept: list[Tensor] = []
    for member in members:
        if not any(float((member.T - other).abs().max()) < 1e-4 for other in kept):
            kept.append(member)
    return torch.stack(kept)


@lru_cache(maxsize=1)
def _turns() -> list[tuple[int, int]]:
    """(numerator, fold) of the distinct turns up to a half."""
    return [(j, n) for n in range(2, MAX_FOLD + 1) for j in range(1, n // 2 + 1) if math.gcd(j, n) == 1]


@lru_cache(maxsize=1)
def _axes(order: int = 3) -> Float[Tensor, "a 3"]:
    """HEALPix directions of one hemisphere."""
    rot, tilt = (np.deg2rad(angle) for angle in healpix_directions(order))
    xyz = torch.from_numpy(np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], -1))
    x, y, z = xyz.round(decimals=9).unbind(-1)
    first = (z > 0) | ((z == 0) & ((y > 0) | ((y == 0) & (x > 0))))
    return xyz[first].to(torch.float32)


@dataclass(frozen=True)
class Ball:
    """The centred map's transform at half the voxels of a ball of Fourier space, and the map to read turned."""

    k: Float[Tensor, "p 3"]
    shell: Int[Tensor, " p"]
    map: Spectrum
    expected: Float[Tensor, " s"]
    filled: float

    def ramp(self, k: Float[Tensor, "*p 3"], shift_px: Float[Tensor, "3"]) -> Tensor:
        """Phases that move the map by ``shift_px``."""
        angle = (-2 * torch.pi / self.map.box) * (k @ shift_px)
        return torch.polar(torch.ones_like(angle), angle)

    def turned(self, rotations: Float[Tensor, "g 3 3"], middle: Float[Tensor, "3"]) -> tuple[Tensor, Tensor]:
        """Transforms (p) of the map and (g, p) of the map turned about ``middle`` (pixels)."""
        k = torch.einsum("gji,pj->gpi", rotations, self.k)
        return self.map.at(self.k) * self.ramp(self.k, -middle), self.map.at(k) * self.ramp(k, -middle)

    def per_shell(self, values: Float[Tensor, "*g p"]) -> Float[Tensor, "*g s"]:
        """Sums over shells."""
        zero = values.new_zeros(*values.shape[:-1], len(self.expected))
        return zero.index_add(-1, self.shell, values)

    def agreement(self, rotations: Float[Tensor, "g 3 3"], middle: Float[Tensor, "3"]) -> Float[Tensor, "g s"]:
        """FSC of the map with itself turned about ``middle``."""
        parts = []
        for some in rotations.split(128):
            here, there = self.turned(some, middle)
            power = self.per_shell(here.abs().square()) * self.per_shell(there.abs().square())
            parts.append(self.per_shell((here.conj() * there).real) / power.sqrt().clamp(min=1e-30))
        return torch.cat(parts)

    @property
    def count(self) -> Float[Tensor, " s"]:
        """Voxels in each shell."""
        return self.per_shell(torch.ones(len(self.k)))

    @property
    def weight(self) -> Float[Tensor, " p"]:
        """Of each voxel, so that shells add up by their size and expected correlation; 1 in all."""
        power = self.per_shell(self.map.at(self.k).abs().square()) / self.count.clamp(min=1)
        share = self.expected / power.clamp(min=1e-30) / (self.count * self.expected).sum()
        return share[self.shell]

    def nats(self, agreement: Float[Tensor, "*g s"]) -> Float[Tensor, "*g"]:
        """Mutual information of the map with itself turned: as many voxels are independent as the molecule fills the
        box, and each pair of voxels was counted twice.
        """
        c = agreement.clamp(min=0.0, max=_HIGHEST)
        return -0.5 * self.filled * (torch.log1p(-c.square()) @ self.count)

    def information(self, agreement: Float[Tensor, "*g s"]) -> Float[Tensor, "*g"]:
        """What the map shares with itself turned, relative to what it would share with another copy of itself."""
        return self.nats(agreement) / self.nats(self.expected)


@dataclass(frozen=True)
class Particle:
    """The molecule cut out of its map: ``data`` in a smaller box, where its centre was (x, y, z, pixels from the centre
    index), its radius in pixels, the correlation expected in each shell with another such map of it, and the share of
    the small box it fills.
    """

    data: Float[Tensor, "e e e"]
    middle: Float[Tensor, "3"]
    radius: float
    expected: Float[Tensor, " s"]
    filled: float


def cut_out(volume: Float[Tensor, "d d d"], diameter_px: float | None, fsc: Tensor | None) -> Particle:
    """Centre the molecule by its centre of mass, to a pixel; cut it out by a soft sphere; measure the noise."""
    box = volume.shape[-1]
    inside = soft_sphere(box, box / 2 - 1, 0.0) > 0.5
    smooth = lowpass(volume, max(box / 12, 3.0))
    smooth = smooth - smooth[inside].median()
    solid = torch.where(inside & (smooth > max(0.5 * otsu(smooth[inside].numpy()), 0.0)), smooth, 0.0)
    if not bool((solid > 0).any()):
        raise DataError("DATA214", "the map has no positive density to look for a symmetry in", "is it inverted?")
    axis = torch.arange(box, dtype=torch.float32) - centre(box)
    middle = torch.stack([(solid.sum(other) * axis).sum() for other in ((0, 1), (0, 2), (1, 2))]) / solid.sum()
    step = middle.round().to(torch.int64)
    rolled, solid = (torch.roll(v, (-step).flip(0).tolist(), dims=(0, 1, 2)) for v in (volume, solid))
    distance = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    radius = float(distance[solid > 0].quantile(0.99)) + 2.0 if diameter_px is None else diameter_px / 2
    radius = min(max(radius, 4.0), box / 2 - 2.0)
    small = min(box, 2 * math.ceil(1.2 * radius) + 2)
    low = centre(box) - centre(small)
    kept = slice(low, low + small)
    sphere = soft_sphere(box, radius)
    rolled = rolled - rolled[sphere == 0].mean()
    data = (rolled * sphere)[kept, kept, kept].clone()
    filled = float(sphere.square().sum()) / small**3
    power, shells = shell_power(data), np.arange(small // 2 + 1) * (box / small)
    if fsc is None:
        outside = 1.0 - sphere
        noise = shell_power(rolled * outside) / outside.square().mean() / box**3 * small**3
        noise = torch.from_numpy(np.interp(shells, np.arange(len(noise)), noise.numpy())) * filled
        expected = 1.0 - noise / power.clamp(min=1e-30)
    else:
        half = fsc.detach().to("cpu", torch.float64).clamp(min=0.0, max=0.999)
        ratio = np.interp(shells, np.arange(len(half)), (2 * half / (1 - half)).numpy())  # of signal to noise
        expected = torch.from_numpy(ratio / (ratio + filled * (small / box) ** 3))
    return Particle(data, step.to(torch.float32), radius, expected.clamp(min=WEAK, max=1.0).to(torch.float32), filled)


def ball_of(particle: Particle, radius: int) -> Ball:
    """The ball of ``radius`` Fourier pixels of the particle, without its first shells."""
    axis = torch.arange(-radius, radius + 1)
    z, y, x = torch.meshgrid(axis, axis, axis[radius:], indexing="ij")
    first = (x > 0) | ((y > 0) | ((y == 0) & (z > 0)))
    shell = (x**2 + y**2 + z**2).to(torch.float32).sqrt().round().to(torch.int64)
    keep = first & (shell >= FIRST_SHELL) & (shell <= radius)
    k = torch.stack([x[keep], y[keep], z[keep]], dim=-1).to(torch.float32)
    return Ball(k, shell[keep], spectrum(particle.data, radius + 1), particle.expected[: radius + 1], particle.filled)


def _turns_about(axes: Float[Tensor, "a 3"]) -> Float[Tensor, "t a 3 3"]:
    angles = torch.tensor([2 * math.pi * j / n for j, n in _turns()])
    return exp(angles[:, None, None] * axes)


def tabulate(ball: Ball) -> tuple[Float[Tensor, "t a"], Float[Tensor, "t a 3"]]:
    """Weighted correlation of the map with itself for every turn and axis, at the best of a few shifts, and that shift
    in pixels.
    """
    axis = torch.arange(-2, 3, dtype=torch.float32)
    shifts = torch.cartesian_prod(axis, axis, axis)
    shifts = shifts[shifts.norm(dim=-1) <= 2.3] * (ball.map.box / (3.0 * float(ball.shell.max())))
    angle = (-2 * torch.pi / ball.map.box) * (ball.k @ shifts.T)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rotations = _turns_about(_axes())
    here = (ball.map.at(ball.k) * ball.weight).conj()
    best, where = [], []
    for some in rotations.flatten(0, 1).split(384):
        cross = here * ball.map.at(torch.einsum("gji,pj->gpi", some, ball.k))
        value, index = (cross.real @ cos - cross.imag @ sin).max(dim=1)
        best.append(value)
        where.append(shifts[index])
    return torch.cat(best).reshape(rotations.shape[:2]), torch.cat(where).reshape(*rotations.shape[:2], 3)


@dataclass(frozen=True)
class Fit:
    """A group laid on the map: its elements are ``frame @ S @ frame.T`` about ``middle`` (pixels)."""

    name: str
    frame: Float[Tensor, "3 3"]
    middle: Float[Tensor, "3"]

    def turned(self, members: Float[Tensor, "e 3 3"]) -> Float[Tensor, "e 3 3"]:
        """Rotations of the convention's axes as rotations of the map."""
        return self.frame @ members @ self.frame.T


@lru_cache(maxsize=64)
def _orientations(name: str) -> Float[Tensor, "m 3 3"]:
    """Frames to try: one of each orbit of the group."""
    if name.startswith("C"):
        z = _axes()
        helper = torch.where(z[:, :1].abs() < 0.7, torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]))
        x = torch.linalg.cross(helper, z)
        x = x / x.norm(dim=-1, keepdim=True)
        return torch.stack([x, torch.linalg.cross(z, x), z], dim=-1)
    grid = healpix_grid(3)
    return grid[asymmetric_unit(grid, point_group(name))]


@lru_cache(maxsize=64)
def _on_table(name: str) -> tuple[Int[Tensor, " e"], Float[Tensor, "e 3"], Int[Tensor, "m e"]]:
    """Where the elements of a group stand in the table: which turn, about which axis, and the nearest axis there is in every frame."""
    vectors = log(group_elements(name))
    angle = vectors.norm(dim=-1)
    fractions = torch.tensor([j / n for j, n in _turns()])
    turn = (angle[:, None] / (2 * math.pi) - fractions).abs().argmin(dim=1)
    about = vectors / angle[:, None]
    directions = torch.einsum("mij,ej->mei", _orientations(name), about)
    return turn, about, torch.cat([(d @ _axes().T).abs().argmax(dim=-1) for d in directions.split(512)])


def best_start(name: str, table: Float[Tensor, "t a"], shifts: Float[Tensor, "t a 3"]) -> tuple[float, Fit]:
    """Best frame of a group on the table with the centre that explains the shifts best, and the least table value of
    its elements there, each at the best of the axes around.
    """
    (turn, about, nearest), frames, axes = _on_table(name), _orientations(name), _axes()
    scores = table[turn, nearest]
    i = int(scores.mean(dim=1).argmax())
    elements = frames[i] @ group_elements(name) @ frames[i].T
    directions = about @ frames[i].T
    ahead = (directions * axes[nearest[i]]).sum(dim=-1, keepdim=True) > 0
    there = shifts[turn, nearest[i]]  # for the turn about the axis of the table; the inverse turn has another shift
    there = torch.where(ahead, there, -torch.einsum("eij,ej->ei", elements, there))
    system = (torch.eye(3) - elements).reshape(-1, 3).double()
    middle = torch.linalg.pinv(system, rtol=1e-3) @ there.reshape(-1).double()
    around = (directions @ axes.T).abs() > math.cos(math.radians(6.5))
    least = torch.where(around, table[turn], -1.0).amax(dim=1).min()
    return float(least), Fit(name, frames[i], middle.to(torch.float32))


def refine(ball: Ball, fit: Fit, iterations: int) -> Fit:
    """Nearest maximum over frame and centre of the weighted correlation, all elements together."""
    elements = group_elements(fit.name)
    weight = (ball.weight / len(elements)).repeat(len(elements))[None]
    shell, unit = ball.shell.repeat(len(elements)), 2j * torch.pi / ball.map.box

    def measure(frame: Tensor, middle: Tensor) -> Slope:
        turns = frame[0] @ elements @ frame[0].mT
        k = ball.k @ turns
        here = ball.map.at(ball.k) * ball.ramp(ball.k, -middle[0])
        read, gradient = ball.map.slope(k)
        ramp = ball.ramp(k, -middle[0])
        there = read * ramp
        gradient = (gradient + unit * middle[0] * read[..., None]) * ramp[..., None]
        outer = torch.linalg.cross(gradient @ turns.mT.to(gradient), ball.k.to(gradient).expand_as(gradient))
        turning = outer - torch.linalg.cross(gradient, k.to(gradient))
        slopes = torch.cat([turning, unit * (k - ball.k) * there[..., None]], dim=-1).flatten(0, 1).mT[None]
        return correlated(weight, here.repeat(len(elements))[None], there.flatten()[None], slopes, shell)

    frame, middle = climb(measure, fit.frame[None], fit.middle[None], iterations)
    return Fit(fit.name, frame[0], middle[0])


def half_turns(name: str) -> Float[Tensor, "h 3 3"]:
    """Rotations by half the angle of the elements that are not themselves in the group: they tell 7-fold from round."""
    half = exp(log(group_elements(name)) / 2)
    gap = (half[:, None] - point_group(name).to(half)).abs().amax(dim=(-1, -2)).amin(dim=1)
    return half[gap > 1e-3]
