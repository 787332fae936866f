"""Multi-reference alignment: a signal seen at unknown circular shifts (papers/003 eq. 2, 3), cryo-EM in the small."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups.cyclic import Cyclic


@dataclass(frozen=True)
class MRA:
    """Orbit model of circular shifts: ``(s . v)(x) = v(x - s)``, measured whole.

    Attributes
    ----------
    group
        The cyclic group of the signal's length.
    """

    group: Cyclic

    def observe(self, signal: Float[Tensor, " n"], g: Int[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """Shifted copies of ``signal``: row j is ``signal`` moved towards larger indices by ``g[j]`` samples.

        Examples
        --------
        >>> MRA(Cyclic(3)).observe(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1]))
        tensor([[1., 2., 3.],
                [3., 1., 2.]])
        """
        n = self.group.order
        return signal[(torch.arange(n, device=signal.device) - g[:, None]) % n]
