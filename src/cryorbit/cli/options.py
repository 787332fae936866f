"""Options that several verbs share, each worded once."""

from pathlib import Path
from typing import Annotated

import typer

Particles = Annotated[Path, typer.Argument(help="Particle STAR (RELION 3.0 to 5), cryoSPARC .cs, or .mrcs stack.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Run folder to write; an interrupted run there is continued.")
]
MaskDiameter = Annotated[
    float, typer.Option("--mask-diameter", help="Particle diameter in angstrom (0: 85 % of the box).")
]
Preset = Annotated[
    str,
    typer.Option(
        "--preset", help="fast, default or thorough; paper001: the autoencoder of Nashed et al. 2021 as printed."
    ),
]
Datadir = Annotated[Path | None, typer.Option("--datadir", help="Folder the image stacks are looked up in.")]
PixelSize = Annotated[
    float, typer.Option("--pixel-size", help="Angstrom per pixel, when the file does not say (0: as in the file).")
]
Contrast = Annotated[str, typer.Option("--contrast", help="light or dark particles; auto goes by the first map.")]
FlipHand = Annotated[
    bool, typer.Option("--flip-hand", help="Write the other hand (images alone cannot tell which is right).")
]
VolumeModel = Annotated[
    str,
    typer.Option("--volume", help="What refined maps are made of: voxel, or neural (a coordinate network; slower)."),
]
DefocusRange = Annotated[
    float,
    typer.Option(
        "--defocus-range",
        help="Angstrom within which each particle's defocus is refined around that of the file (0: kept).",
    ),
]
NoCTF = Annotated[bool, typer.Option("--no-ctf", help="Take the images as unmodulated, whatever the file says.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Memory = Annotated[
    float,
    typer.Option("--memory", help="GiB of Fourier pixels kept in memory; a larger stack is read again at each pass."),
]
Set = Annotated[
    list[str],
    typer.Option("--set", help="Any other setting, as section.key=value (see config.toml).", metavar="KEY=VALUE"),
]
LARGEST_SEED = 2**31 - 1
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete a previous run in the output folder first.")]
Posterior = Annotated[
    bool, typer.Option("--posterior", help="Then `cryorbit posterior` on the run: how sure it is of its map.")
]
