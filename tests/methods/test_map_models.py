"""Voxels and neural fields as two map models of one refinement: same interface, right poses and maps, what may not be shared."""

import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.groups.so3 import exp
from cryorbit.methods.half_maps import halves_from_poses, insert_posed, wiener, wiener_prior
from cryorbit.methods.map_models import NeuralMaps, VoxelMaps, map_model
from cryorbit.methods.refinement import Refinement
from cryorbit.methods.refinement_config import VOLUME_NAMES, RefinementConfig
from cryorbit.metrics.align import align_poses
from cryorbit.metrics.fsc import fsc
from cryorbit.metrics.map_search import align_volumes
from cryorbit.metrics.masks import mask_from_map, soft_sphere
from cryorbit.physics.slicing import Accumulator, misfit
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run
from cryorbit.types import Poses, Volume
from cryorbit.volumes.registry import VOLUMES

APIX, DIAMETER, COUNT, BOX = 4.0, 70.0, 300, 24
GROUP = torch.eye(3)[None]
HALF = torch.arange(COUNT) % 2 + 1


@pytest.fixture(scope="module")
def truth() -> SimulatedParticles:
    return simulate_particles(phantom(), count=COUNT, box=BOX, pixel_size=APIX, snr_db=0.0, seed=3)


@pytest.fixture(scope="module")
def stack(truth: SimulatedParticles) -> FourierStack:
    return FourierStack(ArrayParticles(truth.images.numpy(), APIX), BOX / 2, mask_diameter=DIAMETER)


@pytest.fixture(scope="module")
def sums(truth: SimulatedParticles, stack: FourierStack) -> tuple[Accumulator, Accumulator]:
    """Both halves inserted at the true poses."""
    made = []
    for half in (1, 2):
        own = torch.nonzero(half == HALF)[:, 0]
        posed = PoseSamples(
            own, truth.poses.rotations[own].float(), truth.poses.shifts[own].float() / APIX, torch.ones(len(own))
        )
        made.append(insert_posed(stack, torch.ones(COUNT), posed, GROUP))
    return made[0], made[1]


SPHERE = soft_sphere(BOX, 0.5 * DIAMETER / APIX, 3.0)
FLAT_FSC = torch.full((BOX // 2 + 1,), 0.9)


def test_a_field_comes_nearer_to_the_minimum_with_every_sweep_and_halves_differ(sums):
    start = [1e-3 * SPHERE] * 2
    maps = NeuralMaps(start, RefinementConfig(field_width=64, field_steps=40))
    left = []
    for _ in range(3):
        one, two, joint = maps.rebuilt(*sums, FLAT_FSC, SPHERE)
        left.append(maps.history()["misfit"])
    assert left[0] > left[1] > left[2]
    target_one, target_two, _ = wiener(*sums, FLAT_FSC, SPHERE)
    floor = 0.5 * sum(
        float(misfit(v, a, wiener_prior(a, FLAT_FSC))) for v, a in zip((target_one, target_two), sums, strict=True)
    )
    assert left[2] < floor + 0.1  # of 1 where they started
    assert float((one - target_one).norm() / target_one.norm()) < 0.25
    torch.testing.assert_close(joint, 0.5 * (one + two))
    assert float(one[SPHERE == 0].abs().max()) == 0
    a, b = (field.field.last.weight.flatten() for field in maps.fields)
    assert abs(float(torch.corrcoef(torch.stack([a, b]).detach())[0, 1])) < 0.5


def test_voxels_are_the_wiener_quotient(sums):
    for found, expected in zip(
        VoxelMaps().rebuilt(*sums, FLAT_FSC, SPHERE), wiener(*sums, FLAT_FSC, SPHERE), strict=True
    ):
        assert torch.equal(found, expected)


def test_neural_refinement_corrects_poses_and_recovers_the_phantom(truth, stack):
    generator = torch.Generator().manual_seed(0)
    turn = exp(torch.deg2rad(torch.tensor(8.0)) / 3**0.5 * torch.randn(COUNT, 3, generator=generator))
    rotations = turn @ truth.poses.rotations.float()
    shifts = truth.poses.shifts.float() / APIX + 0.5 * torch.randn(COUNT, 2, generator=generator)
    start = halves_from_poses(stack, rotations, shifts, HALF, mask_diameter=DIAMETER, symmetry=GROUP)
    refinement = Refinement(
        stack,
        RefinementConfig(sweeps=4, search_every=0, field_width=64, field_steps=40),
        mask_diameter=DIAMETER,
        symmetry=GROUP,
        start=start.references,
        radius=5,
        candidates=(rotations[:, None], shifts[:, None]),
        half_set=HALF,
        volume="neural",
    )
    run(refinement)
    found = Poses(refinement.poses[0].double(), refinement.poses[1].double() * APIX)
    assert float(torch.rad2deg(align_poses(found, truth.poses).error).median()) < 3.5  # from 7
    true = Volume(truth.volume.data.float(), APIX)
    mask = mask_from_map(true.data, APIX)

    aligned = align_volumes(Volume(refinement.tensors["map"], APIX), true).map.data
    true_shifts = truth.poses.shifts.float() / APIX
    known = halves_from_poses(
        stack, truth.poses.rotations.float(), true_shifts, HALF, mask_diameter=DIAMETER, symmetry=GROUP
    )
    map_, begun, ceiling = (
        float(fsc(v * mask, true.data * mask)[1:10].mean()) for v in (aligned, start.joint, known.joint)
    )
    assert map_ > begun + 0.05
    assert map_ > ceiling - 0.02  # voxels at the true poses


def test_names_are_in_the_registry_and_others_are_refused():
    assert set(VOLUME_NAMES) <= set(VOLUMES)
    maps = [SPHERE, SPHERE]
    assert isinstance(map_model("voxel", maps, RefinementConfig()), VoxelMaps)
    assert isinstance(map_model("neural", maps, RefinementConfig(field_width=4)), NeuralMaps)
    with pytest.raises(ConfigError, match=r"CONF031.*nerual(.|\n)*voxel, neural"):
        map_model("nerual", maps, RefinementConfig())
