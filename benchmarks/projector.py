"""Speed, memory and accuracy of the projector beside torch-fourier-slice, torch-projectors and pytorch-finufft.

    python benchmarks/projector.py [--box 128] [--poses 1000] [--engines ours,...] [--device cpu] [--output FILE.json]
    python benchmarks/projector.py --accuracy [--box 64] [--model molecule.pdb]

Tasks, all in float32 at oversampling 2 (padding 2) and from the same map of Gaussian atoms:

* ``slices``: Fourier slices from a grid (or padded transform) prepared beforehand;
* ``forward``: map to real images;
* ``backward``: map to real images, and gradients to map and rotations;
* ``insert``: Fourier images and weights into numerator and weight grids.

torch-fourier-slice and pytorch-finufft work through the poses in equal batches; one batch is timed and scaled up unless
``--full`` is given. Every case runs in a process of its own, once to warm up and then at least ``--repeats`` times; the
fastest run counts. Memory is the peak of the process above what it held after its imports: map, transform, grids and
results together.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cryorbit.groups import so3
from cryorbit.physics.fourier import FourierDisk, disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.nufft import slice_nufft
from cryorbit.physics.slicing import insert_slices, project, slice_grid, slicing_grid

ENGINES = ("ours", "torch-projectors", "torch-fourier-slice", "pytorch-finufft")
TASKS = ("slices", "forward", "backward", "insert")
SIGMA = 1.5
Tensor = torch.Tensor


def atoms(box: int, generator: torch.Generator) -> Tensor:
    """400 atoms of a globular molecule whose diameter is 60 % of the box."""
    x = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    return x * (0.3 * box / float(x.norm(dim=1).max()))


def gaussian_map(positions: Tensor, box: int) -> Tensor:
    """The atoms as Gaussians of standard deviation SIGMA pixels."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    x, y, z = (torch.exp(-((axis - positions[:, i : i + 1]) ** 2) / (2 * SIGMA**2)) for i in range(3))
    return torch.einsum("nz,ny,nx->zyx", z, y, x) / (SIGMA * math.sqrt(2 * math.pi)) ** 3


def exact_slices(positions: Tensor, rotations: Tensor, disk: FourierDisk) -> Tensor:
    """Transform of the atoms, from the formula."""
    k = disk.k.double()
    envelope = torch.exp(-2 * math.pi**2 * SIGMA**2 * k.square().sum(1) / disk.box**2)
    planes = (positions @ rotations.double().mT)[..., :2]
    return torch.stack([envelope * torch.exp(-2j * math.pi / disk.box * (k @ p.mT)).sum(1) for p in planes])


def split(rotations: Tensor, size: int) -> list[Tensor]:
    """Rotations in batches, for the engines that need the memory."""
    return list(rotations.split(size))


class Ours:
    def __init__(self, volume: Tensor, rotations: Tensor, disk: FourierDisk) -> None:
        self.volume, self.rotations, self.disk = volume, rotations, disk

    def prepare(self, task: str) -> None:
        if task == "slices":
            self.grid = slicing_grid(self.volume, self.disk.radius)
        if task == "insert":
            self.values = torch.randn(len(self.rotations), len(self.disk), dtype=torch.complex64).to(self.volume.device)
            self.weights = self.values.abs()

    def slices(self) -> Tensor:
        return slice_grid(self.grid, self.rotations, self.disk)

    def images(self, volume: Tensor, rotations: Tensor) -> Tensor:
        return project(volume, rotations)

    def insert(self) -> None:
        insert_slices(self.values, self.weights, self.rotations, self.disk)

    batch = 1_000_000


class Finufft(Ours):
    batch = 250  # each call also transforms the padded map

    def slices(self) -> Tensor:
        return torch.cat([slice_nufft(self.volume, r, self.disk, 1e-5) for r in split(self.rotations, self.batch)])

    def images(self, volume: Tensor, rotations: Tensor) -> Tensor:
        return disk_to_images(slice_nufft(volume, rotations, self.disk, 1e-5), self.disk)


