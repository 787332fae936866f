"""Contracts over the registry of methods: same seed same result, resume equals uninterrupted, finite, poses in SO(3)."""

import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from cryorbit.errors import RunError
from cryorbit.groups.so2 import SO2
from cryorbit.groups.so3 import healpix_grid, random_rotations
from cryorbit.methods.amortized import from_starts
from cryorbit.methods.registry import METHODS, method
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.pictures import TurnedPictures
from cryorbit.training.checkpoint import in_use, load_checkpoint, save_checkpoint
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.training.loop import Method, run

APIX, DIAMETER = 5.0, 70.0
SWITCHES: dict[str, dict[str, object]] = {
    "d4": {"copies": "d4", "augmented": False, "polar": False},
    "square": {"polar": False, "copies": "c2"},
    "gauss-newton": {"gauss_newton": 1, "gauss_newton_from": 0.3},
    "neural": {"volume": "neural", "field_width": 16},
    "elbo": {"objective": "elbo"},
    "starts": {"starts": 2, "trial": 0.5},
}  # of the autoencoder
CASES = [
    *METHODS,
    "refine neural",
    "variational poisson",
    *(f"amortized {name}" for name in SWITCHES),
]  # a method, and what is not its default

UNCHECKED = ("at_pairing", "correlation")  # numbers of the ab initio engine as a whole
OPTIONAL = ("adam", "critic_adam", "optimiser")  # averages that begin with the first step


@pytest.fixture(scope="module", params=[16, 17], ids=["even", "odd"])
def truth(request: pytest.FixtureRequest) -> SimulatedParticles:
    return simulate_particles(phantom(), count=60, box=request.param, pixel_size=APIX, snr_db=3.0, seed=1)


def build(case: str, truth: SimulatedParticles, seed: int = 0) -> Method:
    name, _, switch = case.partition(" ")
    cls, config = method(name)
    if switch == "poisson":
        known = {"count": 60, "box": truth.volume.box, "pixel_size": APIX, "snr_db": 0.0, "seed": 1}
        truth = simulate_particles(phantom(), noise="poisson", dose=2.0, **known)
    particles = ArrayParticles(truth.images.numpy(), APIX)
    stack = FourierStack(particles, truth.volume.box / 2, mask_diameter=DIAMETER)
    half = torch.arange(60) % 2 + 1
    common = {"mask_diameter": DIAMETER, "symmetry": torch.eye(3)[None], "half_set": half}
    if name == "abinitio":
        return cls(stack, config(batch=20, order=1, march_steps=4, settle_steps=2, heats=1), seed=seed, **common)
    if name == "refine":
        generator = torch.Generator().manual_seed(seed)
        candidates = (random_rotations(120, generator).view(60, 2, 3, 3), torch.zeros(60, 2, 2))
        start = (truth.volume.data, truth.volume.data)
        settings = config(sweeps=3, iterations=2, field_width=16, field_steps=5)
        kind = {"volume": switch} if switch else {}
        return cls(stack, settings, start=start, radius=5, candidates=candidates, **common, **kind)
    if name == "align2d":
        settings = config(classes=2, batch=20, march_steps=4, settle_steps=2)
        return cls(stack, settings, mask_diameter=DIAMETER, seed=seed)
    if name == "averages":
        generator = torch.Generator().manual_seed(seed)
        posed = {"which": torch.arange(60) % 2, "angles": SO2().random(60, generator), "shifts_px": torch.zeros(60, 2)}
        return cls(stack, config(sweeps=2), classes=2, half_set=half, mask_diameter=DIAMETER, **posed)
    if name == "invariant":
        settings = config(epochs=2, batch=32, latent=4, critic=1.0)
        return cls(TurnedPictures(truth.images, noise=0.1), settings, seed=seed)
    if name == "spatial-vae":
        return cls(TurnedPictures(truth.images, noise=0.1), config(epochs=2, batch=32, latent=4, units=8), seed=seed)
    if name == "particle-pictures":
        return cls(stack, config(latent=2, steps=6, batch=20), mask_diameter=DIAMETER, seed=seed)
    if name == "variational":
        poses = PoseSamples(torch.arange(60), truth.poses.rotations, truth.poses.shifts / APIX, torch.ones(60))
        settings = config(epochs=2, batch=25, likelihood=switch or "gaussian")
        return cls(stack, settings, poses=poses, symmetry=common["symmetry"], seed=seed)
    if name in ("amortized", "ad", "tomo"):
        given = {"poses": truth.poses} if name == "tomo" else {}
        own = {"side": 16, "heads": 2} if name == "amortized" else {}
        settings = config(steps=6, batch=25, **own, **SWITCHES.get(switch, {}))
        made = from_starts if switch == "starts" else cls
        return made(stack, settings, mask_diameter=DIAMETER, seed=seed, **given)
    raise AssertionError(f"tests/contracts/test_methods.py builds no {name}: add it")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(truth: SimulatedParticles) -> Callable[[str], dict[str, torch.Tensor]]:
    """State at the end of an uninterrupted run of a case; each is run once."""

    @cache
    def state(case: str) -> dict[str, torch.Tensor]:
        made = build(case, truth)
        run(made)
        return {name: value.clone() for name, value in made.state().items()}

    return state


