"""The Poisson likelihood of electron counts beside the Gaussian one of the same images at the same poses."""

import math

import numpy as np
import pytest
import torch
from small_stack import APIX, BOX, askew_group, symmetric_model
from torch import Tensor

from cryorbit.errors import CryorbitError
from cryorbit.methods.variational import Variational, VariationalConfig
from cryorbit.metrics.fsc import shell_sum
from cryorbit.physics.counts import count_log_likelihood
from cryorbit.physics.cryoem import form_images
from cryorbit.physics.fourier import shell_index, volume_to_fourier
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.atoms import AtomicModel
from cryorbit.simulate.particles import CTFSettings, SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import run

ONE = torch.eye(3)[None]


def counted(
    dose: float, contrast: float, count: int, *, source: AtomicModel | None = None, **options: object
) -> SimulatedParticles:
    return simulate_particles(
        source or phantom(radius=25.0, width=2.0),
        count=count,
        box=BOX,
        pixel_size=APIX,
        snr_db=10 * math.log10(dose * contrast**2),
        noise="poisson",
        dose=dose,
        shift_sigma_px=0.5,
        **options,
    )


def stack_of(truth: SimulatedParticles, part: slice = slice(None), radius: float = BOX / 2) -> FourierStack:
    ctf = None if truth.ctf is None else {k: v.double().numpy() for k, v in vars(truth.ctf[part]).items()}
    return FourierStack(ArrayParticles(truth.images[part].numpy(), APIX, ctf), radius, mask_diameter=70.0)


def fitted(
    stack: FourierStack,
    truth: SimulatedParticles,
    part: slice = slice(None),
    *,
    symmetry: Tensor = ONE,
    **settings: object,
) -> Variational:
    r, s = truth.poses.rotations[part], truth.poses.shifts[part] / APIX
    poses = PoseSamples(torch.arange(len(r)), r, s, torch.ones(len(r)))
    method = Variational(stack, VariationalConfig(batch=100, **settings), poses=poses, symmetry=symmetry)
    run(method)
    return method


def predicted(mean: Tensor, stack: FourierStack, truth: SimulatedParticles, part: slice) -> Tensor:
    """Clean images in electrons, as a map in the stack's units makes them."""
    slices = slice_grid(slicing_grid(mean, stack.disk.radius), truth.poses.rotations[part], stack.disk)
    indices = torch.arange(len(truth.images))[part]
    ctf = stack_of(truth).ctf(indices) if truth.ctf is not None else None
    return stack.to_raw(form_images(slices, truth.poses.shifts[part] / APIX, stack.disk, ctf))


