"""Figure 6 of papers/002: poses under the true map by gradient, which get stuck, and as a mixture posterior, which do not.

    python benchmarks/reproduce/paper002/poses.py ../shared/data --json benchmarks/results/paper002_poses.json \\
        --png docs/images/paper002_poses.png

The map is the true one and fixed, noise is known, nothing is shifted (paper section 6.4). `gradient`: one rotation per particle (Dirac),
Adam on its tangent space from a random rotation, all Fourier pixels, for each of three learning rates. `mixture`: the modes a dense grid
nominates at low resolution, refined and weighed by `poses.local.local_posterior`. Right: within 5 degrees of the true pose or of one
equivalent to it. Global: no less likely (to 0.1 nats) than the pose that Gauss-Newton comes to from the truth.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Data, simulate, write
from torch import Tensor

from cryorbit.conventions import euler_to_matrix, matrix_to_euler
from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.physics.fourier import disk_subset, fourier_disk
from cryorbit.physics.posing import pose_losses
from cryorbit.physics.slicing import SlicingGrid, slice_grid, slicing_grid
from cryorbit.poses.grid import nominate
from cryorbit.poses.local import local_posterior, sample_points
from cryorbit.poses.posterior import PosePosterior
from cryorbit.poses.table import refine_poses
from cryorbit.report.style import BLUE, INK, ORANGE, figure, plain, png, write_bytes

SETS = {"1aon": (64, 5.6, "C7"), "4ake": (64, 1.6, "C1")}
RATES, STEPS = (0.03, 0.1, 0.3), 300
RIGHT = 5.0
COARSE = 10.0  # Fourier pixels: what a grid of 7.5 degrees supports
STARTS = 40
_AS_LIKELY = 0.1  # nats


@dataclass(frozen=True)
class Task:
    """Images, the map and the noise that made them, and where the truth is."""

    grid: SlicingGrid
    images: Tensor
    precision: Tensor
    true: Tensor
    symmetry: Tensor
    box: int

    @property
    def ctf(self) -> Tensor:
        """None was applied."""
        return torch.ones(self.images.shape)

    def errors(self, rotations: Tensor) -> Tensor:
        """(N,) degrees to the nearest equivalent of the true pose; rotations (N, 3, 3)."""
        mates = self.true[:, None] @ self.symmetry
        return torch.rad2deg(so3.distance(*torch.broadcast_tensors(mates, rotations[:, None].float())).amin(dim=1))


def task(data: Data, symmetry: str) -> Task:
    """From simulated particles."""
    stack = data.stack(2.0)
    noise = data.truth.noise_spectrum[stack.disk.shell] * (stack.scale * stack.box) ** 2
    grid = slicing_grid(data.truth.volume.data * stack.scale, stack.disk.radius)
    images = stack.images(torch.arange(len(stack)))
    group = point_group(symmetry).float()
    return Task(grid, images, stack.disk.weight / noise, data.truth.poses.rotations, group, stack.box)


def descend(job: Task, start: Tensor, rate: float, steps: int = STEPS) -> list[Tensor]:
    """Adam from ``start``: the rotations (N, 3, 3) after every step."""
    disk, turned, path = fourier_disk(job.box), start.clone(), []
    first, second = torch.zeros(len(start), 3), torch.zeros(len(start), 3)
    for step in range(1, steps + 1):
        turn = torch.zeros(len(start), 3, requires_grad=True)
        left = job.images - slice_grid(job.grid, so3.exp(turn) @ turned, disk)
        (slope,) = torch.autograd.grad(0.5 * (job.precision * left.abs().square()).sum(), [turn])
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope.square()
        move = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-12)
        turned = so3.orthonormalise(so3.exp(-rate * move) @ turned)
        path.append(turned)
    return path


def mixture(job: Task) -> PosePosterior:
    """Up to three modes of every particle."""
    disk, coarse, order = fourier_disk(job.box), fourier_disk(job.box, COARSE), 3
    keep, half = disk_subset(disk, coarse), so3.half_grid(order)
    rotations, shifts = nominate(
        job.images[:, keep],
        job.ctf[:, keep],
        half,
        slice_grid(job.grid, half, coarse),
        job.precision[keep],
        0.0,
        coarse,
        count=STARTS,
        apart=2 * so3.grid_spacing(order),
    )
    return local_posterior(
        job.grid,
        job.images,
        job.ctf,
        job.precision,
        (rotations, shifts, torch.ones(shifts.shape[:2], dtype=torch.bool)),
        disk,
        symmetry=job.symmetry,
        points=sample_points(len(job.images), 32, 0),
        modes=3,
        iterations=8,
        coarse=COARSE,
        fit_shift=False,
    )[0]


def summary(job: Task, rotations: Tensor) -> dict[str, object]:
    """How near and how likely one pose of each particle is; rotations (N, 3, 3)."""
    disk, none = fourier_disk(job.box), torch.zeros(len(job.true), 2)
    least = refine_poses(
        job.grid, job.images, job.ctf, job.precision, job.true, none, disk, shift_only=0, fit_shift=False
    )[2]
    here = (rotations.float()[:, None], none[:, None])
    loss = pose_losses(job.grid, job.images, job.ctf, job.precision, *here, disk)[:, 0]
    error = job.errors(rotations)
    return {
        "right": float((error < RIGHT).double().mean()),
        "global": float((loss <= least + _AS_LIKELY).double().mean()),
        "median_deg": float(error.median()),
    }


def measured(job: Task, cell: dict[str, object]) -> list[dict[str, object]]:
    """Success of each way."""
    rows, start = [], so3.random_rotations(len(job.true), torch.Generator().manual_seed(1))
    for rate in RATES:
        begun = time.process_time()
        end = descend(job, start, rate)[-1]
        row = cell | {"way": "gradient", "rate": rate, "cpu_seconds": time.process_time() - begun}
        rows.append(row | summary(job, end))
    begun = time.process_time()
    found = mixture(job)
    row = cell | {"way": "mixture", "cpu_seconds": time.process_time() - begun} | summary(job, found.rotations[:, 0])
    mates = job.true[:, None] @ job.symmetry
    level = found.level_of(mates, torch.zeros(*mates.shape[:2], 2), torch.Generator().manual_seed(0))
    row |= {"true_in_90_region": float((level < 0.9).double().mean())}
    row |= {"particles_with_several_modes": float((found.mass[:, 1] > 0.01).double().mean())}
    return [*rows, row]


def draw(job: Task, path: Path) -> None:
    """The error surface of one particle over two angles; gradient paths of all three over it, the truth, and the modes of the mixture."""
    index = 0
    one = Task(job.grid, job.images[:1], job.precision, job.true[:1], job.symmetry, job.box)
    rot, tilt, psi = matrix_to_euler(one.true.double().numpy())[index]
    fold = 360.0 / len(job.symmetry)
    across, down = torch.linspace(0, fold, 91), torch.linspace(0, 180, 121)
    angles = torch.stack(torch.meshgrid(across, down, torch.tensor([float(psi)]), indexing="ij"), dim=-1).view(-1, 3)
    turned = torch.from_numpy(euler_to_matrix(angles.double().numpy())).float()
    disk = fourier_disk(job.box)
    loss = pose_losses(
        one.grid, one.images, one.ctf, one.precision, turned[None], torch.zeros(1, len(turned), 2), disk
    )[0].view(len(across), len(down))
    made = figure(7.0, 4.6)
    axes = plain(made.add_subplot(), "rot (degrees, modulo the symmetry)", "tilt (degrees)")
    shown = axes.imshow(
        (loss - loss.min()).T.numpy(), origin="lower", extent=(0, fold, 0, 180), aspect="auto", cmap="gray"
    )
    made.colorbar(shown, ax=axes, label="loss over its least (nats)")
    starts = [(0.25 * fold, 30.0), (0.75 * fold, 60.0), (0.3 * fold, 110.0), (0.7 * fold, 160.0)]
    for number, (r, t) in enumerate(starts):
        begin = torch.from_numpy(euler_to_matrix(torch.tensor([[r, t, float(psi)]]).double().numpy())).float()
        walk = torch.cat([begin, *descend(one, begin, 0.03)])
        seen = matrix_to_euler(walk.double().numpy())
        x, y = seen[:, 0] % fold, seen[:, 1]
        axes.plot(x, y, ".", ms=2, color=ORANGE, label=None if number else "gradient, 300 steps")
        axes.plot(x[-1], y[-1], "o", ms=6, mfc="none", color=ORANGE)
    found = mixture(one)
    modes = matrix_to_euler(found.rotations[0].double().numpy())[found.mass[0].numpy() > 0.01]
    axes.plot(modes[:, 0] % fold, modes[:, 1], "s", ms=11, mfc="none", color=BLUE, label="modes of the mixture")
    axes.plot(rot % fold, tilt, "*", ms=13, color="red", label="truth")
    axes.legend(fontsize=8, loc="upper left", labelcolor=INK)
    write_bytes(path, png(made))


def main() -> None:
    """Every set and noise level, a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name, (box, apix, symmetry) in SETS.items():
        for snr in (1.0, 0.1, 0.04):
            data = simulate(arguments.data, arguments.count, snr, name=name, box=box, pixel_size=apix)
            job = task(data, symmetry)
            cell: dict[str, object] = {"set": name, "snr": snr, "particles": arguments.count, "steps": STEPS}
            rows += measured(job, cell)
            print(*(json.dumps(row) for row in rows[-len(RATES) - 1 :]), sep="\n", flush=True)
            if arguments.json:
                write(arguments.json, rows)
            if arguments.png and name == "1aon" and snr == 0.1:
                draw(job, arguments.png)


if __name__ == "__main__":
    main()
