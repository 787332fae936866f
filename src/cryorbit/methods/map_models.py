"""What a half's map is, given the sums its posed images leave: voxels, each solved for, or a neural field fitted to them.

The M-step of refinement for given weighted poses is regularised least squares in the map; its sufficient statistics are the accumulators of
:func:`~cryorbit.methods.half_maps.insert_posed`, so no model passes over the images. On voxels the minimum is the Wiener quotient. A neural
field walks towards it by gradient steps on its parameters, preconditioned by weight plus prior: for the objective J of
:func:`~cryorbit.physics.slicing.misfit`, whose Hessian over the grid is ``2 (weight + prior)``, the gradient over it is the difference
between the field and the quotient itself, and goes through the network by the chain rule. Half maps and their FSC stay what the images
alone say, for either model: networks may agree where both have learnt nothing.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from cryorbit.methods.half_maps import wiener, wiener_prior
from cryorbit.methods.refinement_config import RefinementConfig, checked_volume
from cryorbit.physics.slicing import Accumulator, misfit, volume_from_accumulator
from cryorbit.training.checkpoint import State
from cryorbit.volumes.neural import NeuralVolume


@runtime_checkable
class MapModel(Protocol):
    """The maps of two halves, rebuilt once per sweep."""

    def rebuilt(
        self,
        first: Accumulator,
        second: Accumulator,
        correlation: Float[Tensor, " shells"],
        mask: Float[Tensor, "d d d"],
    ) -> tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"], Float[Tensor, "d d d"]]:
        """The references of the halves, masked, and their joint map, under the prior that the FSC of the halves implies."""
        ...

    def history(self) -> dict[str, float | str]:
        """What to write down of the last sweep."""
        ...

    def state(self) -> State:
        """Tensors that continue the model exactly."""
        ...

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`; other tensors in ``state`` are ignored."""
        ...


class VoxelMaps:
    """Every Fourier voxel solved for: Wiener quotients of each half's sums, and of both together."""

    def rebuilt(
        self,
        first: Accumulator,
        second: Accumulator,
        correlation: Float[Tensor, " shells"],
        mask: Float[Tensor, "d d d"],
    ) -> tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"], Float[Tensor, "d d d"]]:
        """See :class:`MapModel`."""
        return wiener(first, second, correlation, mask)

    def history(self) -> dict[str, float | str]:
        """See :class:`MapModel`."""
        return {}

    def state(self) -> State:
        """See :class:`MapModel`."""
        return {}

    def load_state(self, state: State) -> None:
        """See :class:`MapModel`."""


class NeuralMaps:
    """One field per half, from different random starts, on top of the map the half started from; the joint map is their mean.

    Parameters
    ----------
    start
        Map of each half, on the device to work on.
    config
        ``field_width`` and ``field_steps``: hidden units, and gradient steps per sweep.
    """

    def __init__(self, start: Sequence[Float[Tensor, "d d d"]], config: RefinementConfig) -> None:
        self.steps = config.field_steps
        self.fields = [NeuralVolume.from_map(v, width=config.field_width, seed=i) for i, v in enumerate(start)]
        self.missed = float("nan")

    def rebuilt(
        self,
        first: Accumulator,
        second: Accumulator,
        correlation: Float[Tensor, " shells"],
        mask: Float[Tensor, "d d d"],
    ) -> tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"], Float[Tensor, "d d d"]]:
        """See :class:`MapModel`."""
        maps, self.missed = [], 0.0
        for field, sums in zip(self.fields, (first, second), strict=True):
            prior = wiener_prior(sums, correlation)
            field.approach(volume_from_accumulator(sums, prior), mask, self.steps)
            maps.append(field.density(mask).detach())
            self.missed += 0.5 * float(misfit(maps[-1], sums, prior))
        return maps[0], maps[1], 0.5 * (maps[0] + maps[1])

    def history(self) -> dict[str, float | str]:
        """See :class:`MapModel`: the share of the objective that the fields leave."""
        return {"misfit": self.missed}

    def state(self) -> State:
        """See :class:`MapModel`."""
        return {f"field_{i}.{k}": v for i, field in enumerate(self.fields) for k, v in field.state_dict().items()}

    def load_state(self, state: State) -> None:
        """See :class:`MapModel`."""
        for i, field in enumerate(self.fields):
            prefix = f"field_{i}."
            field.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def map_model(name: str, start: Sequence[Float[Tensor, "d d d"]], config: RefinementConfig) -> MapModel:
    """The map model ``name``, one of ``refinement_config.VOLUME_NAMES``, from the maps the halves start from."""
    return NeuralMaps(start, config) if checked_volume(name) == "neural" else VoxelMaps()