def begun(case: str, truth: SimulatedParticles, seed: int = 0) -> Method:
    """A case after two steps."""
    made = build(case, truth, seed)
    for index in range(2):
        made.step(index)
    return made


@pytest.mark.parametrize("name", CASES)
def test_same_seed_same_result_other_seed_other(name, truth, whole):
    again = build(name, truth)
    run(again)
    assert equal(whole(name), again.state())
    assert not equal(begun(name, truth).state(), begun(name, truth, seed=5).state())


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_equals_uninterrupted(name, truth, whole, tmp_path: Path):
    part = begun(name, truth)
    save_checkpoint(tmp_path / "c", part.state(), {"fingerprint": "", "stage": part.name, "next_step": 2})
    resumed = build(name, truth)
    run(resumed, checkpoint=tmp_path / "c")
    assert equal(whole(name), resumed.state())
    assert equal(load_checkpoint(tmp_path / "c")[0], whole(name))


@pytest.mark.parametrize("name", CASES)
def test_state_is_finite_and_rotations_are_rotations(name, whole):
    for key, value in whole(name).items():
        if not key.endswith("likelihood"):  # of a run that was never compared: minus infinity
            assert torch.isfinite(torch.view_as_real(value) if value.is_complex() else value.to(torch.float32)).all(), (
                key
            )
    if "rotations" in whole(name):
        r = whole(name)["rotations"]
        torch.testing.assert_close(r @ r.mT, torch.eye(3).expand_as(r), atol=1e-5, rtol=0)
        assert (torch.linalg.det(r) > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_tensors_that_are_missing_or_cut_are_refused(name, truth, whole, tmp_path: Path):
    sound, made = whole(name), build(name, truth)
    own = [
        k
        for k in sound
        if not re.sub(r"^start\d\.", "", k).startswith(OPTIONAL) and not k.endswith("num_batches_tracked")
    ]  # optional for torch
    assert own
    for key in own:
        rest = {k: v for k, v in sound.items() if k != key}
        cut = [rest | {key: sound[key][:-1]}] if sound[key].ndim and key not in UNCHECKED else []
        for damaged in (rest, *cut):
            with pytest.raises(RunError, match=f"RUN013: {tmp_path} does not fit"), in_use(tmp_path):
                made.load_state(damaged)


@pytest.mark.parametrize("name", METHODS)
def test_config_survives_toml(name):
    import tomllib

    import tomli_w

    from cryorbit.pipeline.config import from_dict

    _, config = method(name)
    assert from_dict(config, tomllib.loads(tomli_w.dumps(asdict(config())))) == config()


def test_grid_used_by_the_engine_is_uniform():
    grid = healpix_grid(1)
    torch.testing.assert_close(grid.mean(dim=0), torch.zeros(3, 3), atol=1e-6, rtol=0)
