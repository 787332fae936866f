"""The population of runs: selection, pairing across frames and hands, joining, intensity."""

import itertools
from dataclasses import replace

import pytest
import torch

from cryorbit.errors import RunError
from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, random_rotations
from cryorbit.methods.halves import HALVES, Agreement
from cryorbit.methods.marginal import Marginal
from cryorbit.methods.marginal_config import MarginalConfig
from cryorbit.methods.online_em import OnlineEM, rotation_grid
from cryorbit.metrics.align import align_poses
from cryorbit.metrics.resample import move_volume
from cryorbit.metrics.symmetry import SymmetryFinding
from cryorbit.physics.fourier import fourier_disk, resize_volume
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.pipeline.handover import _assign_all, assign, symmetry_note
from cryorbit.poses.grid import recounted
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.checkpoint import save_checkpoint
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run
from cryorbit.types import Poses

APIX, DIAMETER, COUNT = 4.0, 70.0, 500


@pytest.fixture(scope="module")
def truth() -> SimulatedParticles:
    return simulate_particles(phantom(), count=COUNT, box=24, pixel_size=APIX, snr_db=3.0, seed=3)


def engine(truth: SimulatedParticles, images: torch.Tensor | None = None, **settings: object) -> Marginal:
    images = truth.images if images is None else images
    stack = FourierStack(ArrayParticles(images.numpy(), APIX), 11.0, mask_diameter=DIAMETER)
    half = torch.arange(COUNT) % 2 + 1
    config = MarginalConfig(**{"settle_steps": 3, **settings})
    return Marginal(stack, config, mask_diameter=DIAMETER, symmetry=torch.eye(3)[None], half_set=half, seed=1)


@pytest.fixture(scope="module")
def finished(truth: SimulatedParticles) -> Marginal:
    made = engine(truth)
    run(made)
    made.agreement()
    return made


def test_independent_halves_find_the_same_molecule_and_its_poses(finished, truth):
    assert not bool(finished.joined)
    assert {half: len(finished.runs[half]) for half in HALVES} == {1: 1, 2: 1}
    found = finished.agreement()
    assert found.posed > 0.8
    assert finished.periods(float(found.reach)) > 6
    rotations, shifts, effective, _ = assign(finished, torch.arange(COUNT))
    poses = Poses(rotations[:, 0].double(), shifts[:, 0].double())
    error = torch.rad2deg(align_poses(poses, truth.poses).error)
    assert float(error.median()) < 12
    for half in HALVES:  # both halves in one frame
        assert float(error[finished.half_set == half].median()) < 12
    assert float(effective.median()) < 5


def test_a_symmetric_map_is_looked_at_in_more_detail_and_counted_alike(truth):
    made = engine(truth)
    plain = made.radius()
    made.symmetry = point_group("D4").float()
    made.first, made.last = made.config.radii(8)
    assert made.config.radii(1) == (4.4, 10.5)
    assert (made.first, made.last) == pytest.approx((4.4 * 8**0.25, 10.5 * 8**0.125))
    assert made.radius() > plain
    orders = []
    for march in (0.0, 0.49, 0.5, 1.0):
        made.march = torch.tensor(march)
        orders.append(made.order())
    assert orders == [2, 2, 3, 3]
    assert MarginalConfig(order=4).order_of(24) == 4
    assert len(rotation_grid(3, made.symmetry)) == pytest.approx(len(rotation_grid(2, torch.eye(3)[None])), rel=0.01)
    assert recounted(torch.tensor([80.0, 3.0]), 3, 2).tolist() == [10.0, 1.0]


def test_modes_of_a_particle_are_distinct(finished):
    rotations, *_ = assign(finished, torch.arange(40))
    first, second = rotations[:, 0], rotations[:, 1]
    assert torch.rad2deg(distance(first, second)).min() > 15


def test_poses_handed_over_are_kept_and_must_be_of_these_particles(finished, tmp_path):
    path = tmp_path / "assigned.safetensors"
    sound = _assign_all(finished, path, "f")
    assert all(torch.equal(value, sound[name]) for name, value in _assign_all(finished, path, "f").items())
    for damaged, words in (
        ({k: v for k, v in sound.items() if k != "intensity"}, "lacks intensity"),
        ({k: v[:10] for k, v in sound.items()}, r"rotations of shape \(10, 6, 3, 3\), expected \(500, 6, 3, 3\)"),
    ):
        save_checkpoint(path, damaged, {"fingerprint": "f"})
        with pytest.raises(RunError, match=f"RUN013: {path} .*{words}"):
            _assign_all(finished, path, "f")


