"""Images of a small blob in coloured noise, posed: what the tests of map posteriors are about."""

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
