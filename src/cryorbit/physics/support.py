"""The posterior of a map that is zero outside a support: the Gaussian of ``linear_gaussian.py`` conditioned on that, and its mode where no
voxel is negative.

Posed images and a stationary prior give the map v the density ``exp(-v' P v / 2 + b' v)``, b the back-projected images over their noise and P
a convolution: diagonal on the twofold oversampled grid, where no voxel of the box is taken for its neighbour, with the ``CTF^2 / N`` of
images and the prior's ``1 / 8t`` in it. (That images at known poses make a convolution, applied by padded transforms: Wang, Shkolnisky and
Singer 2013, arXiv:1307.5824.) Conditioned on being zero outside the support, v has the rows and columns of P at its voxels. Their inverse
has no closed form: the mean is found by preconditioned conjugate gradients, and draws are exact, ``P^-1`` of noise whose covariance is P
(perturb and solve; Papandreou and Yuille 2010, NIPS 23).

Weights must be inserted finely: on a twofold grid the convolution between voxels as far apart as a molecule is wide is off by a hundredth, on
a fourfold one by less than a thousandth (tests/physics/test_support.py), and information differs by orders of magnitude where views are
missing. Nor may the convolution's transform be cut at zero: of a kernel cut to a box it is negative here and there, which P, on the
support, is not.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.physics.fourier import fourier_to_volume, frequencies, volume_to_fourier
from cryorbit.physics.slicing import Accumulator, central, completed, spline_window, uncropped

_NEAR = 0.02  # of a standard deviation: how close to the solution is close enough, root mean square over the voxels
_MOST_STEPS = 3000
_LOOKED = 10  # steps of projected gradients between looks at how close they are


@dataclass(frozen=True)
class SupportedGaussian:
    """``exp(-v' P v / 2 + b' v)`` over the voxels of a support; b, the force, is given to each of the questions.

    Attributes
    ----------
    precision
        (oD, oD, oD // 2 + 1) P on the oversampled grid, rfft layout.
    prior
        Its part from the prior.
    inverse
        Nearly its inverse, and smooth: what conjugate gradients are preconditioned by.
    support
        (D, D, D) where the map may be other than zero.
    """

    precision: Float[Tensor, "s s h"]
    prior: Float[Tensor, "s s h"]
    inverse: Float[Tensor, "s s h"]
    support: Bool[Tensor, "d d d"]

    @classmethod
    def from_sums(
        cls, acc: Accumulator, prior: Float[Tensor, " shells"], support: Bool[Tensor, "d d d"]
    ) -> "SupportedGaussian":
        """Of inserted ``CTF^2`` over the noise, and the prior variance of a coefficient per shell of a map that *fills* the box.

        Of a map in the support there is only its share, so a power spectrum measured on it is to be divided by that share.

        Raises
        ------
        DataError
            The support is empty.
        """
        if not bool(support.any()):
            raise DataError("DATA233", "the mask of the prior is empty, expected voxels above 0", "give another mask")
        box, side, support = acc.box, 2 * acc.box, support.to(prior.device)
        axis = frequencies(side, prior.device).to(prior) / 2
        norm = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis[: box + 1].abs() ** 2).sqrt()
        believed = 1 / (8 * prior[norm.round().to(torch.int64).clamp(max=len(prior) - 1)])
        fine = acc.oversampling * box
        near = _unblurred(uncropped(completed(acc.weight), fine), side) * (fine / side) ** 3
        seen, even = (volume_to_fourier(x).real for x in (near, near * spline_window(side, side, near)))
        return cls(seen + believed, believed, 1 / (even.clamp_min(0) + believed), support)

    def times(self, values: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """``P v`` on the support; v must be zero outside it."""
        return self._filtered(values, self.precision) * float(self.precision.shape[0] ** 3)

    def images_times(self, values: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """:meth:`times` by what P has of the images: their back-projected predictions from v."""
        return self._filtered(values, self.precision - self.prior) * float(self.precision.shape[0] ** 3)

    def solved(
        self, force: Float[Tensor, "d d d"], start: Float[Tensor, "d d d"] | None = None
    ) -> Float[Tensor, "d d d"]:
        """``P^-1 b``, the mean: zero outside the support like b and ``start``; to a fiftieth of a standard deviation.

        Raises
        ------
        DataError
            Conjugate gradients do not come near.
        """
        values = torch.zeros_like(force) if start is None else start
        left = force - self.times(values)
        guess = self._guess(left)
        direction, size = guess, (left * guess).sum()
        for _ in range(_MOST_STEPS):
            if float(size) <= _NEAR**2 * int(self.support.sum()):
                return values
            along = self.times(direction)
            bend = (direction * along).sum()
            if not float(bend) > 0:
                break
            rate = size / bend
            values, left = values + rate * direction, left - rate * along
            guess = self._guess(left)
            size, before = (left * guess).sum(), size
            direction = guess + size / before * direction
        raise DataError(
            "DATA234",
            f"the map within the mask was not found by {_MOST_STEPS} steps of conjugate gradients",
            "a smaller mask makes it easier",
        )

    def non_negative(self, force: Float[Tensor, "d d d"], start: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """The mode over maps without negative voxels, near ``start``; as exact as :meth:`solved`.

        Accelerated projected gradients that start anew where they overshoot (Beck and Teboulle 2009, SIAM J. Imaging Sci. 2, 183;
        O'Donoghue and Candes 2015, Found. Comput. Math. 15, 715).

        Raises
        ------
        DataError
            They do not come near.
        """
        rate = 1 / (float(self.precision.max()) * self.precision.shape[0] ** 3)
        values = ahead = start.clamp_min(0)
        momentum = 1.0
        for count in range(_MOST_STEPS):
            push = force - self.times(ahead)
            after = (ahead + rate * push).clamp_min(0)
            if float(((ahead - after) * (after - values)).sum()) > 0:
                momentum = 1.0
            grown = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
            ahead = after + (momentum - 1) / grown * (after - values)
            values, momentum = after, grown
            if count % _LOOKED == 0 and self._settled(force, values):
                return values
        raise DataError(
            "DATA235", f"the non-negative map was not found in {_MOST_STEPS} steps", "leave --non-negative out"
        )

    def _settled(self, force: Float[Tensor, "d d d"], values: Float[Tensor, "d d d"]) -> bool:
        """Whether nothing that may still move would move by much: positive voxels, and those at zero that are pushed up."""
        push = force - self.times(values)
        push = push * ((values > 0) | (push > 0))
        return float((push * self._guess(push)).sum()) <= _NEAR**2 * int(self.support.sum())

    def draw(self, noise: Float[Tensor, "d d d"], generator: torch.Generator) -> Float[Tensor, "d d d"]:
        """A draw's difference from the mean; ``noise`` is white noise back-projected like the images over theirs."""
        side = self.prior.shape[0]
        white = torch.randn(side, side, side, generator=generator).to(self.prior)
        believed = fourier_to_volume(volume_to_fourier(white) * self.prior.sqrt(), side) * side**1.5
        return self.solved((noise + central(believed, self.support.shape[0])) * self.support)

    def _guess(self, values: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """What ``P^-1`` would be without a support."""
        return self._filtered(values, self.inverse) / float(self.precision.shape[0] ** 3)

    def _filtered(self, values: Float[Tensor, "d d d"], gain: Float[Tensor, "s s h"]) -> Float[Tensor, "d d d"]:
        side, box = self.precision.shape[0], self.support.shape[0]
        before = side // 2 - box // 2
        wide = torch.nn.functional.pad(values, [before, side - box - before] * 3)
        return central(fourier_to_volume(volume_to_fourier(wide) * gain, side), box) * self.support


def _unblurred(seen: Float[Tensor, "s s h"], side: int) -> Float[Tensor, "d d d"]:
    """The convolution's kernel over the central ``side`` voxels, from inserted weights without the spline they were inserted by."""
    fine = seen.shape[0]
    return central(fourier_to_volume(seen.to(seen.dtype.to_complex()), fine), side) / spline_window(side, fine, seen)