def test_a_symmetry_the_molecule_lacks_is_refused_by_held_out_images(finished):
    false = SymmetryFinding("C2", torch.eye(3), torch.zeros(3), 0.9, ())
    test = finished.test_symmetry(false)
    assert not test.allowed
    assert "not imposed" in symmetry_note(finished, test)


def test_each_half_keeps_the_likelier_run_of_two_heats_and_a_resumed_run_too(truth, generator):
    """Half 1 learns nothing in the first heat and half 2 nothing in the second: the first must be replaced, the second kept."""
    settings = {"starts": 1, "heats": 2, "order": 1, "march_steps": 10, "settle_steps": 1, "batch": 100}
    made = engine(truth, **settings)
    wrong = torch.randn(made.stack.box, made.stack.box, made.stack.box, generator=generator) * made.mask
    steps = itertools.count()

    def spoiled(method: Marginal, half: int, index: int) -> None:
        for run_ in method.runs[half].values():
            run_.volume = wrong
        method.step(index)

    while int(made.heat) == 0:
        spoiled(made, 1, next(steps))
    resumed = engine(truth, **settings)
    resumed.load_state({name: value.clone() for name, value in made.state().items()})
    old = {half: next(iter(made.best[half].values())) for half in HALVES}
    for index in steps:
        spoiled(made, 2, index)
        spoiled(resumed, 2, index)
        if made.finished():
            break
    first, second = made.winners()
    assert first is not old[1]
    assert second is old[2]
    assert resumed.finished()
    assert torch.equal(resumed.maps()[1], made.maps()[1])


def test_a_heat_settles_on_with_more_images_while_that_makes_poses_sharper_or_more_alike(truth, monkeypatch):
    """And no longer: not once the halves agree, not in vain, and not for ever."""
    made = engine(truth, march_steps=2, heats=1)
    for index in range(2):
        made.step(index)
    made.march, made.settled = torch.tensor(1.0), torch.tensor(3)
    found = made.agreement()

    def extended(posed: float, effective: float) -> bool:
        monkeypatch.setattr(made, "agreement", lambda: replace(found, posed=posed, effective=effective, reach=2))
        before = int(made.extended)
        made._extend()
        return int(made.extended) > before

    assert not extended(0.7, 5.0)
    assert extended(0.2, 5.0)
    assert int(made.settled) == 0
    assert int(made.batch) == COUNT // 2  # all of a half
    assert not extended(0.21, 4.9)  # neither
    assert not extended(0.1, 4.0)  # sharper but less alike
    assert extended(0.21, 4.0)  # sharper
    again = engine(truth, march_steps=2, heats=1)
    again.load_state({name: value.clone() for name, value in made.state().items()})
    for each in (made, again):
        each.step(2)
    assert all(torch.equal(value, again.state()[name]) for name, value in made.state().items())
    assert extended(0.3, 4.0)  # more alike
    assert not extended(0.5, 2.0)  # the fourth


def test_noise_joins_the_halves(truth, generator):
    noise = torch.randn(truth.images.shape, generator=generator)
    made = engine(truth, noise, batch=100, march_steps=6, settle_steps=1, heats=1, order=1)
    run(made)
    assert bool(made.joined)
    assert float(made.at_pairing[1]) < 0.2
    assert not int(made.extended)  # one start for both halves: they cannot say more
    assert int(made.batch) < COUNT // 2  # grown anew


