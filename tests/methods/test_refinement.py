"""When refinement stops. (Recovery from wrong poses: ``test_map_models.py`` and the pipeline's tests.)"""

import torch

from cryorbit.groups.so3 import distance, exp
from cryorbit.methods.half_maps import halves_from_poses
from cryorbit.methods.refinement import Refinement
from cryorbit.methods.refinement_config import RefinementConfig
from cryorbit.simulate.particles import simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack

APIX, DIAMETER, COUNT, BOX = 4.0, 70.0, 120, 24
GROUP = torch.eye(3)[None]
HALF = torch.arange(COUNT) % 3 % 2 + 1  # a third in the second half


def test_a_half_that_still_moves_is_not_outvoted_by_the_other():
    truth = simulate_particles(phantom(), count=COUNT, box=BOX, pixel_size=APIX, snr_db=0.0, seed=3)
    stack = FourierStack(ArrayParticles(truth.images.numpy(), APIX), BOX / 2, mask_diameter=DIAMETER)
    exact, shifts = truth.poses.rotations.float(), truth.poses.shifts.float() / APIX
    maps = halves_from_poses(stack, exact, shifts, HALF, mask_diameter=DIAMETER, symmetry=GROUP).references
    turn = exp(0.2 * torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0)))
    rotations = torch.where((HALF == 2)[:, None, None], turn @ exact, exact)
    refinement = Refinement(
        stack,
        RefinementConfig(sweeps=1),
        mask_diameter=DIAMETER,
        symmetry=GROUP,
        start=maps,
        radius=8,
        candidates=(rotations[:, None], shifts[:, None]),
        half_set=HALF,
    )
    told = refinement.step(0)["pose_change_deg"]
    moved = torch.rad2deg(distance(rotations, refinement.poses[0]))
    first, second = (float(moved[half == HALF].median()) for half in (1, 2))
    assert abs(told - second) < 1e-3
    assert second > 2 * float(moved.median()) > first
    assert not refinement.finished()
