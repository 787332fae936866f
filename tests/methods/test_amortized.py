"""The autoencoder and its yardsticks: maps at known poses, what the symmetrised loss follows, teaching of a known structure, and refusals."""

import dataclasses
import math

import pytest
import torch

from cryorbit.errors import ConfigError, RunError
from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.methods.amortized import Amortized, TablePoses, Tomo, from_starts
from cryorbit.methods.amortized_config import AmortizedConfig, DecoderConfig, TableConfig, checked
from cryorbit.methods.distillation import Distillation, DistillationConfig, Structure
from cryorbit.methods.pose_objectives import Observed, best_candidate, evidence_bound, refined_candidate
from cryorbit.methods.starts import Starts
from cryorbit.metrics.align import align_poses
from cryorbit.metrics.fsc import fsc
from cryorbit.physics.copies import Copies
from cryorbit.physics.slicing import slicing_grid
from cryorbit.pipeline.config import RunConfig, check, preset
from cryorbit.poses.density import log_mixture
from cryorbit.poses.encoder import EncodedPoses
from cryorbit.poses.posterior import PosePosterior
from cryorbit.poses.table import refine_poses
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.checkpoint import in_use, save_checkpoint
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run
from cryorbit.types import Poses

APIX, DIAMETER = 5.0, 70.0
EYE = torch.eye(3)[None]


@pytest.fixture(scope="module")
def truth() -> SimulatedParticles:
    return simulate_particles(phantom(), count=300, box=16, pixel_size=APIX, snr_db=6.0, seed=3)


@pytest.fixture(scope="module")
def stack(truth: SimulatedParticles) -> FourierStack:
    return FourierStack(ArrayParticles(truth.images.numpy(), APIX), 8.0, mask_diameter=DIAMETER)


def test_known_poses_give_the_map(truth, stack):
    method = Tomo(stack, DecoderConfig(steps=80, batch=40), poses=truth.poses, mask_diameter=DIAMETER)
    run(method)
    assert method.radius(0) == 5
    assert method.radius(79) == 8
    assert float(fsc(method.map(), truth.volume.data)[1:6].min()) > 0.95


def test_an_imposed_symmetry_averages_the_map_over_its_group(truth, stack):
    group = point_group("C2").float()
    method = Tomo(stack, DecoderConfig(steps=160, batch=40), poses=truth.poses, mask_diameter=DIAMETER, symmetry=group)
    run(method)
    turned = truth.volume.data.flip(1, 2).roll((1, 1), dims=(1, 2))
    averaged = 0.5 * (truth.volume.data + turned)
    assert float(fsc(method.map(), averaged)[1:6].min()) > 0.9
    assert float(fsc(method.map(), averaged)[1:6].mean() - fsc(method.map(), truth.volume.data)[1:6].mean()) > 0.1


def test_known_poses_give_the_map_to_a_neural_field_too(truth, stack):
    config = DecoderConfig(steps=160, batch=40, volume="neural", field_width=32)
    method = Tomo(stack, config, poses=truth.poses, mask_diameter=DIAMETER)
    run(method)
    assert float(fsc(method.map(), truth.volume.data)[1:6].min()) > 0.9


