"""A first map for each half without poses: that of its images' moments, low enough in resolution to be right (``--init moments``)."""

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.methods.halves import HALVES, members_of
from cryorbit.methods.moment_fit import MomentsConfig
from cryorbit.methods.moments import invert_moments
from cryorbit.methods.particle_moments import ParticleMoments
from cryorbit.physics.fourier import resize_volume
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.inputs import Inputs
from cryorbit.training.dataset import FourierStack

_PERIODS = 2.6  # per particle diameter: shifts, noise and the moments' own ambiguity hide what lies beyond
_SETTINGS = MomentsConfig(starts=4, kept=1)


def moment_maps(
    config: RunConfig, inputs: Inputs, stack: FourierStack
) -> tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]:
    """One map for each half from the first and second moments of its images alone, each in a frame and hand of its own.

    Views count as they come, in-plane rotations as uniform, particles as centred and bright; the engine's own shifts and pairing do the rest.

    Parameters
    ----------
    config, inputs, stack
        Of the run; the maps are in the box and on the scale of the stack.

    Raises
    ------
    DataError
        DATA407 no image says anything of some ring.
    """
    particles = inputs.particles
    rings = round(_PERIODS * particles.box * particles.pixel_size / inputs.mask_diameter)
    rings = min(rings, (particles.box - 1) // 2)
    maps = []
    for half in HALVES:
        own = particles.subset(members_of(inputs.half_set, half).numpy())
        moments = ParticleMoments(own, rings, mask_diameter=inputs.mask_diameter).summed().image_moments()
        generator = torch.Generator().manual_seed(2 * config.seed + half)
        found = invert_moments(moments, _SETTINGS, generator).volume.float()
        maps.append(resize_volume(found, stack.box) * stack.scale)
    return maps[0], maps[1]
