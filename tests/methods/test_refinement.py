"""When refinement stops. (Recovery from wrong poses: ``test_map_models.py`` and the pipeline's tests.)"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from cryorbit.groups.so3 import distance, exp
from cryorbit.methods.half_maps import halves_from_poses
from cryorbit.methods.refinement import Refinement
from cryorbit.methods.refinement_config import RefinementConfig
from cryorbit.metrics.fsc import shell_power
from cryorbit.simulate.particles import simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack

APIX, DIAMETER, COUNT, BOX = 4.0, 70.0, 120, 24
GROUP = torch.eye(3)[None]
HALF = torch.arange(COUNT) % 3 % 2 + 1  # a third in the second half


def _refinement(
    snr_db: float, rotations_of: Callable[[Tensor], Tensor], **settings: float
) -> tuple[Refinement, Tensor]:
    """A refinement that starts from maps at the true poses, and the rotations its particles start from."""
    truth = simulate_particles(phantom(), count=COUNT, box=BOX, pixel_size=APIX, snr_db=snr_db, seed=3)
    stack = FourierStack(ArrayParticles(truth.images.numpy(), APIX), BOX / 2, mask_diameter=DIAMETER)
    exact, shifts = truth.poses.rotations.float(), truth.poses.shifts.float() / APIX
    maps = halves_from_poses(stack, exact, shifts, HALF, mask_diameter=DIAMETER, symmetry=GROUP).references
    rotations = rotations_of(exact)
    made = Refinement(
        stack,
        RefinementConfig(**settings),
        mask_diameter=DIAMETER,
        symmetry=GROUP,
        start=maps,
        radius=8,
        candidates=(rotations[:, None], shifts[:, None]),
        half_set=HALF,
    )
    return made, rotations


def test_a_half_that_still_moves_is_not_outvoted_by_the_other():
    turn = exp(0.2 * torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0)))
    refinement, rotations = _refinement(0.0, lambda exact: torch.where((HALF == 2)[:, None, None], turn @ exact, exact))
    told = refinement.step(0)["pose_change_deg"]
    moved = torch.rad2deg(distance(rotations, refinement.poses[0]))
    first, second = (float(moved[half == HALF].median()) for half in (1, 2))
    assert abs(told - second) < 1e-3
    assert second > 2 * float(moved.median()) > first
    assert not refinement.finished()


def test_images_are_as_likely_as_their_noise_allows_and_no_sweep_is_made_for_nothing():
    """At the end an image's log-likelihood is that of its noise: E log p = -(1 + log(pi sigma^2)) per complex Fourier pixel."""
    refinement, _ = _refinement(-5.0, lambda exact: exact, sweeps=30, radius_growth=1.0)
    told, unseen = [], []
    while not refinement.finished():
        told.append(refinement.step(len(told)))
        unseen.append(float(shell_power(refinement.tensors["half_1"])[11]))
    assert 3 < len(told) < 30
    still = math.degrees(0.02 / 8)
    assert told[-1]["pose_change_deg"] > still  # the poses are drawn anew in each sweep: they never stand still
    gains = [row["gain"] for row in told[:-1]]
    left = [min(abs(now), abs(now + before) / 2) for before, now in pairwise(gains)]
    assert left[-1] < 0.05 <= min(left[:-1])
    assert max(unseen[:-1]) < 0.1 * unseen[-1]  # what no pose is found by is back-projected in the last sweep alone

    disk = refinement.stack.at_radius(8)[0]
    noise = refinement.tensors["noise"][disk.shell]
    expected = -0.5 * float((disk.weight * (1 + torch.log(torch.pi * noise))).sum())
    assert abs(told[-1]["log_likelihood"] - expected) < 0.02 * abs(expected)
