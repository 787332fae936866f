"""A learned prior for maps from moments: train a network on random molecules, then invert moments of molecules and of what is none.

    python benchmarks/reproduce/paper003/prior.py ../shared/data --weights prior.safetensors --json benchmarks/results/paper003_prior.json

Training draws its molecules (``simulate/proteins.py``) from --seed; a stopped run goes on from --weights. Then each case, 32^3 voxels, 9 rings,
views as in images.py, moments exact over the 4000 views unless the case says images:

* protein: random molecules that the training has not seen, one set of views each;
* 4ake, 1igy, 1aon: models, the farthest atom of the last two at 0.8 of the ball; "4ake, images": from 100,000 images at SNR 1; "CTF": with
  defocus uniform in 0.8 to 2 um; "shifts": of sigma 1 px (3.2 A), left in the images, and known ("blurred": not);
* gaussians: four, as in images.py: unlike the training;
* turned: 4AKE with each degree of its harmonics turned by itself: same support, power and autocorrelation on every shell, no molecule;
* noise: white noise in the ball with the shells' power of 4AKE.

Compared are the network's map (the head of the least objective at its best density), the best of all heads' maps after L-BFGS (``invert_from``;
again by the objective), and the best of ten random starts. ``weighed``: of images, the heads' maps after L-BFGS once more, entries over their
variance (``MomentsConfig.tolerance``). ``likeness`` is the best correlation with any molecule of the training, over rotations and hands: a map
like them where the truth is not is made up (a search of minutes, left out for images). ``unlike_training`` is the size of the network's inputs
(below 1 for most that is like the training).

--only-third: every case from images, with third moments through --filters, no penalty on negative density; every head's map a little way, then
the one of the least objective to the end. ``random``: the same from as many random starts, those of least objective of ten that have met two
moments. ``from_truth``: from the true map.
"""

import argparse
import json
import platform
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch
from images import Optics, molecule, noisy_images, summed, views
from torch import Tensor

from cryorbit.methods.moment_fit import MomentFit, MomentsConfig, view_directions
from cryorbit.methods.moment_prior import MomentPrior, PriorConfig
from cryorbit.methods.moments import invert_from, invert_moments
from cryorbit.metrics.fsc import fsc, resolution, shell_power
from cryorbit.metrics.map_search import align_volumes
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.physics.image_moments import ImageMoments, moments_of_slices, relative_errors
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.slicing import project
from cryorbit.physics.third_moments import ThirdMoments
from cryorbit.simulate.atoms import AtomicModel, read_model
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.proteins import Proteins
from cryorbit.training.history import History
from cryorbit.training.loop import run
from cryorbit.types import Volume
from cryorbit.volumes.ball import BallBasis

BOX, RINGS, RADIUS, PIXEL, DEGREE, MARGIN = 32, 9, 14.0, 3.2, 10, 2
POLAR = PolarBasis(BOX, RINGS, RADIUS)
BASIS = BallBasis(BOX, RADIUS, RINGS + MARGIN, DEGREE)
REFINED = MomentsConfig(degree=DEGREE, margin=MARGIN)
WEIGHED_BY_ERROR = replace(REFINED, tolerance=0.003)
RANDOM = MomentsConfig(degree=DEGREE, starts=10, kept=3)
MODELS = {"1igy": "1igy.cif", "1aon": "1aon.pdb.gz"}
IMAGES = 100_000
FIRST = MomentsConfig(degree=DEGREE, margin=MARGIN, positivity=0.0, view_degree=5, iterations=300)
RANDOM_FIRST = replace(FIRST, starts=10, kept=4)
WHOLE = replace(FIRST, iterations=900)
WIDE = replace(POLAR, radius=BOX / 2)  # what CTF and shifts carry out of the circle of the particle
OPTICS = {
    "4ake, images": None,
    "4ake, images, CTF": Optics(WIDE, PIXEL),
    "4ake, images, CTF, shifts": Optics(WIDE, PIXEL, 1.0),
    "4ake, images, CTF, shifts, blurred": Optics(WIDE, PIXEL, 1.0),
}
SEVERAL = ("4ake", *OPTICS, "1igy", "1aon", "gaussians", "turned", "noise")


def degrees_turned(coefficients: Tensor, basis: BallBasis, generator: torch.Generator) -> Tensor:
    """A map with the harmonics of each degree turned by an orthogonal matrix of their own; degree 0 stays."""
    out = coefficients.clone()
    for n in range(1, basis.degrees + 1):
        place = torch.nonzero(basis.layout[:, 0] == n)[:, 0]
        turn, _ = torch.linalg.qr(torch.randn(2 * n + 1, 2 * n + 1, generator=generator))
        out[place] = (turn @ out[place].view(2 * n + 1, -1)).flatten()
    return out


