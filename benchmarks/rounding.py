"""What rounding the factors of the dense posterior's matrix products to TF32 or bfloat16 does to posteriors.

    python benchmarks/rounding.py [--images 100] [--json FILE]

4AKE, 64 px at 1.6 A, CTF, shifts of sigma 2 px: the scores of every image at 4,608 rotations x the shift lattice of the engine, under the
true map and noise, as posteriors are sharpest there. Factors are rounded on the CPU to the 10 and 7 explicit bits of the two formats (to
nearest, ties to even); products and sums are kept in float64. Against the exact scores: standard deviation of the change at poses within 8
nats of the best, and total variation between the posteriors of an image.
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import fourier_disk, images_to_disk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.poses.grid import shift_grid
from cryorbit.simulate.particles import simulate_particles
from cryorbit.simulate.settings import CTFSettings
from cryorbit.simulate.source import open_source

BOX, APIX, DIAMETER = 64, 1.6, 90.0
PERIODS = (4.4, 7.5, 10.5)
SNR_DB = (10.0, 0.0, -10.0, -15.0)
BITS = {"tf32": 10, "bf16": 7}
NEAR = 8.0  # nats


def rounded(values: Tensor, bits: int) -> Tensor:
    """float32 with so many explicit bits of the fraction, to nearest, ties to even; in float64."""
    drop = 23 - bits
    integer = values.float().contiguous().view(torch.int32)
    up = (1 << (drop - 1)) - 1 + ((integer >> drop) & 1)
    return ((integer + up) & ~((1 << drop) - 1)).view(torch.float32).double()


def main() -> None:
    """Print one row per SNR and radius."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    made = {"count": arguments.images, "box": BOX, "pixel_size": APIX, "shift_sigma_px": 2.0, "seed": 1}
    half, rows = so3.half_grid(2), []
    for snr_db in SNR_DB:
        truth = simulate_particles(open_source("4ake"), ctf=CTFSettings(), snr_db=snr_db, **made)
        assert truth.ctf is not None
        whole = fourier_disk(BOX)
        noise = float(images_to_disk(truth.images, whole)[:, whole.shell >= BOX // 2 - 2].abs().square().mean())
        for periods in PERIODS:
            radius = round(periods * BOX * APIX / DIAMETER)
            disk = fourier_disk(BOX, float(radius))
            precision = disk.weight / noise
            contrast = ctf_on_disk(truth.ctf, disk, APIX).float()
            slices = slice_grid(slicing_grid(truth.volume.data.float(), float(radius)), half, disk)
            shifts = shift_grid(9.0 / APIX, min(0.38 * BOX / radius, 9.0 / APIX), 2.0)
            ramp = phase_ramp(shifts.points, disk).conj()
            images = ((images_to_disk(truth.images, disk) * contrast)[:, None] * ramp).flatten(0, 1)
            weighted, power = slices * precision, 0.5 * precision * slices.abs().square()
            pairs = ((images.real, weighted.real), (images.imag, weighted.imag), (contrast.square(), power))

            def scores(change, pairs=pairs, prior=shifts.log_prior):  # type: ignore[no-untyped-def]
                even, odd, energy = (change(a) @ change(b).T for a, b in pairs)
                even, odd = (x.view(arguments.images, len(prior), -1) for x in (even, odd))
                base = prior[None, :, None] - energy[:, None]
                return torch.cat([base + even + odd, base + even - odd], dim=2).flatten(1)

            exact = scores(Tensor.double)
            near = exact > exact.amax(dim=1, keepdim=True) - NEAR
            row = {"snr_db": snr_db, "radius_px": radius, "best_nats": float(exact.amax(dim=1).median())}
            for name, bits in BITS.items():
                found = scores(lambda x, bits=bits: rounded(x, bits))
                change = found - exact
                change = change - (change * near).sum(dim=1, keepdim=True) / near.sum(dim=1, keepdim=True)
                variation = 0.5 * (found.softmax(dim=1) - exact.softmax(dim=1)).abs().sum(dim=1)
                row |= {f"{name}_sd_nats": float(change[near].std()), f"{name}_variation_mean": float(variation.mean())}
                row[f"{name}_variation_max"] = float(variation.max())
            rows.append(row)
            print({k: round(v, 4) for k, v in row.items()}, flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"commit": commit, "images": arguments.images, "torch": torch.__version__}
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
