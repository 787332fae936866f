"""``cryorbit refine``: from approximate poses to the best map the images allow."""

from pathlib import Path
from typing import Annotated

import typer

from cryorbit.cli import options
from cryorbit.cli.reconstruct import configured, run_and_report


def refine(
    particles: options.Particles,
    output: options.Output,
    mask_diameter: options.MaskDiameter = 0.0,
    symmetry: Annotated[
        str, typer.Option("--symmetry", help="Point group of the map the poses belong to: C1, Cn, Dn, T, O, I.")
    ] = "C1",
    ini_high: Annotated[
        float,
        typer.Option(
            "--ini-high", help="Angstrom up to which the poses are trusted at first (0: to FSC 0.5 of their half maps)."
        ),
    ] = 0.0,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Map of the molecule's mask, 0 to 1, in the frame of the poses.")
    ] = None,
    preset: options.Preset = "default",
    datadir: options.Datadir = None,
    pixel_size: options.PixelSize = 0.0,
    contrast: options.Contrast = "auto",
    flip_hand: options.FlipHand = False,
    no_ctf: options.NoCTF = False,
    defocus_range: options.DefocusRange = 0.0,
    volume: options.VolumeModel = "voxel",
    device: options.Device = "auto",
    memory: options.Memory = 4.0,
    seed: Annotated[int, typer.Option("--seed", help="Half sets, where the file has none.")] = 0,
    set_: options.Set = [],  # noqa: B006 - typer's default
    overwrite: options.Overwrite = False,
    posterior: options.Posterior = False,
) -> None:
    """Refine the poses that come with the particles (RELION, cryoSPARC, cryorbit) on two independent halves."""
    from cryorbit.pipeline.config import POSES

    config = configured(
        particles,
        datadir,
        set_,
        start=POSES,
        ini_high=ini_high,
        mask=str(mask.resolve()) if mask else "",
        mask_diameter=mask_diameter,
        symmetry=symmetry,
        preset=preset,
        seed=seed,
        device=device,
        memory_gib=memory,
        pixel_size=pixel_size,
        contrast=contrast,
        flip_hand=flip_hand,
        no_ctf=no_ctf,
        volume=volume,
        refine={"defocus_range": defocus_range},
    )
    run_and_report(config, output, overwrite, posterior)
