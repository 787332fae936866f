"""``cryorbit align2d``: 2-D classes, in-plane angles and shifts of a particle stack, and which particles are none."""

from typing import Annotated

import typer

from cryorbit.cli import options
from cryorbit.cli.reconstruct import configured


def align2d(
    particles: options.Particles,
    output: options.Output,
    classes: Annotated[
        int, typer.Option("--classes", "-k", help="Number of classes (0: one for 100 particles, at most 50).")
    ] = 0,
    mask_diameter: options.MaskDiameter = 0.0,
    datadir: options.Datadir = None,
    pixel_size: options.PixelSize = 0.0,
    contrast: options.Contrast = "auto",
    no_ctf: options.NoCTF = False,
    device: options.Device = "auto",
    memory: options.Memory = 4.0,
    seed: Annotated[int, typer.Option("--seed", help="Random start; another seed is another attempt.")] = 0,
    set_: options.Set = [],  # noqa: B006 - typer's default
    overwrite: options.Overwrite = False,
) -> None:
    """Align particles in the plane and sort them into classes, with no reference; score how likely each is junk."""
    from cryorbit.cli.console import plain
    from cryorbit.cli.progress import reported
    from cryorbit.pipeline.align2d import align2d as run
    from cryorbit.pipeline.config import CLASSES
    from cryorbit.report.align2d import write_gallery

    config = configured(
        particles,
        datadir,
        [f"align2d.classes={classes}", *set_],
        start=CLASSES,
        mask_diameter=mask_diameter,
        seed=seed,
        device=device,
        memory_gib=memory,
        pixel_size=pixel_size,
        contrast=contrast,
        no_ctf=no_ctf,
    )
    console = plain()
    with reported(console) as progress:
        found = run(config, output, overwrite=overwrite, progress=progress)
    m = found.metrics
    reached = m["class_resolution_A"]
    page = write_gallery(output / "classes.png", found.pictures.numpy(), m["class_sizes"], reached, m["pixel_size_A"])  # type: ignore[arg-type]
    best = "none agrees" if m["resolution_best_A"] is None else f"{m['resolution_best_A']:.1f} A"
    middle = "" if m["resolution_median_A"] is None else f", median {m['resolution_median_A']:.1f} A"
    console.print(f"classes    {m['classes']} of {m['particles']:,} particles; best {best}{middle} (FRC 0.143)")
    console.print(
        f"           classes were found together to {m['shared_reference_A']:.1f} A: only what is finer is independent"
    )
    console.print(f"junk       {m['junk_share']:.1%} of the particles are likelier to be something else")
    for warning in m["warnings"]:  # type: ignore[attr-defined]
        console.print(f"note: {warning}")
    console.print(f"\naverages   {output / 'classes.mrcs'}, {page}\nparticles  {output / 'particles.star'}")