def test_a_table_of_almost_true_poses_moves_towards_them(truth, stack):
    method = TablePoses(stack, TableConfig(steps=120, batch=60), mask_diameter=DIAMETER)
    turn = so3.exp(0.25 * torch.randn(300, 3, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        method.table.weight.copy_((turn @ truth.poses.rotations)[:, :2].flatten(1))

    def error() -> float:
        found = method.poses(torch.arange(300))
        return float(align_poses(Poses(found.rotations.double(), found.shifts.double()), truth.poses).error.median())

    before = error()
    run(method)
    assert error() < 0.4 * before


@torch.no_grad()
@pytest.mark.parametrize("name", ["c2", "c4", "d4"])
def test_what_is_proposed_turns_with_the_image(stack, name):
    """The candidates of a copy are those of the image, moved, in another order: so are the losses, and the pose that is followed."""
    config = AmortizedConfig(steps=2, batch=20, side=16, bfloat16=False, polar=False, copies=name, augmented=False)
    method = Amortized(stack, config, mask_diameter=DIAMETER)
    chosen = torch.arange(12)
    images, ctf = stack.images(chosen), stack.ctf(chosen)
    copies = Copies.of(name, stack.disk)
    method.encoder.eval()
    one = method._proposed(chosen, images, ctf)
    for which, move in enumerate(copies.moves):
        other = method._proposed(chosen, copies.images(images, torch.full((12,), which)), ctf)
        expected, moved = move @ one.rotations, (move[:2, :2] @ one.shifts[..., None])[..., 0]
        apart = (other.rotations[:, :, None] - expected[:, None]).abs().amax(dim=(-2, -1))
        same = apart.argmin(dim=2)
        assert torch.equal(same.sort(dim=1).values, torch.arange(same.shape[1]).expand_as(same))
        assert float(apart.amin(dim=2).max()) < 1e-5
        torch.testing.assert_close(other.shifts, moved.gather(1, same[..., None].expand(-1, -1, 2)), atol=1e-5, rtol=0)
        torch.testing.assert_close(other.log_weight, one.log_weight.gather(1, same), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_network_that_sees_one_copy_does_not_turn_with_the_image(stack):
    method = Amortized(stack, AmortizedConfig(side=16, bfloat16=False, polar=False), mask_diameter=DIAMETER)
    chosen, copies = torch.arange(12), Copies.of("c4", stack.disk)
    images, ctf = stack.images(chosen), stack.ctf(chosen)
    method.encoder.eval()
    one, other = (method._proposed(chosen, copies.images(images, torch.full((12,), w)), ctf) for w in (0, 1))
    assert float(so3.distance(other.rotations, copies.moves[1] @ one.rotations).median()) > 0.3


@torch.no_grad()
def test_drawn_copies_propose_poses_of_the_image_itself(stack):
    """An encoder whose candidates turn with the image proposes the same ones, whatever copy is drawn."""
    config = AmortizedConfig(steps=2, batch=20, side=16, bfloat16=False, polar=False, copies="c4")
    method = Amortized(stack, config, mask_diameter=DIAMETER)
    method.moved = Copies.of("c4", method.encoder.view.disk)
    chosen = torch.arange(12)
    images, ctf = stack.images(chosen), stack.ctf(chosen)
    method.encoder.eval()
    plain, drawn = (method._proposed(chosen, images, ctf, g) for g in (None, torch.Generator().manual_seed(1)))
    apart = (drawn.rotations[:, :, None] - plain.rotations[:, None]).abs().amax(dim=(-2, -1)).amin(dim=2)
    assert float(apart.max()) < 1e-5
    assert not torch.equal(drawn.rotations, plain.rotations)


def observed(
    truth: SimulatedParticles, stack: FourierStack, count: int, volume: torch.Tensor | None = None
) -> Observed:
    """The first images beside the map they were drawn from, or another."""
    chosen, disk = torch.arange(count), stack.disk
    grid = slicing_grid(truth.volume.data * stack.scale if volume is None else volume, disk.radius)
    noise = (16 * stack.scale) ** 2 * truth.noise_variance
    weight = disk.weight / disk.weight.sum() / noise
    return Observed(grid, stack.images(chosen), stack.ctf(chosen), weight, disk)


def candidates(rotations: torch.Tensor) -> EncodedPoses:
    """Unshifted and equally likely, as leaves that take gradients."""
    shape = rotations.shape[:2]
    weight = torch.zeros(shape).log_softmax(dim=1).requires_grad_()
    shifts, concentration = torch.zeros(*shape, 2).requires_grad_(), torch.full(shape, 20.0).requires_grad_()
    return EncodedPoses(rotations.clone().requires_grad_(), shifts, weight, concentration)


def test_only_the_best_head_is_followed_and_its_weight_grows(truth, stack):
    right = truth.poses.rotations[:2]
    wrong = [so3.exp(torch.tensor([[0.0, angle, 0.3]])) @ right for angle in (1.0, 2.0)]
    rotations = torch.stack(
        [torch.stack([wrong[0][0], right[0], wrong[1][0]]), torch.stack([right[1], *(w[1] for w in wrong)])]
    )
    seen, found = observed(truth, stack, 2), candidates(rotations)
    loss, left = best_candidate(seen, found)
    loss.backward()
    best = torch.tensor([1, 0])
    moved = found.rotations.grad.flatten(2).norm(dim=2) > 0
    assert torch.equal(moved, torch.tensor([[False, True, False], [True, False, False]]))
    assert (found.log_weight.grad[[0, 1], best] < 0).all()
    expected = seen.squares(right[:, None], torch.zeros(2, 1, 2))[:, 0].mean(dim=0)
    torch.testing.assert_close(left, expected)


def test_map_follows_the_refined_pose_and_candidates_are_taught_it(truth, stack):
    """Each gradient is that of its own objective at the poses of a Gauss-Newton step, and of nothing else."""
    turn = so3.exp(torch.tensor([[0.0, 0.15, 0.1], [0.2, 0.0, -1.0]]))
    rotations = turn @ truth.poses.rotations[:6, None]
    volume = (truth.volume.data * stack.scale).requires_grad_()
    seen, found = observed(truth, stack, 6, volume), candidates(rotations)
    loss, left = refined_candidate(seen, found, steps=1, fit_shift=True, shift_sd=0.5)
    loss.backward()
    precision = seen.weight * seen.disk.weight.sum()
    start = (rotations[:, 0], torch.zeros(6, 2))
    refined = refine_poses(seen.grid, seen.images, seen.ctf, precision, *start, seen.disk, iterations=1, shift_only=0)[
        :2
    ]
    again = volume.detach().requires_grad_()
    squares = observed(truth, stack, 6, again).squares(refined[0][:, None], refined[1][:, None])
    seen.losses(squares).mean().backward()
    torch.testing.assert_close(volume.grad, again.grad)
    torch.testing.assert_close(left, squares[:, 0].mean(dim=0).detach())
    same = candidates(rotations)
    (-log_mixture(same, *refined, EYE, 0.5).mean()).backward()
    for name in ("rotations", "shifts", "log_weight", "concentration"):
        torch.testing.assert_close(getattr(found, name).grad, getattr(same, name).grad)
    error = [so3.distance(r, truth.poses.rotations[:6]).median() for r in (start[0], refined[0])]
    assert float(error[1]) < 0.5 * float(error[0])


def test_bound_is_below_the_evidence_and_near_it_for_a_posterior_that_fits(truth, stack):
    """Evidence by a sum over a grid of all rotations, in noise where a pose is known to some 20 degrees."""
    seen = observed(truth, stack, 4)
    seen = dataclasses.replace(seen, weight=0.03 * seen.weight)
    pixels = 0.5 * seen.disk.weight.sum()
    grid = so3.healpix_grid(2)
    with torch.no_grad():
        scores = -pixels * torch.cat(
            [seen.losses(seen.squares(r.expand(4, -1, 3, 3), torch.zeros(4, len(r), 2))) for r in grid.split(512)],
            dim=1,
        )
    evidence = scores.logsumexp(dim=1) - math.log(len(grid))
    mode = grid[scores.argmax(dim=1)][:, None]

    def bound(rotations: torch.Tensor, concentration: float) -> float:
        found = dataclasses.replace(candidates(rotations), concentration=torch.full((4, 1), concentration))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            every = [evidence_bound(seen, found, copies=1, generator=generator)[0] for _ in range(100)]
        return -float(pixels * torch.stack(every).mean())

    best = max(bound(mode, x) for x in (25.0, 50.0))
    assert best < float(evidence.mean()) + 0.02
    assert best > float(evidence.mean()) - 1.0
    assert bound(mode, 0.1) < best - 2.0
    assert bound(mode, 2000.0) < best - 2.0
    assert bound(so3.exp(torch.tensor([0.0, 1.5, 0.0])) @ mode, 50.0) < best - 2.0


def test_bound_moves_everything_and_takes_the_better_copy(truth, stack):
    right = truth.poses.rotations[:3]
    wrong = so3.exp(torch.tensor([0.0, 2.0, 0.0])) @ right
    volume = (truth.volume.data * stack.scale).requires_grad_()
    seen, found = observed(truth, stack, 3, volume), candidates(torch.stack([wrong, wrong, right, wrong], dim=1))
    found = dataclasses.replace(found, log_weight=(found.log_weight.detach() + math.log(2)).requires_grad_())
    evidence_bound(seen, found, copies=2, generator=torch.Generator().manual_seed(0))[0].backward()
    for name in ("rotations", "log_weight", "concentration"):
        gradient = getattr(found, name).grad.flatten(2) if name == "rotations" else getattr(found, name).grad[..., None]
        assert torch.equal(gradient.norm(dim=2) > 0, torch.tensor([[False, False, True, True]]).expand(3, 4)), name
    assert (found.log_weight.grad[:, 2] < found.log_weight.grad[:, 3]).all()
    assert float(volume.grad.norm()) > 0


def test_every_image_is_shown_once_in_a_pass(stack):
    members = torch.arange(10, 80)
    method = Tomo(
        stack, DecoderConfig(batch=14), poses=Poses(EYE, torch.zeros(1, 2)), mask_diameter=DIAMETER, members=members
    )
    assert torch.equal(torch.cat([method._batch(i) for i in range(5)]).sort().values, members)
    method = Tomo(
        stack, DecoderConfig(batch=15), poses=Poses(EYE, torch.zeros(1, 2)), mask_diameter=DIAMETER, members=members
    )
    shown = torch.cat([method._batch(i) for i in range(14)])
    assert (torch.bincount(shown, minlength=80)[10:] == 3).all()


def several(stack: FourierStack, count: int, steps: int = 8) -> Starts[Amortized]:
    config = AmortizedConfig(steps=steps, batch=25, heads=1, starts=count, trial=0.5)
    return from_starts(stack, config, mask_diameter=DIAMETER, seed=3)


def test_the_start_that_leaves_least_unexplained_goes_on_alone(stack):
    method = several(stack, 3)
    assert method.total_steps() == 16
    each = [method.begun(number) for number in range(3)]
    shown = [[one._batch(i) for i in range(4)] for one in each]
    assert all(torch.equal(a, b) for other in shown[1:] for a, b in zip(shown[0], other, strict=True))
    maps, networks = zip(*((one.map(), one.encoder.network.last.weight) for one in each), strict=True)
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(networks[0], networks[1])
    left = []
    for start in range(3):
        left.append([float(method.step(4 * start + inner)["unexplained"]) for inner in range(4)])
        assert len(method.starts) <= 2
    least = min(range(3), key=lambda start: sum(left[start][2:]))
    assert method.chosen == least
    assert max(sum(one[2:]) for one in left) > 1.0001 * sum(left[least][2:])
    before = method.best.map()
    assert {method.step(12)["start"], method.step(13)["start"]} == {str(least)}
    assert list(method.starts) == [least]
    assert not torch.equal(before, method.best.map())


def test_one_start_is_the_method_itself(stack):
    method, plain = several(stack, 1), several(stack, 1).begun(0)
    run(method)
    run(plain)
    assert torch.equal(method.best.map(), plain.map())


@pytest.fixture(scope="module")
def whole(stack: FourierStack) -> Starts[Amortized]:
    method = several(stack, 2)
    run(method)
    return method


@pytest.mark.parametrize("stopped", [1, 4, 6, 8, 9])
def test_starts_go_on_where_they_stopped(stack, whole, stopped, tmp_path):
    part, resumed = several(stack, 2), several(stack, 2)
    for index in range(stopped):
        part.step(index)
    save_checkpoint(tmp_path / "c", part.state(), {"fingerprint": "", "stage": part.name, "next_step": stopped})
    run(resumed, checkpoint=tmp_path / "c")
    assert torch.equal(resumed.best.map(), whole.best.map())
    assert torch.equal(resumed.unexplained, whole.unexplained)


@pytest.mark.parametrize("damage", ["hole", "infinite", "no starts", "not the best"])
def test_trials_that_do_not_fit_are_refused(stack, damage, tmp_path):
    method, again = several(stack, 2), several(stack, 2)
    for index in range(6):
        method.step(index)
    state = {name: value.clone() for name, value in method.state().items()}
    if damage in ("hole", "infinite"):
        state["unexplained"][0, 1] = math.nan if damage == "hole" else math.inf
    else:
        gone = "start" if damage == "no starts" else "start0."
        state = {name: value for name, value in state.items() if not name.startswith(gone)}
    with pytest.raises(RunError, match=r"RUN013: .*do not fit their trials"), in_use(tmp_path):
        again.load_state(state)


def structure(truth: SimulatedParticles, stack: FourierStack) -> Structure:
    noise = torch.full((9,), (16 * stack.scale) ** 2 * truth.noise_variance)
    return Structure(truth.volume.data * stack.scale, noise, EYE, shift_sd=0.0, strength_sd=0.0)


def known_posterior(truth: SimulatedParticles) -> PosePosterior:
    covariance = 1e-4 * torch.eye(5).expand(300, 1, 5, 5)
    return PosePosterior(truth.poses.rotations[:, None], torch.zeros(300, 1, 2), torch.ones(300, 1), covariance)


def teaching(truth: SimulatedParticles, stack: FourierStack, config: DistillationConfig, shown: int) -> Distillation:
    """Of the first images, whose poses are known; the others are never shown."""
    return Distillation(
        stack,
        config,
        structure=structure(truth, stack),
        posterior=known_posterior(truth),
        members=torch.arange(shown),
        mask_diameter=DIAMETER,
    )


def test_drawn_images_have_the_power_and_the_noise_of_real_ones(truth, stack):
    method = teaching(truth, stack, DistillationConfig(side=16), 300)
    drawn = method.draw(300, torch.Generator().manual_seed(0))[0]
    real = method._real(300, torch.Generator().manual_seed(0))[0]
    powers = [x[:, method.disk.shell > 0].abs().square().mean(dim=0) for x in (drawn, real)]
    shell = method.disk.shell[method.disk.shell > 0]
    for k in range(1, 7):
        first, second = (float(p[shell == k].mean()) for p in powers)
        assert first == pytest.approx(second, rel=0.2), k


def test_an_encoder_knows_more_of_images_it_never_saw_than_chance(truth, stack):
    config = DistillationConfig(steps=70, batch=40, side=16, heads=2, synthetic=0.5)
    method = teaching(truth, stack, config, 200)
    run(method)
    chosen = torch.arange(200, 300)  # never shown
    with torch.no_grad():
        found = method.encoder.eval()((stack.images(chosen) * stack.ctf(chosen))[:, method.columns])
    right, dealt = (truth.poses.rotations[rows] for rows in (chosen, chosen.roll(1)))
    known, chance = (log_mixture(found, r, torch.zeros(100, 2), EYE, 1.0).mean() for r in (right, dealt))
    assert float(known) > float(chance) + 0.3


def test_teaching_ends_with_the_likelihood_of_the_images(truth, stack):
    """The last steps differ from those of teaching alone, and leave less of unseen images unexplained at the best candidate."""
    steps, chosen, methods = 60, torch.arange(200, 300), []
    for share in (0.0, 0.5):
        config = DistillationConfig(steps=steps, batch=40, side=16, heads=2, synthetic=0.5, end_to_end=share)
        methods.append(teaching(truth, stack, config, 200))
    losses = [[float(method.step(index)["loss"]) for index in range(steps)] for method in methods]
    assert losses[0][:30] == losses[1][:30]
    assert losses[1][30] > losses[0][30] + 10  # half of the squared residuals over the noise, of some hundred pixels
    left = []
    for method in methods:
        images, ctf = (x[:, method.columns] for x in (stack.images(chosen), stack.ctf(chosen)))
        seen = Observed(method.grid, images, ctf, method.disk.weight / method.variance, method.disk)
        with torch.no_grad():
            found = method.encoder.eval()(images * ctf)
            left.append(float(seen.losses(seen.squares(found.rotations, found.shifts)).min(dim=1).values.mean()))
    assert left[1] < left[0]


@pytest.mark.parametrize(
    "change",
    [
        {"likelihood": "huber"},
        {"heads": 0},
        {"parametrisation": "axis"},
        {"side": 5},
        {"batch": 1},
        {"march": 2.0},
        {"copies": "c3"},
        {"gauss_newton": -1},
        {"gauss_newton_from": 1.0},
        {"field_rate": 0.0},
        {"objective": "iwae"},
        {"starts": 0},
        {"trial": 0.0},
    ],
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ConfigError, match="CONF502"):
        checked(dataclasses.replace(AmortizedConfig(), **change))
    with pytest.raises(ConfigError, match="CONF502"):
        check(dataclasses.replace(RunConfig(particles="x"), amortized=dataclasses.replace(AmortizedConfig(), **change)))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("CONF031", {"volume": "gaussian"}),
        ("CONF505", {"copies": "d4"}),
        ("CONF506", {"objective": "elbo", "likelihood": "l2"}),
        ("CONF507", {"objective": "elbo", "gauss_newton": 1}),
        ("CONF508", {"copies": "c2"}),
        ("CONF508", {"copies": "d4", "augmented": False}),
    ],
)
def test_settings_of_which_one_leaves_the_other_nothing_to_do_are_refused(code, change):
    with pytest.raises(ConfigError, match=code):
        checked(dataclasses.replace(AmortizedConfig(), **change))


def test_the_printed_model_goes_by_name():
    made = preset(RunConfig(particles="x", preset="paper001"))
    assert made.method == "amortized"
    c = made.amortized
    assert (c.steps, c.batch, c.likelihood, c.heads, c.normalised, c.he) == (10_000, 32, "l2", 1, False, False)
    check(dataclasses.replace(made, symmetry="C4"))
    with pytest.raises(ConfigError, match="CONF016"):
        check(dataclasses.replace(made, method="search"))
    for change in ({"synthetic": 1.5}, {"end_to_end": -0.1}):
        with pytest.raises(ConfigError, match="CONF510"):
            DistillationConfig(**change)