class TorchProjectors(Ours):
    """k3D = R k2D on xyz: the transposed matrices; transforms with the centre at the origin; no gridding correction."""

    def prepare(self, task: str) -> None:
        box, n = self.disk.box, len(self.rotations)
        if task == "slices":
            self.padded = self.transform(self.volume)
        if task == "insert":
            self.values = torch.randn(1, n, box, box // 2 + 1, dtype=torch.complex64)
            self.weights = self.values.abs()

    def transform(self, volume: Tensor) -> Tensor:
        return torch.fft.rfftn(torch.fft.ifftshift(torch.nn.functional.pad(volume, [self.disk.box // 2] * 6)))[None]

    def planes(self, padded: Tensor, rotations: Tensor) -> Tensor:
        import torch_projectors

        shape = (self.disk.box, self.disk.box)
        turn = rotations.mT[None].contiguous()
        return torch_projectors.project_3d_to_2d_forw(padded, turn, output_shape=shape, oversampling=2.0)[0]

    def slices(self) -> Tensor:
        return self.planes(self.padded, self.rotations)

    def images(self, volume: Tensor, rotations: Tensor) -> Tensor:
        planes = self.planes(self.transform(volume), rotations)
        return torch.fft.fftshift(torch.fft.irfft2(planes), dim=(-2, -1))

    def insert(self) -> None:
        import torch_projectors

        turn = self.rotations.mT[None].contiguous()
        torch_projectors.backproject_2d_to_3d_forw(self.values, turn, weights=self.weights, oversampling=2.0)


class TorchFourierSlice(Ours):
    """Same matrices as torch-projectors; pads map and images to twice the box; 100 poses at a time."""

    batch = 100

    def prepare(self, task: str) -> None:
        side = 2 * self.disk.box
        if task == "slices":
            padded = torch.nn.functional.pad(self.volume, [self.disk.box // 2] * 6)
            shifted = torch.fft.fftshift(padded)
            self.padded = torch.fft.fftshift(torch.fft.rfftn(shifted), dim=(0, 1))
        if task == "insert":
            self.values = torch.randn(self.batch, side, side // 2 + 1, dtype=torch.complex64)

    def slices(self) -> None:  # type: ignore[override]
        import torch_fourier_slice as tfs

        for r in split(self.rotations, self.batch):
            tfs.extract_central_slices_rfft_3d(self.padded, r.mT)

    def images(self, volume: Tensor, rotations: Tensor) -> Tensor:
        import torch_fourier_slice as tfs

        return tfs.project_3d_to_2d(volume, rotations.mT, pad_factor=2.0)

    def insert(self) -> None:
        import torch_fourier_slice as tfs

        shape = (2 * self.disk.box,) * 3
        for r in split(self.rotations, self.batch):
            tfs.insert_central_slices_rfft_3d(self.values[: len(r)], shape, r.mT)


MAKERS = {
    "ours": Ours,
    "torch-projectors": TorchProjectors,
    "torch-fourier-slice": TorchFourierSlice,
    "pytorch-finufft": Finufft,
}


def forward(engine: Ours) -> None:
    for r in split(engine.rotations, engine.batch):
        engine.images(engine.volume, r)


def backward(engine: Ours) -> None:
    volume = engine.volume.clone().requires_grad_()
    for r in split(engine.rotations, engine.batch):
        turns = r.clone().requires_grad_()
        engine.images(volume, turns).square().sum().backward()


def run_case(
    engine_name: str, task: str, box: int, poses: int, repeats: int, device: str, full: bool
) -> dict[str, float]:
    """Time one engine on one task in this process."""
    held = _held_bytes(device)
    generator = torch.Generator().manual_seed(1)
    positions = atoms(box, generator)
    volume = gaussian_map(positions, box).float().to(device)
    rotations = so3.random_rotations(poses, generator).to(device)
    disk = fourier_disk(box).to(device)
    engine = MAKERS[engine_name](volume, rotations, disk)
    work: dict[str, Callable[[], object]] = {
        "slices": engine.slices,
        "forward": lambda: forward(engine),
        "backward": lambda: backward(engine),
        "insert": engine.insert,
    }
    result: dict[str, float] = {}
    if task == "forward":
        few = rotations[:10]
        found = images_to_disk(engine.images(volume, few).float(), disk).cpu()
        inside = disk.k_norm.cpu() <= 0.4 * box
        expected = exact_slices(positions, few.cpu(), disk.to("cpu"))[:, inside]
        result["relative_error"] = float((found[:, inside] - expected).norm() / expected.norm())
    engine.prepare(task)
    timed = rotations if full else rotations[: engine.batch]
    engine.rotations = rotations[:4]
    work[task]()  # compile and warm up on a few poses
    engine.rotations = timed
    walls: list[float] = []
    cpus: list[float] = []
    while len(walls) < repeats or (sum(walls) < 5.0 and len(walls) < 20):
        cpu, wall = time.process_time(), time.perf_counter()
        work[task]()
        if device == "cuda":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if sum(walls) > 45:
            break
    scale = poses / len(timed)
    wall, cpu = scale * min(walls), scale * min(cpus)
    result |= {"wall_s": wall, "cpu_s": cpu, "slices_per_s": poses / wall, "runs": len(walls)}
    result["poses_timed"] = len(timed)
    result["peak_mib"] = (_peak_bytes(device) - held) / 2**20
    return result


def _held_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent as well
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def copy_bandwidth(device: str) -> float:
    """GB/s read and written together, copying an array of 512 MiB: best of ten."""
    source = torch.ones(1 << 27, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9


def bytes_moved(task: str, poses: int, pixels: int) -> int | None:
    """What our kernel touches: 27 points of 8 bytes (12 with weight, read and written) and the pixel."""
    each = {"slices": 27 * 8 + 8, "insert": 2 * 27 * 12 + 12}.get(task)
    return None if each is None else each * poses * pixels


def accuracy(box: int, model: Path | None) -> None:
    """Print the error of slices within 0.8 Nyquist against exact Gaussian atoms, for molecules of diameter 0.6 box."""
    generator = torch.Generator().manual_seed(1)
    cloud = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    radius = torch.rand(300, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
    molecules = {"Gaussian cloud": cloud, "uniform ball": cloud / cloud.norm(dim=1, keepdim=True) * radius}
    if model:
        import gemmi

        chain = gemmi.read_structure(str(model))[0][0].get_polymer()
        found = torch.tensor([atom.pos.tolist() for residue in chain for atom in residue], dtype=torch.float64)
        molecules[model.name] = found[:: max(1, len(found) // 300)]
    rotations = so3.random_rotations(10, generator).double()
    disk = fourier_disk(box, 0.4 * box)
    print(f"{'molecule':20} {'oversampling':>12} {'error':>9}")
    for name, positions in molecules.items():
        x = positions - positions.mean(0)
        x = x * (0.3 * box / float(x.norm(dim=1).max()))
        expected = exact_slices(x, rotations, disk)
        for oversampling in (1, 2, 3, 4):
            grid = slicing_grid(gaussian_map(x, box), disk.radius, oversampling)
            error = float((slice_grid(grid, rotations, disk) - expected).norm() / expected.norm())
            print(f"{name:20} {oversampling:12} {error:9.2e}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--poses", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true", help="time every batch of the batched engines")
    parser.add_argument("--accuracy", action="store_true", help="print error against oversampling instead")
    parser.add_argument("--model", type=Path, help="PDB or mmCIF file whose first chain to add to --accuracy")
    args = parser.parse_args()
    if args.accuracy:
        accuracy(min(args.box, 64), args.model)
        return
    if args.case:
        engine, task = args.case.split(":")
        print(json.dumps(run_case(engine, task, args.box, args.poses, args.repeats, args.device, args.full)))
        return
    bandwidth = copy_bandwidth(args.device)
    pixels = len(fourier_disk(args.box))
    print(f"{args.poses} poses, box {args.box}, {pixels} Fourier pixels; {_device_name(args.device)}")
    print(f"copy {bandwidth:.1f} GB/s")
    columns = f"{'slices/s':>9} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9} {'error':>9} {'bandwidth':>9}"
    print(f"{'engine':20} {'task':9} {columns}")
    cases = []
    for task in args.tasks.split(","):
        for engine in args.engines.split(","):
            if engine == "pytorch-finufft" and task == "insert":
                continue
            command = [sys.executable, __file__, "--case", f"{engine}:{task}"]
            for name in ("box", "poses", "repeats", "device"):
                command += [f"--{name}", str(getattr(args, name))]
            command += ["--full"] if args.full else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{engine:20} {task:9} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            case = {"engine": engine, "task": task, **json.loads(done.stdout.splitlines()[-1])}
            moved = bytes_moved(task, args.poses, pixels) if engine == "ours" else None
            if moved:
                case |= {"bytes": moved, "of_copy_bandwidth": moved / case["wall_s"] / 1e9 / bandwidth}
            cases.append(case)
            error = f"{case['relative_error']:9.2e}" if "relative_error" in case else f"{'':9}"
            share = f"{case['of_copy_bandwidth']:9.2f}" if moved else ""
            print(
                f"{engine:20} {task:9} {case['slices_per_s']:9.0f} {case['wall_s']:8.2f} {case['cpu_s']:8.2f} "
                f"{case['peak_mib']:9.0f} {error} {share}",
                flush=True,
            )
    if args.output:
        packages = ("torch", "numba", "numpy", "torch-projectors", "torch-fourier-slice", "finufft", "pytorch-finufft")
        record = {
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
            "device": _device_name(args.device),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
            "box": args.box,
            "poses": args.poses,
            "fourier_pixels": pixels,
            "copy_gb_per_s": bandwidth,
            "timing": "fastest of the runs of a process; CPU seconds beside wall seconds",
            "cases": cases,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
