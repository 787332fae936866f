"""Copies of an image turned by quarter turns and mirrored: exact on Fourier pixels, and each with a pose of its own under the same map.

An image moved by Q, an orthogonal 2 x 2 matrix of whole numbers, has the transform ``f^(Q^T k)``. It is the projection of the map at ``G R``,
where G is Q with ``det Q`` as its third diagonal element: the sum along the beam is the same from both ends, so a mirror in the plane goes
with one along the beam, and both together are a rotation. A mirrored image shows the map itself from behind, not its other hand.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.physics.fourier import FourierDisk

GROUPS = {"c1": (1, False), "c2": (2, False), "c4": (4, False), "d4": (4, True)}
"""Turns of a whole circle, and whether each also comes mirrored."""


@dataclass(frozen=True)
class Copies:
    """A group of moves of the plane on the Fourier pixels of a disk.

    Attributes
    ----------
    moves
        (G, 3, 3) what each does to a pose from the left; the first is none.
    source, conjugate
        (G, P) where in the disk a pixel of the copy comes from, and whether conjugated.
    """

    moves: Float[Tensor, "g 3 3"]
    source: Int[Tensor, "g p"]
    conjugate: Bool[Tensor, "g p"]

    @staticmethod
    def of(name: str, disk: FourierDisk) -> "Copies":
        """The group ``name`` of :data:`GROUPS` on ``disk``.

        Raises
        ------
        ConfigError
            CONF504 no such group.
        """
        if name not in GROUPS:
            raise ConfigError("CONF504", f"unknown group of copies {name}", f"known: {', '.join(GROUPS)}")
        turns, mirrored = GROUPS[name]
        quarter, mirror = torch.tensor([[0, -1], [1, 0]]), torch.tensor([[-1, 0], [0, 1]])
        turned = [torch.linalg.matrix_power(quarter, i * 4 // turns) for i in range(turns)]
        both = [(q, 1) for q in turned] + [(q @ mirror, -1) for q in turned if mirrored]
        moves = torch.stack([torch.block_diag(q, torch.tensor(sign)) for q, sign in both])
        k, width = torch.stack([disk.kx, disk.ky]).cpu(), 2 * disk.box + 1

        def place(x: Int[Tensor, "*b p"], y: Int[Tensor, "*b p"]) -> Int[Tensor, "*b p"]:
            return (y + disk.box) * width + x + disk.box

        lookup = torch.full((width * width,), -1, dtype=torch.int64)
        lookup[place(*k)] = torch.arange(len(disk))
        x, y = (moves[:, :2, :2].mT @ k).unbind(dim=1)
        own, mate = lookup[place(x, y)], lookup[place(-x, -y)]
        device = disk.kx.device
        return Copies(moves.float().to(device), torch.where(own < 0, mate, own).to(device), (own < 0).to(device))

    def __len__(self) -> int:
        return len(self.moves)

    def images(self, values: Complex[Tensor, "b p"], which: Int[Tensor, " b"]) -> Complex[Tensor, "b p"]:
        """Of each image the copy ``which``."""
        moved = values.gather(1, self.source[which])
        return torch.where(self.conjugate[which], moved.conj(), moved)

    def back(
        self, rotations: Float[Tensor, "b h 3 3"], shifts: Float[Tensor, "b h 2"], which: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b h 3 3"], Float[Tensor, "b h 2"]]:
        """Poses of the images from poses of their copies ``which``."""
        undo = self.moves[which].mT[:, None]
        return undo @ rotations, (undo[..., :2, :2] @ shifts[..., None])[..., 0]
