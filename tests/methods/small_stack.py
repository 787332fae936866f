"""Images of a small blob in coloured noise, posed: what the tests of map posteriors are about."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import exp
from cryorbit.methods.map_posterior import MapPosterior
from cryorbit.methods.masked_posterior import MaskedPosterior
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.atoms import AtomicModel
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack

COUNT, BOX, APIX = 500, 20, 4.0


def small_stack(seed: int) -> tuple[FourierStack, SimulatedParticles]:
    """The stack and its truth."""
    truth = simulate_particles(
        phantom(radius=25.0, width=2.0),
        count=COUNT,
        box=BOX,
        pixel_size=APIX,
        snr_db=-3.0,
        shift_sigma_px=0.5,
        noise="coloured",
        seed=seed,
    )
    return FourierStack(ArrayParticles(truth.images.numpy(), APIX), BOX / 2, mask_diameter=70.0), truth


def known(truth: SimulatedParticles) -> PoseSamples:
    """The true pose of each image."""
    count = len(truth.images)
    return PoseSamples(
        torch.arange(count), truth.poses.rotations, truth.poses.shifts / truth.pixel_size, torch.ones(count)
    )


def askew_group(name: str) -> Float[Tensor, "s 3 3"]:
    """A point group about axes that are none of the grid's."""
    frame = exp(torch.tensor([0.3, -0.5, 0.2]))
    return frame.T @ point_group(name).float() @ frame


def symmetric_model(group: Float[Tensor, "s 3 3"]) -> AtomicModel:
    """Blobs that are alike under the group."""
    one, repeat = phantom(radius=25.0, blobs=4, width=2.0), (len(group), 1)
    positions = torch.cat([one.positions @ element.double().T for element in group])
    return AtomicModel(positions, one.amplitudes.repeat(repeat), one.widths.repeat(repeat), "symmetric phantom")


def symmetric_stack(group: Float[Tensor, "s 3 3"], seed: int) -> tuple[FourierStack, SimulatedParticles]:
    """As many images of them, fainter."""
    model = symmetric_model(group)
    truth = simulate_particles(model, count=COUNT, box=BOX, pixel_size=APIX, snr_db=-10.0, seed=seed)
    return FourierStack(ArrayParticles(truth.images.numpy(), APIX), BOX / 2, mask_diameter=70.0), truth


Made = Callable[[FourierStack, PoseSamples], MapPosterior | MaskedPosterior]


def covered(group: Float[Tensor, "s 3 3"], made: Made) -> float:
    """Share of true coefficients in their 90 % intervals, mean over three such sets."""
    total = 0.0
    for seed in range(3):
        stack, truth = symmetric_stack(group, seed)
        found = made(stack, known(truth))
        total += interval_coverage(found.mean, found.variance, truth.volume.data * stack.scale).overall
    return total / 3
