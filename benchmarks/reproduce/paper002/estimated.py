"""Do 90 % intervals of the map hold the truth where poses were estimated? 4AKE, 64 px at 1.6 A, ab initio to `cryorbit posterior`.

    python benchmarks/reproduce/paper002/estimated.py --json benchmarks/results/paper002_estimated.json

2,000 images at -10 dB with CTF (0.8-2.0 um) and shifts of sigma 2 px, a new set and a new start for each seed. The truth is made anew from the
atoms in the run's own frame and hand (from the poses of all particles), so nothing is interpolated. `known`: the same images at their true
poses. `images`: estimated poses, noise of the images alone. `images and poses`: with the variance of the mean over joint draws of all poses.
Shells 2 to 31; `resolved`: to the run's own predicted resolution; `gain`: slope of the mean on the truth over
what the prior leaves of it, 1 where poses blur nothing.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import write
from torch import Tensor

from cryorbit.groups.point import point_group
from cryorbit.io.mrc import read_volume
from cryorbit.io.particles import open_particles
from cryorbit.methods.map_posterior import MapPosterior, map_posterior, pose_variance
from cryorbit.metrics.align import PoseAlignment, align_poses
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.fsc import shell_sum
from cryorbit.metrics.spectrum import predicted_resolution, ss_snr
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball
from cryorbit.pipeline.config import RunConfig, preset
from cryorbit.pipeline.finished import inputs_of, open_finished, posterior_of_run
from cryorbit.pipeline.posterior import added_to_shells, joint_draws, weighted_modes
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.pipeline.start import fourier_stack
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.atoms import model_path, read_model
from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.project_atoms import AtomProjector
from cryorbit.simulate.settings import CTFSettings, SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.types import Poses

BOX, APIX, DIAMETER, DRAWS = 64, 1.6, 90.0, 8


def moved_truth(found: PoseAlignment) -> Tensor:
    """(D, D, D) map of the atoms in the frame and hand of the run."""
    model = read_model(model_path("4ake"))
    back = (model.positions - found.shift.to(model.positions)) @ found.rotation.to(model.positions)  # R^T (r - shift)
    return AtomProjector(replace(model, positions=-back if found.mirrored else back), BOX, APIX).volume()


def coverage(mean: Tensor, variance: Tensor, truth: Tensor) -> dict[str, object]:
    """Share of the coefficients inside their 90 % intervals, overall and over shells."""
    found = interval_coverage(mean, variance, truth)
    resolved = round(BOX * APIX / predicted_resolution(ss_snr(mean, variance), BOX, APIX))
    return {
        "covered_90": found.overall,
        "covered_90_least_shell": float(found.by_shell[2 : BOX // 2].min()),
        "covered_90_most_shell": float(found.by_shell[2 : BOX // 2].max()),
        "covered_90_resolved": float(found.by_shell[2 : resolved + 1].mean()),
        "resolved_shell": resolved,
        "covered_90_by_shell": [round(float(x), 4) for x in found.by_shell],
    }


def gain(found: MapPosterior, truth: Tensor) -> dict[str, object]:
    """Slope of the mean on the truth over what the prior leaves of it, per shell."""
    index = shell_index(BOX)
    kept = (1 - found.variance / found.prior[index.clamp(max=len(found.prior) - 1)]).clamp_min(0)
    transform = volume_to_fourier(truth)
    cross = (volume_to_fourier(found.mean) * transform.conj()).real
    slope = shell_sum(cross, index, BOX) / shell_sum(transform.abs().square() * kept, index, BOX)
    return {"gain_by_shell": [round(float(x), 4) for x in slope]}


def one(seed: int) -> list[dict[str, object]]:
    """Simulate, reconstruct from the files, and ask each posterior."""
    projector = make_projector(read_model(model_path("4ake")), BOX, APIX)
    drawn = SimulationSettings(
        count=2000, seed=1000 + seed, snr_db=-10.0, ctf=CTFSettings(defocus=(8000.0, 20000.0)), shift_sigma_px=2.0
    )
    with tempfile.TemporaryDirectory() as folder:
        source, run = Path(folder) / "in", Path(folder) / "run"
        write_simulation(source, projector, drawn)
        config = RunConfig(particles=str(source / "particles.star"), mask_diameter=DIAMETER, seed=seed)
        result = reconstruct(preset(config), run)
        particles = open_particles(source / "truth.star", require_images=False)
        written = torch.from_numpy(read_volume(source / "truth.mrc")[0])
        true = Poses(torch.from_numpy(particles.rotations), torch.from_numpy(particles.shifts))
        config, metrics = open_finished(run)
        stack = fourier_stack(config, inputs_of(run, config, metrics))
        equal, group = torch.ones(len(stack)), point_group("C1").float()
        every = torch.arange(len(stack))
        known = PoseSamples(every, true.rotations.float(), true.shifts.float() / APIX, equal)
        exact = map_posterior(stack, equal, known, group)
        poses = posterior_of_run(run, len(stack)).in_pixels(stack.pixel_size)
        found = map_posterior(stack, equal, weighted_modes(poses), group)
        by_shell, _ = pose_variance(stack, equal, joint_draws(poses, DRAWS, 0), group, found)
    aligned = align_poses(result.poses, true)
    kept = ball(BOX, BOX / 2)

    def banded(volume: Tensor) -> Tensor:
        return fourier_to_volume(volume_to_fourier(volume * stack.scale) * kept, BOX)

    plain = projector.volume()
    grey = (written * plain).sum() / plain.square().sum()  # the simulator's scale, noise variance 1
    here, there = banded(grey * moved_truth(aligned)), banded(grey * plain)
    summary = aligned.summary(APIX)
    cell: dict[str, object] = {"seed": seed, "median_deg": summary.median_deg, "mirrored": aligned.mirrored}
    both = added_to_shells(found.variance, by_shell)
    return [
        cell | {"poses": "known"} | coverage(exact.mean, exact.variance, there) | gain(exact, there),
        cell
        | {"poses": "estimated", "variance": "images"}
        | coverage(found.mean, found.variance, here)
        | gain(found, here),
        cell | {"poses": "estimated", "variance": "images and poses"} | coverage(found.mean, both, here),
    ]


def main() -> None:
    """Every seed, a line for each posterior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for seed in range(arguments.seeds):
        rows += one(seed)
        print(*(json.dumps(row) for row in rows[-3:]), sep="\n", flush=True)
        if arguments.json:
            write(arguments.json, rows)


if __name__ == "__main__":
    main()
