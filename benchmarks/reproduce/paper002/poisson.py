"""Appendix D of papers/002, which names the Poisson model and measures nothing: what the right likelihood of counts is worth.

    python benchmarks/reproduce/paper002/poisson.py --json benchmarks/results/paper002_poisson.json

4AKE, poses known, no CTF, counts at several doses and contrasts (standard deviation of the clean image over the dose), fitted by
`methods/variational.py` under either likelihood, with the prior learned and with the paper's standard normal.

`error`: of the posterior mean, as a share of the true map's power without shell 0 (the background), whole and over the voxels inside and
outside the molecule (true map above a tenth of its maximum), with the slope of the mean on the truth inside. `covered_90`: share of true
coefficients in their 90 % intervals. `held_out_nats`: Poisson log-likelihood of counts that were not fitted, at the posterior mean, per image
and over that of no molecule; `held_out_best` at the true map. `apart`: root mean square difference between the means of the two likelihoods,
in posterior standard deviations of the Gaussian one. `passes`: how far the mean of the Gaussian likelihood is from the exact posterior's, on
600 images of the phantom.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import Data, exact, write
from torch import Tensor

from cryorbit.methods.variational import LIKELIHOODS, PRIORS, Variational, VariationalConfig
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.fsc import shell_sum
from cryorbit.physics.counts import count_log_likelihood
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.source import open_source
from cryorbit.training.dataset import FourierStack
from cryorbit.training.loop import run

BOX, APIX, COUNT, HELD_OUT, EPOCHS = 32, 3.2, 1000, 500, 4
CELLS = [(dose, contrast) for contrast in (0.1, 0.5) for dose in (0.1, 1.0, 10.0)] + [(100.0, 0.03)]
ONE = torch.eye(3)[None]


def simulate(dose: float, contrast: float, seed: int) -> tuple[Data, SimulatedParticles]:
    """Counts to fit, and counts of the same molecule to predict."""
    made = []
    for count, number in ((COUNT, seed), (HELD_OUT, 1000 + seed)):
        made.append(
            simulate_particles(
                open_source("4ake"),
                count=count,
                box=BOX,
                pixel_size=APIX,
                snr_db=10 * math.log10(dose * contrast**2),
                noise="poisson",
                dose=dose,
                fast=True,
                seed=number,
            )
        )
    return Data(made[0], 0.0), made[1]


def gain(mean: Tensor, stack: FourierStack, unseen: SimulatedParticles, dose: float) -> float:
    """Log-likelihood of counts that were not fitted, per image, over that of no molecule."""
    slices = slice_grid(slicing_grid(mean, stack.disk.radius), unseen.poses.rotations, stack.disk)
    excess = stack.to_raw(slices)
    more = count_log_likelihood(unseen.images, excess, dose) - count_log_likelihood(unseen.images, 0 * excess, dose)
    return float(more.sum(dim=(1, 2)).mean())


def without_background(values: Tensor) -> Tensor:
    """A map without shell 0."""
    return fourier_to_volume(volume_to_fourier(values) * (shell_index(BOX) > 0), BOX)


def fitted(data: Data, stack: FourierStack, seed: int, **settings: Any) -> tuple[Variational, float]:
    """The method at its end, and CPU seconds."""
    begun = time.process_time()
    config = VariationalConfig(epochs=EPOCHS, batch=100, **settings)
    method = Variational(stack, config, poses=data.known, symmetry=ONE, seed=seed)
    run(method)
    return method, time.process_time() - begun


def cell(dose: float, contrast: float, prior: str, seed: int) -> list[dict[str, object]]:
    """Both likelihoods on the same counts."""
    data, unseen = simulate(dose, contrast, seed)
    stack = data.stack(4.0)
    whole = data.true_map(stack)
    truth = without_background(whole)
    inside = whole > 0.1 * whole.max()
    means, rows = {}, []
    for likelihood in LIKELIHOODS:
        method, seconds = fitted(data, stack, seed, likelihood=likelihood, prior=prior)
        mean, variance = method.tensors["mean"], method.volume.variance.detach()
        means[likelihood] = without_background(mean)
        off = (means[likelihood] - truth).square()
        if likelihood == "gaussian":
            deviation = shell_sum(variance, shell_index(BOX), BOX)[1:].sum()
        apart = shell_sum(
            volume_to_fourier(means["gaussian"] - means[likelihood]).abs().square(), shell_index(BOX), BOX
        )
        rows.append(
            {
                "dose": dose,
                "contrast": contrast,
                "prior": prior,
                "likelihood": likelihood,
                "seed": seed,
                "images": COUNT,
                "error": float(off.sum() / truth.square().sum()),
                "error_inside": float(off[inside].sum() / truth.square().sum()),
                "error_outside": float(off[~inside].sum() / truth.square().sum()),
                "slope_inside": float((means[likelihood] * truth)[inside].sum() / truth.square()[inside].sum()),
                "covered_90": interval_coverage(mean, variance, whole).overall,
                "held_out_nats": gain(mean, stack, unseen, dose),
                "held_out_best": gain(whole, stack, unseen, dose),
                "apart": float((apart[1:].sum() / deviation).sqrt()),
                "cpu_s": seconds,
            }
        )
    return rows


def passes(epochs: int) -> dict[str, object]:
    """The Gaussian likelihood against the exact posterior of the same images: worst of shells 2 to 11, in posterior variances."""
    box, apix = 24, 4.0
    truth = simulate_particles(phantom(), count=600, box=box, pixel_size=apix, snr_db=-3.0, noise="coloured", seed=0)
    data = Data(truth, 0.0)
    stack = data.stack(4.0)
    expected = exact(stack, data.known)[0]
    method = Variational(stack, VariationalConfig(epochs=epochs, batch=100), poses=data.known, symmetry=ONE)
    run(method)
    off = volume_to_fourier(method.tensors["mean"] - expected.mean).abs().square()
    apart = shell_sum(off, shell_index(box), box) / shell_sum(expected.variance, shell_index(box), box)
    return {"passes": epochs, "images": 600, "apart_worst_shell": float(apart[2:12].max())}


def main() -> None:
    """Every cell and seed, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = [passes(epochs) for epochs in (1, 4, 20)]
    for row in rows:
        print(json.dumps(row), flush=True)
    for dose, contrast in CELLS:
        for prior in PRIORS:
            for seed in range(arguments.seeds):
                for row in cell(dose, contrast, prior, seed):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                if arguments.json:
                    write(arguments.json, rows)


if __name__ == "__main__":
    main()