def squared(map_: Tensor) -> Tensor:
    """Power per shell 1 .. BOX / 2 - 1."""
    return shell_sum(volume_to_fourier(map_).abs().square(), shell_index(BOX), BOX)[1 : BOX // 2]


def test_at_a_high_dose_it_is_the_gaussian_posterior() -> None:
    truth = counted(2000.0, 0.02, 400, seed=2)
    stack = stack_of(truth)
    expected = fitted(stack, truth, epochs=8)
    variance = expected.volume.variance.detach()
    whole = shell_sum(variance, shell_index(BOX), BOX)[1 : BOX // 2]
    for posterior in ("gaussian", "dirac"):
        found = fitted(stack, truth, likelihood="poisson", posterior=posterior, epochs=8)
        assert found.dose == pytest.approx(2000.0, rel=2e-3)
        apart = squared(found.tensors["mean"] - expected.tensors["mean"]) / whole
        assert float(apart[2:].max()) < 0.02  # of a posterior variance
        assert (
            float(apart[1]) < 0.2
        )  # the first two shells feel that the Gaussian takes off every image its own background
        if posterior == "gaussian":  # the noise of one is known, of the other learned
            own = shell_sum(found.volume.variance.detach(), shell_index(BOX), BOX)[1 : BOX // 2]
            assert float((own / whole - 1)[1:].abs().max()) < 0.08


@pytest.mark.parametrize("seed", [0, 1])
def test_at_a_strong_contrast_it_is_nearer_to_the_truth_and_predicts_better(seed: int) -> None:
    """Under the paper's prior, which leaves the map to the images."""
    truth = counted(1.0, 0.6, 900, seed=seed)
    seen, unseen = slice(0, 700), slice(700, None)
    stack = stack_of(truth, seen)
    clean = truth.volume.data * stack.scale
    off, held_out = {}, {}
    for kind in ("gaussian", "poisson"):
        mean = fitted(stack, truth, seen, likelihood=kind, prior="standard", epochs=8).tensors["mean"]
        off[kind] = float(squared(mean - clean).sum() / squared(clean).sum())
        excess = predicted(mean, stack, truth, unseen)
        held_out[kind] = float(count_log_likelihood(truth.images[unseen], excess, 1.0).sum(dim=(1, 2)).mean())
    best = (
        count_log_likelihood(truth.images[unseen], predicted(clean, stack, truth, unseen), 1.0).sum(dim=(1, 2)).mean()
    )
    assert off["poisson"] < 0.95 * off["gaussian"]
    assert held_out["gaussian"] < held_out["poisson"] < float(best)


def test_few_electrons_do_not_make_a_map_of_noise() -> None:
    """A tenth of an electron per pixel and a faint molecule: the map is better than none, under either likelihood."""
    truth = counted(0.1, 0.15, 500, seed=1)
    stack = stack_of(truth)
    clean = truth.volume.data * stack.scale
    for kind in ("gaussian", "poisson"):
        mean = fitted(stack, truth, likelihood=kind).tensors["mean"]
        assert float(squared(mean - clean).sum() / squared(clean).sum()) < 0.95


def test_ctf_and_images_larger_than_the_map() -> None:
    """Images of more pixels than their Fourier pixels need, with a CTF: both likelihoods see one map."""
    truth = counted(50.0, 0.1, 400, seed=4, ctf=CTFSettings())
    stack = stack_of(truth, radius=6.0)
    assert stack.box < BOX
    gaussian, poisson = (fitted(stack, truth, likelihood=kind).tensors["mean"] for kind in ("gaussian", "poisson"))
    index = shell_index(stack.box)
    power = [
        shell_sum(volume_to_fourier(x).abs().square(), index, stack.box)[2:6] for x in (poisson - gaussian, gaussian)
    ]
    assert float((power[0] / power[1]).max()) < 0.02


def test_under_a_point_group_one_pass_is_nearly_the_answer() -> None:
    group = askew_group("C7")
    truth = counted(10.0, 0.1, 300, seed=5, source=symmetric_model(group))
    stack = stack_of(truth)
    one, many = (
        fitted(stack, truth, symmetry=group, likelihood="poisson", epochs=epochs).tensors["mean"] for epochs in (1, 6)
    )
    clean = truth.volume.data * stack.scale
    off = [float(squared(mean - clean).sum() / squared(clean).sum()) for mean in (one, many)]
    assert off[0] < 1.05 * off[1] < 0.105


def refused(images: Tensor, groups: int = 1, likelihood: str = "poisson") -> CryorbitError:
    group = np.arange(len(images)) % groups
    stack = FourierStack(ArrayParticles(images.numpy(), APIX, None, group), 8.0, mask_diameter=40.0)
    poses = PoseSamples(
        torch.arange(len(images)), ONE.repeat(len(images), 1, 1), torch.zeros(len(images), 2), torch.ones(len(images))
    )
    with pytest.raises(CryorbitError) as caught:
        Variational(stack, VariationalConfig(likelihood=likelihood), poses=poses, symmetry=ONE)
    return caught.value


def test_what_is_no_count_is_refused(generator: torch.Generator) -> None:
    counts = torch.poisson(torch.full((600, 16, 16), 2.0), generator=generator)
    assert refused(counts, likelihood="binomial").code == "CONF106"
    assert refused(counts, groups=2).code == "CONF116"
    assert refused(torch.zeros(600, 16, 16)).code == "DATA121"
    counts[555, 3, 3] = -1.0
    found = refused(counts)
    assert found.message == "image 556 has a pixel of -1, expected counts: 0, 1, 2, ..."
    assert 'likelihood = "gaussian"' in found.hint
    counts[555, 3, 3] = 0.5
    assert refused(counts).code == "DATA120"
