"""Reconstruct three stacks that other projects published, from ../shared/data or the folder given.

    python benchmarks/third_party.py ../shared/data

`toy`: cryoDRGN's toy_projections (1,000 clean images, poses known). `50S`: tomoDRGN's 10076_classE_32_sim (720 images, SNR 0.056, CTF,
poses known; dark; its true map is there too, so the poses a perfect map would give are reported beside ours). `apoferritin`: 1,357 real
particles of EMPIAR-10146 (octahedral, dark, no pose truth); its map is compared with the alpha carbons of the crystal structure, in either
hand: an octahedral map has no other freedom once its axes lie where the model's do. The stated pixel size may be 2 % off.
"""

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from cryorbit.groups import so3
from cryorbit.io.cryodrgn import read_cryodrgn_poses
from cryorbit.io.mrc import read_volume
from cryorbit.io.particles import open_particles
from cryorbit.methods.online_em import Grids, OnlineEM, rotation_grid
from cryorbit.metrics.align import align_poses
from cryorbit.metrics.fsc import fsc
from cryorbit.metrics.masks import soft_sphere
from cryorbit.metrics.resample import inverted
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import resize_volume
from cryorbit.physics.slicing import slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.reconstruct import reconstruct
from cryorbit.poses.grid import shift_grid
from cryorbit.report.render import write_report
from cryorbit.simulate.atoms import model_path, read_model
from cryorbit.simulate.particles import make_projector
from cryorbit.training.dataset import FourierStack
from cryorbit.types import Poses, Volume


def settings(name: str, data: Path) -> RunConfig:
    """What a user would pass for each set."""
    simulated = data / "particles_simulated"
    if name == "toy":
        return RunConfig(
            particles=str(simulated / "cryodrgn" / "toy_projections.star"), pixel_size=1.0, mask_diameter=25.0
        )
    if name == "50S":
        folder = simulated / "tomodrgn_10076"
        star = folder / "10076_classE_32_sim.star"
        return RunConfig(particles=str(star), datadir=str(folder), mask_diameter=300.0, contrast="dark")
    star = data / "particles_real" / "apoferritin_empiar10146" / "apo10146_mit10_64px_f16.star"
    return RunConfig(particles=str(star), symmetry="O", mask_diameter=150.0, contrast="dark")


def truth(name: str, data: Path, box: int, pixel_size: float) -> Poses | None:
    """True poses, where the set has them."""
    if name == "toy":
        rotations, _ = read_cryodrgn_poses(
            data / "particles_simulated" / "cryodrgn" / "toy_angles.pkl", box, pixel_size
        )
        return Poses(torch.as_tensor(rotations).double(), torch.zeros(len(rotations), 2, dtype=torch.float64))
    if name == "50S":
        particles = open_particles(settings(name, data).particles, pixel_size=pixel_size, require_images=False)
        return Poses(torch.as_tensor(particles.rotations), torch.as_tensor(particles.shifts))
    return None


def with_true_map(name: str, data: Path, true: Poses) -> dict[str, float] | None:
    """Median pose error when every image is matched to the true map under the noise left at the true poses: the best any program can do."""
    if name != "50S":
        return None
    config = settings(name, data)
    particles = open_particles(config.particles, datadir=Path(config.datadir), invert_contrast=True)
    stack = FourierStack(particles, 12.0, mask_diameter=config.mask_diameter)
    mask = soft_sphere(stack.box, 0.5 * config.mask_diameter / stack.pixel_size, 3.0)
    volume = torch.from_numpy(read_volume(data / "maps" / "10076_classE_32.mrc")[0])
    volume = resize_volume(volume, stack.box) * mask
    chosen, group, shifts = torch.arange(len(stack)), torch.eye(3)[None], true.shifts.float() / stack.pixel_size
    images, ctf = stack.images(chosen), stack.ctf(chosen)
    model = forward(slicing_grid(volume, stack.disk.radius), true.rotations.float(), shifts, stack.disk, ctf)
    scale = ((model.conj() * images).real * stack.disk.weight).sum() / (model.abs().square() * stack.disk.weight).sum()
    perfect = OnlineEM(stack, mask, group, tau_fudge=0.5, shift_sigma=float(shifts.std()))
    perfect.volume = scale * volume
    perfect.noise = shell_mean((images - scale * model).abs().square().mean(dim=0), stack.disk, len(perfect.noise))
    limit = float(shifts.norm(dim=1).max())
    grids = Grids(rotation_grid(2, group), shift_grid(limit, 0.38 * stack.box / 12, float(shifts.std())), 12)
    found = align_poses(perfect.top_poses(chosen, grids)[0], true).summary(stack.pixel_size)
    random = so3.random_rotations(len(stack), torch.Generator().manual_seed(0))
    chance = align_poses(Poses(random.double(), torch.zeros_like(true.shifts)), true).summary(stack.pixel_size)
    return {"true_map_median_deg": found.median_deg, "random_poses_median_deg": chance.median_deg}


def with_atoms(found: Volume, data: Path) -> dict[str, float]:
    """FSC of the map with the atomic model, mean between 30 and 10 A: as it is, and mirrored."""
    atoms = read_model(model_path(str(data / "models" / "apoferritin_ca_apo_sym.pdb")))
    model = make_projector(atoms, found.box, found.pixel_size).volume().float()
    mask = soft_sphere(found.box, 75.0 / found.pixel_size, 3.0)
    side = found.box * found.pixel_size
    shells = slice(round(side / 30), round(side / 10) + 1)
    hands = {"": found.data, "_mirrored": inverted(found.data)}
    return {f"fsc_with_atoms{name}": float(fsc(v * mask, model * mask)[shells].mean()) for name, v in hands.items()}


def main() -> None:
    """Run the sets, print a line each, write JSON and keep the run folders asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["toy", "50S", "apoferritin"])
    parser.add_argument("--keep", type=Path, help="Folder to keep the run folders in.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.sets:
            output = (arguments.keep or Path(scratch)) / name
            started, cpu = time.perf_counter(), time.process_time()
            result = reconstruct(settings(name, arguments.data), output, overwrite=True)
            row: dict[str, object] = {
                "set": name,
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu,
                "resolution_A": result.metrics["resolution_A"],
                "resolution_masked_A": result.metrics["resolution_masked_A"],
                "pose_effective_median": result.metrics["pose_effective_median"],
            }
            true = truth(name, arguments.data, result.map.box, result.map.pixel_size)
            if true is not None:
                row |= with_true_map(name, arguments.data, true) or {}
                row |= asdict(align_poses(result.poses, true).summary(result.map.pixel_size))
            if name == "apoferritin":
                told = ("verdict", "probability_right", "halves_periods", "halves_same_pose", "halves_independent")
                row |= {key: result.metrics[key] for key in told} | with_atoms(result.map, arguments.data)
            write_report(output)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        about = {"commit": commit, "device": f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
