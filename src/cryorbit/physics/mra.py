"""Multi-reference alignment: a signal seen at unknown circular shifts (papers/003 eq. 2, 3), cryo-EM in the small."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups.cyclic import Cyclic
from cryorbit.physics.fourier import fourier_to_signal, frequencies, signal_to_fourier


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


def shift_signal(signal: Float[Tensor, "*b n"], shift: Float[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
    """``v(x - shift)`` for a real ``shift`` in samples: the trigonometric polynomial through the samples, moved.

    The Nyquist coefficient of an even length cannot be moved by a fraction; it is scaled by the cosine of its phase.
    """
    n = signal.shape[-1]
    k = frequencies(n, signal.device).to(signal.dtype)
    phase = (-2 * math.pi / n) * shift[..., None] * k
    return fourier_to_signal(signal_to_fourier(signal) * torch.polar(torch.ones_like(phase), phase))