@pytest.mark.parametrize("kind", ["coarse", "one wrong"])
def test_maps_that_another_method_learnt_are_improved_on(truth, generator, kind):
    """Coarse maps in unlike frames and hands, or one of noise alone: the halves end with one structure, by their own images."""
    made = engine(truth)
    volume = resize_volume(truth.volume.data.float(), made.stack.box) * made.stack.scale
    coarse = resize_volume(resize_volume(volume, 8), made.stack.box)
    wrong = torch.randn(volume.shape, generator=generator) * volume.std()
    maps = (coarse, move_volume(coarse, random_rotations(1, generator)[0], torch.zeros(3), True))
    made.take_over(maps if kind == "coarse" else (coarse, wrong))
    assert (int(made.heat), float(made.march), int(made.batch)) == (2, 0.5, COUNT // 2)

    def alike(half: int) -> float:
        pair = torch.stack([made.runs[half][0].volume.flatten(), (maps[half - 1] * made.mask).flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    assert alike(1) > 0.9
    assert (alike(2) > 0.9) == (kind == "coarse")
    run(made)
    found = made.agreement()
    assert int(made.heat) == 2
    assert not bool(made.joined)
    assert found.posed > 0.8
    assert made.periods(float(found.reach)) >= 5
    if kind == "coarse":  # else the second hand is by chance
        assert alike(1) > 0.8 < alike(2)


def test_given_maps_start_one_run_of_each_half_and_their_frames_are_laid_on_each_other(truth, generator):
    """Coarse maps in unlike frames and hands: the halves must still pair, and the second start of each stay random."""
    made = engine(truth, heats=1)
    volume = resize_volume(truth.volume.data.float(), made.stack.box) * made.stack.scale
    turned = move_volume(volume, random_rotations(1, generator)[0], torch.zeros(3), True)
    made.begin_at((volume, turned))
    assert all(bool((runs[1].volume == 0).all()) for runs in made.runs.values())
    made.step(0)

    def alike(run_, map_):
        return float(torch.corrcoef(torch.stack([(run_.volume).flatten(), (map_ * made.mask).flatten()]))[0, 1])

    for half, map_ in zip(HALVES, (volume, turned), strict=True):
        assert alike(made.runs[half][0], map_) > 0.8
        assert abs(alike(made.runs[half][1], map_)) < 0.7
    for half in HALVES:
        made.runs[half].pop(1)
    for index in range(1, made.total_steps()):
        if made.finished():
            break
        made.step(index)
    assert not bool(made.joined)
    assert made.agreement().mirrored
    assert made.agreement().posed > 0.8


def test_intensity_follows_the_images(truth):
    strong = torch.where(torch.arange(COUNT) % 4 < 2, 1.3, 0.7)
    made = engine(truth, truth.images * strong[:, None, None])
    run(made)
    made.agreement()
    found = assign(made, torch.arange(COUNT))[3]
    assert float(torch.corrcoef(torch.stack([found, strong]))[0, 1]) > 0.6
    for winner in made.winners():  # as of particles that no minibatch held
        winner.intensity = torch.ones(COUNT)
    found = assign(made, torch.arange(COUNT))[3]
    assert float(torch.corrcoef(torch.stack([found, strong]))[0, 1]) > 0.6


def test_shifts_are_searched_as_widely_as_they_spread_up_to_twice_the_range(truth):
    made = engine(truth, march_steps=4)
    limit = made.config.shift_range * DIAMETER / APIX
    winner = made.winners()[0]
    assert float(winner.shift_sigma) == pytest.approx(limit / 2.5)
    for sigma, widest in ((0.2 * limit, limit), (0.6 * limit, 1.5 * limit), (3 * limit, 2 * limit)):
        winner.shift_sigma = torch.tensor(sigma)
        reached = made.grids(winner, made.stack.box // 2).shifts.points.norm(dim=1).max()
        assert min(widest, 4 * sigma) - 1 < float(reached) <= widest + 1e-5
        assert made.shifts_cut() == (sigma > limit)


def test_images_that_cannot_tell_do_not_impose_a_symmetry_that_poses_tell(finished, monkeypatch):
    """Held-out images as likely with it as without, and poses alike without it: nothing speaks for it."""
    flat = torch.linspace(-1, 1, len(finished.sample(1)))
    monkeypatch.setattr(OnlineEM, "log_likelihood", lambda self, chosen, grids: flat * self.volume.square().sum())
    false = SymmetryFinding("C2", torch.eye(3), torch.zeros(3), 0.9, ())
    assert finished.agreement().posed > 0.8
    test = finished.test_symmetry(false)
    assert abs(test.gain) < 2 * test.error
    assert test.agreement.posed > 0.6
    assert not test.allowed


@pytest.mark.parametrize("mirrored", [False, True])
def test_framed_poses_see_the_moved_map_as_the_old_poses_saw_the_old_one(mirrored, generator):
    volume = simulate_particles(phantom(), count=1, box=24, pixel_size=APIX, snr_db=None, seed=0).volume.data.float()
    rotation, shift = random_rotations(1, generator)[0], torch.tensor([0.7, -0.4, 0.5])
    motion = Agreement(rotation, shift, mirrored, torch.ones(3), 2, 0.0, 1.0, 1.0)
    poses = Poses(random_rotations(6, generator), torch.randn(6, 2, generator=generator))
    framed = motion.framed(poses)
    disk = fourier_disk(24, 6.0)
    old = slice_grid(slicing_grid(volume, 6.0), poses.rotations, disk) * phase_ramp(poses.shifts, disk)
    moved = move_volume(volume, rotation, shift, mirrored)
    new = slice_grid(slicing_grid(moved, 6.0), framed.rotations, disk) * phase_ramp(framed.shifts, disk)
    assert float((new - old).abs().max()) < 0.02 * float(old.abs().max())
