"""Speed of the dense pose posterior (the E-step of ab initio) as a share of the machine's own sgemm peak.

    python benchmarks/posterior.py [--images 200] [--device cpu] [--json FILE]

4AKE, 64 px at 1.6 A, -10 dB, CTF, shifts of sigma 2 px: every image against 4,608 rotations x the shift lattice of the engine, at three
Fourier radii, once with the noise variance 20 times too large (posteriors broad, sums as matrix products) and once as it is (sharp, sums
over few entries). The share counts real products, 4 B S H P flops for the scores and as many for the sums of broad posteriors, per
second of the whole E-step, against the best square sgemm in the same process.
"""

import argparse
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cryorbit.groups import so3
from cryorbit.physics import kernels
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import fourier_disk, images_to_disk
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.physics.spectrum import shell_mean
from cryorbit.poses.grid import expectation, shift_grid
from cryorbit.simulate.particles import simulate_particles
from cryorbit.simulate.settings import CTFSettings
from cryorbit.simulate.source import open_source

BOX, APIX, DIAMETER = 64, 1.6, 90.0
PERIODS = (4.4, 7.5, 10.5)


def best_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def peak(device: torch.device) -> float:
    """Flops per second of a square sgemm, the best of three sizes and of torch's own product and the kernels'."""
    rates = []
    for size, product in itertools.product((1024, 2048, 4096), (torch.matmul, kernels.select(device).product)):
        a, b = torch.randn(2, size, size, device=device).unbind()
        rates.append(2 * size**3 / best_of(lambda a=a, b=b, f=product: f(a, b), device))  # type: ignore[misc]
    return max(rates)


def main() -> None:
    """Print one row per radius and noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    top = peak(device)
    made = {
        "count": arguments.images,
        "box": BOX,
        "pixel_size": APIX,
        "snr_db": -10.0,
        "shift_sigma_px": 2.0,
        "seed": 1,
    }
    truth = simulate_particles(open_source("4ake"), ctf=CTFSettings(), **made)
    assert truth.ctf is not None
    rows = []
    for periods in PERIODS:
        radius = round(periods * BOX * APIX / DIAMETER)
        disk = fourier_disk(BOX, float(radius)).to(device)
        images = images_to_disk(truth.images.to(device), disk)
        contrast = ctf_on_disk(truth.ctf, disk.to(torch.device("cpu")), APIX).float().to(device)
        power = shell_mean(images.abs().square().mean(dim=0), disk, radius + 2)
        half = so3.half_grid(2).to(device)
        slices = slice_grid(slicing_grid(truth.volume.data.float().to(device), float(radius)), half, disk)
        shifts = shift_grid(9.0 / APIX, min(0.38 * BOX / radius, 9.0 / APIX), 2.0)
        flops = 4.0 * len(images) * len(shifts.log_prior) * slices.numel()
        for name, factor in (("broad", 20.0), ("sharp", 1.0)):
            precision = disk.weight / (factor * power[disk.shell])
            seconds = best_of(
                lambda p=precision, i=images, c=contrast, s=slices, t=shifts, d=disk: expectation(i, c, s, p, t, d),  # type: ignore[misc]
                device,
            )
            result = expectation(images, contrast, slices, precision, shifts, disk)
            rows.append(
                {
                    "radius_px": radius,
                    "pixels": slices.shape[1],
                    "shifts": len(shifts.log_prior),
                    "posterior": name,
                    "effective_poses": float(result.effective.median()),
                    "seconds": seconds,
                    "ns_per_pose": 1e9 * seconds / (2 * len(images) * len(shifts.log_prior) * len(slices)),
                    "share_of_sgemm_peak": (2 if name == "broad" else 1) * flops / seconds / top,
                }
            )
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sgemm_gflops": top / 1e9,
        "images": arguments.images,
    }
    print(about)
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
