"""A map that is not quite known: independent Gaussian Fourier coefficients with the symmetries of a real map (papers/002 section 5.1).

The mean is kept as voxels and the variance as one number per coefficient, equal at k and -k; a draw adds the transform of white voxels
times ``sqrt(variance)``. So mean, variance and every draw have the Hermitian symmetries of papers/002 footnote 3 without any bookkeeping.
Without a variance it is the Dirac of papers/002: a map on voxels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryorbit.errors import DataError
from cryorbit.metrics.resample import move_volume
from cryorbit.physics.fourier import fourier_to_volume, friedel_weight, shell_index, volume_to_fourier
from cryorbit.volumes.voxel import VoxelVolume


def even(values: Float[Tensor, "d d h"]) -> Float[Tensor, "d d h"]:
    """Values on the rfft half of a transform made equal at k and -k, where the half stores both."""
    box = values.shape[0]
    mate = values.flip(0, 1).roll((1, 1), dims=(0, 1))
    both = torch.zeros(values.shape[-1], dtype=torch.bool, device=values.device)
    both[0] = True
    both[-1] |= box % 2 == 0
    return torch.where(both, 0.5 * (values + mate), values)


class GaussianVolume(VoxelVolume):
    """Normal distribution over maps, ``q(v)`` of papers/002 eq. 14, with differentiable central slices of its mean and draws.

    Coefficients are those of the unnormalised transform, variances complex: ``E|V - mean|^2``, real and imaginary part together.

    Parameters
    ----------
    box
        Side length D in pixels.
    oversampling
        As for :class:`VoxelVolume`.
    variance
        (D, D, D // 2 + 1) of every coefficient, rfft layout; 0 where a coefficient is certain. None: all are (Dirac).

    Attributes
    ----------
    data
        (D, D, D) parameter: the mean, zyx.
    log_variance
        (D, D, D // 2 + 1) parameter, or None.
    """

    def __init__(self, box: int, oversampling: int = 2, variance: Float[Tensor, "d d h"] | None = None) -> None:
        super().__init__(box, oversampling)
        if variance is not None and variance.shape != (box, box, box // 2 + 1):
            raise DataError(
                "DATA230",
                f"variances of shape {tuple(variance.shape)} do not belong to a box of {box}",
                f"expected the rfft half of its transform, {(box, box, box // 2 + 1)}",
            )
        self.log_variance = None if variance is None else nn.Parameter(variance.detach().log())

    @classmethod
    def from_map(
        cls, data: Float[Tensor, "d d d"], oversampling: int = 2, variance: Float[Tensor, "d d h"] | None = None
    ) -> "GaussianVolume":
        """The distribution of mean ``data`` (copied); ``variance`` None puts it all there."""
        volume = cls(data.shape[-1], oversampling, variance)
        volume.data = nn.Parameter(data.detach().clone())
        return volume

    @property
    def variance(self) -> Float[Tensor, "d d h"]:
        """Variance of every coefficient, equal at k and -k."""
        if self.log_variance is None:
            return self.data.new_zeros(self.box, self.box, self.box // 2 + 1)
        return even(self.log_variance.exp())

    def draw(self, generator: torch.Generator) -> Float[Tensor, "d d d"]:
        """A map drawn from the distribution; differentiable in mean and variance (the reparameterisation of papers/002 section 5.1)."""
        if self.log_variance is None:
            return self.data
        white = torch.randn(self.data.shape, generator=generator, dtype=self.data.dtype).to(self.data.device)
        spread = even((0.5 * self.log_variance).exp())
        noise = volume_to_fourier(white) * (spread / self.box**1.5)
        return self.data + fourier_to_volume(noise, self.box)

    def divergence(self, prior: Float[Tensor, " shells"]) -> Float[Tensor, ""]:
        """``KL(q || p)`` in nats to independent coefficients of mean 0 and variance ``prior`` per shell (the last entry serves beyond).

        The KL of papers/002 eq. 14; certain coefficients (and those of a Dirac) count with their mean alone, up to a constant.
        """
        shell = shell_index(self.box, self.data.device).clamp(max=len(prior) - 1)
        expected = prior.to(self.data)[shell]
        terms = volume_to_fourier(self.data).abs().square() / expected
        if self.log_variance is not None:
            free = torch.isfinite(self.log_variance)
            ratio = torch.where(free, even(self.log_variance) - expected.log(), 0.0)
            terms = terms + torch.where(free, ratio.exp() - ratio - 1, 0.0)
        return 0.5 * (terms * friedel_weight(self.box, self.data)).sum()

    def voxel_variance(self, symmetry: Float[Tensor, "s 3 3"] | None = None) -> Float[Tensor, "d d d"]:
        """Variance of every voxel of the map, exact: no sampling.

        Independent coefficients make noise that is alike everywhere, of autocovariance ``c(x) = sum_k variance exp(2 pi i k.x / D) / D^6``:
        each voxel has c(0). Where a symmetry ties coefficients to each other, a voxel has ``sum_g c(x - g x)``: on an n-fold axis n
        times as much.

        Parameters
        ----------
        symmetry
            (S, 3, 3) point group that was imposed on the map; None or the identity: no symmetry.
        """
        variance = self.variance.detach()
        covariance = fourier_to_volume(variance.to(variance.dtype.to_complex()), self.box) / self.box**3
        centre = self.box // 2
        out = covariance[centre, centre, centre].expand_as(covariance).clone()
        if symmetry is None:
            return out
        one = torch.eye(3).to(out)
        for element in symmetry.to(out):
            if not torch.allclose(element, one, atol=1e-6):
                out = out + move_volume(covariance, (one - element).T, torch.zeros(3))
        return out
