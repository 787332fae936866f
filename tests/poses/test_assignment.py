"""Poses under a known map: a proposal that is near comes nearer, a search needs none, and strength tells right from wrong."""

import pytest
import torch
from torch import nn

from cryorbit.groups import so3
from cryorbit.methods.online_em import rotation_grid
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import fourier_disk, images_to_disk
from cryorbit.poses.assignment import Assigned, Assigner
from cryorbit.poses.encoder import EncodedPoses, PoseEncoder, View
from cryorbit.simulate.particles import simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings

BOX, APIX, COUNT = 24, 4.0, 40
DISK = fourier_disk(BOX, BOX / 2)
EYE = torch.eye(3)[None]


class Near(PoseEncoder):
    """Stands for an encoder: the second of two candidates is near the truth, the first anywhere and thought as likely."""

    view = View.around(DISK, 16, 70.0 / APIX)

    def __init__(self, rotations: torch.Tensor, shifts: torch.Tensor) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(0)
        near = so3.exp(0.06 * torch.randn(COUNT, 3, generator=generator)) @ rotations
        self.rotations = torch.stack([so3.random_rotations(COUNT, generator), near], dim=1)
        self.shifts = shifts[:, None].expand(-1, 2, -1) + 0.3

    def forward(self, values: torch.Tensor) -> EncodedPoses:
        same = torch.zeros(COUNT, 2)
        return EncodedPoses(self.rotations, self.shifts, same - same.exp().sum(1, keepdim=True).log(), same + 100)


@pytest.fixture(scope="module")
def case():
    truth = simulate_particles(
        phantom(width=3.0),
        count=COUNT,
        box=BOX,
        pixel_size=APIX,
        snr_db=3.0,
        ctf=CTFSettings(),
        shift_sigma_px=0.7,
        seed=2,
    )
    images = images_to_disk(truth.images, DISK)
    ctf = ctf_on_disk(truth.ctf, DISK, APIX)
    noise = torch.full((BOX,), float(BOX**2))
    shifts = truth.poses.shifts / APIX

    def made(steps: int) -> Assigner:
        return Assigner(
            Near(truth.poses.rotations, shifts),
            truth.volume.data,
            noise,
            DISK,
            coarse=8.0,
            fine=11.0,
            grid=rotation_grid(1, EYE),
            spacing=so3.grid_spacing(1),
            shift_sd=0.7,
            steps=steps,
        )

    return truth, images, ctf, made


def error(found: Assigned, truth: object) -> torch.Tensor:
    return torch.rad2deg(so3.distance(found.rotations, truth.poses.rotations))


def test_the_likelier_candidate_is_taken_and_steps_bring_it_nearer(case):
    truth, images, ctf, made = case
    errors = [float(error(made(steps).encoded(images, ctf), truth).median()) for steps in (0, 1, 3)]
    assert 3.0 < errors[0] < 8.0
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] <= errors[1] + 0.1
    found = made(3).encoded(images, ctf)
    assert float((found.shifts - truth.poses.shifts / APIX).norm(dim=1).median()) < 0.2
    assert float(found.strength.median()) == pytest.approx(1.0, abs=0.1)
    assert torch.isfinite(found.features).all()


def test_spread_is_the_error_that_is_to_be_expected(case):
    truth, images, ctf, made = case
    found = made(6).encoded(images, ctf)
    wrong = torch.deg2rad(error(found, truth)).square().mean().sqrt() / found.spread[:, 0].square().mean().sqrt()
    assert 0.6 < float(wrong) < 1.6


def test_search_finds_poses_without_a_proposal(case):
    truth, images, ctf, made = case
    found = made(2).searched(images, ctf)
    assert float((error(found, truth) < 10).double().mean()) > 0.8  # some images are turned over: a grid of 30 degrees
    astray = made(2)._refined(images, ctf, so3.random_rotations(COUNT, torch.Generator().manual_seed(5)), found.shifts)
    assert float(astray.strength.median()) < 0.9 * float(found.strength.median())


def test_replaced_rows_are_those_of_the_other(case):
    _, images, ctf, made = case
    one, other = made(1).encoded(images, ctf), made(2).searched(images, ctf)
    rows = torch.arange(COUNT) % 3 == 0
    part = Assigned(**{k: v[rows] for k, v in vars(other).items()})
    mixed = one.replaced(rows, part)
    assert torch.equal(mixed.rotations[rows], other.rotations[rows])
    assert torch.equal(mixed.rotations[~rows], one.rotations[~rows])
    assert torch.equal(mixed.features, one.features)
    assert len(Assigned.joined([one, mixed]).strength) == 2 * COUNT