def truth(case: str, seed: int, data: Path) -> tuple[Tensor, float]:
    """Map and pixel size of a case."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    if case == "protein":
        atoms = Proteins().draw(generator)
        wide = torch.full((len(atoms), 1), 8 * np.pi**2 * 2.8**2, dtype=torch.float64)
        model = AtomicModel(atoms, torch.ones_like(wide), wide, "random")
        pixel = model.radius / (RADIUS * float(0.6 + 0.32 * torch.rand(1, generator=generator)))
        return make_projector(model, BOX, pixel).volume(), pixel
    if case in MODELS:
        model = read_model(data / "models" / MODELS[case])
        pixel = model.radius / (0.8 * RADIUS)
        return make_projector(model, BOX, pixel).volume(), pixel
    if case == "gaussians":
        return torch.nn.functional.pad(molecule("gaussians", generator), (4, 3) * 3), 1.0
    real = molecule("4ake", generator)
    if case.startswith("4ake"):
        return real, PIXEL
    if case == "turned":
        return BASIS.volume(degrees_turned(BASIS.nearest(real).float(), BASIS, generator)).float(), PIXEL
    ball = BASIS.volume(torch.randn(len(BASIS), generator=generator)).float()
    gain = (shell_power(real) / shell_power(ball).clamp_min(1e-12 * float(shell_power(ball).max()))).sqrt().float()
    shells = shell_index(BOX).clamp(max=len(gain) - 1)
    coloured = fourier_to_volume(volume_to_fourier(ball) * gain[shells], BOX)
    return BASIS.volume(BASIS.nearest(coloured).float()).float(), PIXEL


def seen(volume: Tensor, case: str, seed: int) -> ImageMoments:
    """Moments of a map from the views of ``seed``."""
    library = views(seed)
    if case not in OPTICS:
        slices = POLAR.coefficients(project(volume, library.float(), 3))
        found = moments_of_slices(slices, torch.full((len(library),), 1 / len(library)), POLAR)
        return ImageMoments(found.first.to(torch.complex128), found.second.to(torch.complex128), POLAR)
    return measured(volume, library, case, seed, 0)[0]


def measured(
    volume: Tensor, library: Tensor, case: str, seed: int, filters: int
) -> tuple[ImageMoments, ThirdMoments | None, float]:
    """Moments of images of a case, and the CPU seconds of summing them."""
    generator, optics = torch.Generator().manual_seed(seed), OPTICS.get(case)
    images = noisy_images(volume, library, IMAGES, generator, optics)
    moments, third, taken = summed(optics.basis if optics else POLAR, images, filters, generator, errors=not filters)
    if optics:
        shifts = 0.0 if case.endswith("blurred") else optics.shift_sigma_px
        moments = replace(moments, shift_sigma_px=shifts, particle_radius_px=RADIUS)
    return moments, third, taken


def third_row(prior: MomentPrior, case: str, seed: int, data: Path, filters: int) -> dict[str, Any]:
    """From 100,000 images, third moments too: every start a little way, then the likeliest to the end."""
    real, pixel = truth(case, seed, data)
    moments, third, summing = measured(real, views(seed), case, seed, filters)
    assert third is not None
    out: dict[str, Any] = {"case": case, "seed": seed, "pixel_A": pixel, "filters": filters, "summing_cpu_s": summing}
    begun = time.process_time()
    tried = [invert_from(moments, FIRST, a, third) for a in prior.predict(moments)]
    best = min(tried, key=lambda found: found.objective)
    network = invert_from(moments, WHOLE, BASIS.nearest(best.volume).float(), third)
    between = time.process_time()
    random = invert_moments(moments, RANDOM_FIRST, torch.Generator().manual_seed(seed), third)
    taken = {"network": between - begun, "random": time.process_time() - between}
    out["network, first"] = compared(best.volume, real, pixel) | {"objective": best.objective}
    for name, found in (("network", network), ("random", random)):
        out[name] = compared(found.volume, real, pixel) | {"objective": found.objective, "cpu_s": taken[name]}
    ideal = invert_from(moments, WHOLE, BASIS.nearest(real).float(), third)
    out["from_truth"] = compared(ideal.volume, real, pixel) | {"objective": ideal.objective}
    held = compared(BASIS.volume(BASIS.nearest(real)), real, pixel)
    return out | {"truth_held": held, "gains_off": third.gains_off, "gains": len(third.gains)}


def compared(found: Tensor, real: Tensor, pixel: float) -> dict[str, float | None]:
    """FSC and correlation of a map with the true one, laid on it."""
    aligned = align_volumes(Volume(found.float(), pixel), Volume(real, pixel))
    curve = fsc(aligned.map.data, real)
    at: dict[str, float | None] = {
        "fsc_0.5_A": resolution(curve, 0.5, len(real), pixel),
        "fsc_0.143_A": resolution(curve, 0.143, len(real), pixel),
    }
    return at | {"correlation": aligned.correlation}


def with_best_density(fit: MomentFit, coefficients: Tensor) -> float:
    """Objective of a map at its best scale and density."""

    def loss(packed: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(packed).float().requires_grad_()
        value = fit.objective(start * x[0].exp(), x[1:])
        (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient.double().numpy()

    start = fit.scaled(coefficients)
    found = scipy.optimize.minimize(
        loss, np.zeros(1 + len(fit.uniform)), jac=True, method="L-BFGS-B", options={"maxiter": 60}
    )
    return float(found.fun)


def one(prior: MomentPrior, case: str, seed: int, data: Path) -> dict[str, Any]:
    """Three maps of a case, compared with the truth and with the training set."""
    volume, pixel = truth(case, seed, data)
    moments = seen(volume, case, seed)
    begun, fit = time.process_time(), MomentFit(moments, REFINED, RINGS)
    starts = [(with_best_density(fit, a), i, a) for i, a in enumerate(prior.predict(moments))]
    alone, _, start = min(starts)
    refined = min((invert_from(moments, REFINED, a) for _, _, a in starts), key=lambda found: found.objective)
    taken = time.process_time() - begun
    random = invert_moments(moments, RANDOM, torch.Generator().manual_seed(seed))
    weighed = {}
    if moments.variance is not None:
        found = min(
            (invert_from(moments, WEIGHED_BY_ERROR, a) for _, _, a in starts), key=lambda found: found.objective
        )
        weighed["weighed"] = compared(found.volume, volume, pixel) | {"objective": found.objective}

    def judged(found: Tensor) -> dict[str, float | None]:
        out = compared(found, volume, pixel)
        return out if case in OPTICS else out | {"likeness": likeness(prior, BASIS.nearest(found).float())}

    return {
        "case": case,
        "seed": seed,
        "pixel_A": pixel,
        "moments_off": [float(x) for x in relative_errors(moments.centred(), seen(volume, "exact", seed))],
        "unlike_training": prior.strangeness(moments),
        **({} if case in OPTICS else {"truth_likeness": likeness(prior, BASIS.nearest(volume).float())}),
        "network": judged(BASIS.volume(start)) | {"objective": alone},
        "refined": judged(refined.volume) | {"objective": refined.objective, "matched_to": refined.errors},
        "random": judged(random.volume) | {"objective": random.objective, "matched_to": random.errors},
        "network_and_refinement_cpu_s": taken,
        **weighed,
    }


def likeness(prior: MomentPrior, found: Tensor) -> float:
    """Best correlation of a map with a molecule of the training, over rotations and hands."""
    blocks = prior.molecules.split(500)
    return 1 - min(float(prior.match.mismatch(found.expand(len(b), -1), b).min()) for b in blocks)


def main() -> None:
    """Train, then every case; JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=PriorConfig().steps)
    parser.add_argument("--molecules", type=int, default=PriorConfig().molecules)
    parser.add_argument("--proteins", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=list(SEVERAL), choices=SEVERAL, help="Beside the proteins.")
    parser.add_argument(
        "--only-third",
        action="store_true",
        help="Only with third moments, every case from images, into a JSON of its own.",
    )
    parser.add_argument("--filters", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about: dict[str, Any] = {"commit": commit, "device": f"CPU, {torch.get_num_threads()} thread, {platform.machine()}"}
    begun = time.process_time()
    config = PriorConfig(steps=arguments.steps, molecules=arguments.molecules)
    prior = MomentPrior(BASIS, view_directions(2), RINGS, Proteins(), config, arguments.seed)
    material = time.process_time() - begun
    history = History(arguments.weights.with_suffix(".jsonl"))
    run(prior, checkpoint=arguments.weights, history=history)
    about |= {"training": asdict(config), "material_cpu_s": material, "cpu_s": time.process_time() - begun}
    about |= {"parameters": sum(p.numel() for p in prior.network.parameters())}
    rows: list[dict[str, Any]] = []
    wanted = [(case, seed) for case in arguments.cases for seed in range(arguments.seeds)]
    wanted += [("protein", seed) for seed in range(arguments.proteins)]
    if arguments.only_third:
        about = {name: about[name] for name in ("commit", "device", "training", "parameters")}
        for case, seed in (pair for pair in wanted if pair[0] != "4ake"):  # its images are another case
            rows.append(third_row(prior, case, seed, arguments.data, arguments.filters))
            print(json.dumps(rows[-1]), flush=True)
            arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
        return
    for case, seed in wanted:
        rows.append(one(prior, case, seed, arguments.data))
        print(json.dumps(rows[-1]), flush=True)
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
