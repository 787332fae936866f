"""Ab initio by the orientation autoencoder: one for each half of the particles, each from a random start of its own."""

import math
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.groups.point import point_group
from cryorbit.methods.amortized import Amortized, from_starts
from cryorbit.methods.amortized_config import AmortizedConfig
from cryorbit.methods.halves import HALVES, members_of
from cryorbit.methods.symmetric import averaged
from cryorbit.networks.cnn import SMALLEST_SIDE
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.inputs import Inputs
from cryorbit.training.dataset import FourierStack
from cryorbit.training.history import History
from cryorbit.training.loop import Progress, run


def settings_of(config: RunConfig, elements: int) -> AmortizedConfig:
    """Settings under a group of so many elements: a symmetric map has as much less to tell at low resolution as for ``marginal``."""
    plain, ours = config.abinitio.radii(1), config.abinitio.radii(elements)
    c = config.amortized
    return replace(c, radius_start=c.radius_start * ours[0] / plain[0], radius_end=c.radius_end * ours[1] / plain[1])


def least_radius(config: RunConfig, inputs: Inputs) -> float:
    """Fourier radius in pixels that the images of the autoencoder must reach."""
    nyquist, end = 0.5 * inputs.particles.box, settings_of(config, len(point_group(inputs.symmetry))).radius_end
    if not end:
        return nyquist
    extent = inputs.particles.box * inputs.particles.pixel_size
    return min(math.ceil(end * extent / inputs.mask_diameter), nyquist - 1)


def check_view(config: RunConfig, inputs: Inputs, box: int) -> None:
    """Refuse images that are too small for the encoder where they are looked at in ``box`` pixels.

    Raises
    ------
    ConfigError
        CONF509.
    """
    c = config.amortized
    side, least = min(c.side or box, box), (2 if c.polar else 1) * SMALLEST_SIDE
    if side < least:
        raise ConfigError(
            "CONF509",
            f"images of {inputs.particles.box} px, looked at in {box}, leave the encoder {side} px, expected {least} or more",
            "look further (amortized.radius_end), or "
            + ("set amortized.polar=false" if c.polar else "use --method marginal"),
        )


def learnt_maps(
    config: RunConfig,
    inputs: Inputs,
    stack: FourierStack,
    folder: Path,
    history: History,
    progress: Progress | None,
    fingerprint: str,
) -> tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]:
    """The maps of the two halves, neither of which has seen an image or a weight of the other.

    Parameters
    ----------
    config, inputs, stack
        Of the run; the map is learnt in the box of the stack.
    folder, history, progress, fingerprint
        As for :func:`~cryorbit.training.loop.run`; each half has a checkpoint of its own.

    Returns
    -------
    Two (D, D, D) maps, each in a frame and hand of its own.
    """
    maps, group = [], point_group(inputs.symmetry).float()
    settings = settings_of(config, len(group))
    for half in HALVES:
        method = from_starts(
            stack,
            settings,
            mask_diameter=inputs.mask_diameter,
            members=members_of(inputs.half_set, half),
            symmetry=group,
            seed=2 * config.seed + half,
        )
        method.name = f"{Amortized.name} {half}"
        run(
            method,
            checkpoint=folder / f"{Amortized.name}_{half}.safetensors",
            history=history,
            progress=progress,
            fingerprint=fingerprint,
        )
        maps.append(averaged(method.best.map(), group))
    return maps[0], maps[1]
