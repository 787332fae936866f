"""What a finished run knows of its structure, made fit for new particles: an encoder, taught once, and how far to trust it."""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryorbit.errors import RunError
from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.io.mrc import read_volume
from cryorbit.methods.distillation import Distillation, DistillationConfig, Structure
from cryorbit.methods.online_em import rotation_grid
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.fourier import fourier_disk
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig, from_dict
from cryorbit.pipeline.finished import inputs_of, posterior_of_run, reading
from cryorbit.pipeline.rundir import locked
from cryorbit.pipeline.start import fourier_stack
from cryorbit.poses.assignment import Assigned, Assigner
from cryorbit.poses.confidence import Confidence, fit_confidence, threshold
from cryorbit.poses.density import cosines
from cryorbit.poses.encoder import View
from cryorbit.poses.posterior import PosePosterior
from cryorbit.training.checkpoint import load_checkpoint, save_checkpoint
from cryorbit.training.dataset import FourierStack
from cryorbit.training.history import History
from cryorbit.training.loop import Progress
from cryorbit.training.loop import run as run_method

FOLDER, WEIGHTS = "encoder", "encoder.safetensors"
_PERIODS = 10.5  # per particle diameter: where a grid of 15 degrees ends
_ORDER = 2
_HELD_OUT, _MOST_HELD_OUT = 0.1, 1000
_RIGHT_DEG = 10.0
_NOISE_IMAGES, _FEWEST_NOISE = 0.2, 20  # per held-out particle, and at least
_WANTED = 0.99  # share right above the threshold


@dataclass(frozen=True)
class Knowledge:
    """What a run knows, by which new particles are posed; kept beside the encoder's weights.

    Attributes
    ----------
    teaching
        Settings of the encoder.
    scale
        Factor from grey values of the images to those the encoder was taught.
    noise
        (S,) variance of a Fourier pixel in each shell, on that scale.
    shift_sd, strength_sd
        Of the run's particles: pixels, and relative to the map.
    by_encoder, by_search
        Chance that a pose is right, from the features of either way.
    threshold
        Confidence below which a particle is searched for.
    held_out
        Particles that the confidences were fitted to, and shares of them that were right.
    """

    teaching: DistillationConfig
    scale: float
    noise: tuple[float, ...]
    shift_sd: float
    strength_sd: float
    by_encoder: Confidence
    by_search: Confidence
    threshold: float
    held_out: dict[str, float] = field(default_factory=dict)


def _structure(run: Path, config: RunConfig, known: Knowledge, device: torch.device) -> Structure:
    """The run's map in the frame of its poses, on the images' scale."""
    data, pixel_size = read_volume(run / "map.mrc")
    volume = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    sphere = soft_sphere(volume.shape[-1], 0.5 * config.mask_diameter / pixel_size)
    return Structure(
        (volume * sphere * known.scale).to(device),
        torch.tensor(known.noise).to(device),
        point_group(config.symmetry).float().to(device),
        known.shift_sd,
        known.strength_sd,
    )


def taught(
    run: Path,
    config: RunConfig,
    metrics: dict[str, object],
    teaching: DistillationConfig | None,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], Knowledge]:
    """The run's encoder, taught first where there is none of these settings."""
    path = run / FOLDER / WEIGHTS
    made_from = outputs.checksum(run / "map.mrc") + outputs.checksum(run / "poses.npz")
    if path.exists():
        tensors, meta = load_checkpoint(path)
        known = _knowledge(meta, path)
        if meta.get("made_from") == made_from and teaching in (None, known.teaching):
            return tensors, known
    with locked(run):
        return _teach(run, config, metrics, teaching or DistillationConfig(), made_from, progress)


def _knowledge(meta: dict[str, object], path: Path) -> Knowledge:
    try:
        values: dict[str, Any] = dict(meta["knowledge"])  # type: ignore[call-overload]
        values["teaching"] = from_dict(DistillationConfig, values["teaching"])
        values["noise"] = tuple(values["noise"])
        for name in ("by_encoder", "by_search"):
            values[name] = Confidence(**{k: tuple(v) for k, v in values[name].items()})
        return Knowledge(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> RunError:
    return RunError("RUN048", f"{path} does not hold the run's encoder ({error!r})", "remove it: it is taught again")


def _teach(
    run: Path,
    config: RunConfig,
    metrics: dict[str, object],
    teaching: DistillationConfig,
    made_from: str,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], Knowledge]:
    inputs = inputs_of(run, config, metrics)
    device = inputs.device
    stack = fourier_stack(config, inputs)
    posterior = posterior_of_run(run, len(stack)).in_pixels(stack.pixel_size)
    with reading(run):
        noise = (
            torch.tensor(metrics["noise_variance"], dtype=torch.float32).view(int(stack.disk.shell.max()) + 1)
            * stack.scale**2
        )
        strength_sd = float(str(metrics["scale_spread"]))
    known = Knowledge(
        teaching,
        stack.scale,
        tuple(noise.tolist()),
        float(posterior.shifts[:, 0].std()),
        strength_sd,
        Confidence((), (), (0.0,)),
        Confidence((), (), (0.0,)),
        1.0,
    )
    order = torch.randperm(len(stack), generator=torch.Generator().manual_seed(config.seed))
    count = min(max(round(_HELD_OUT * len(stack)), 1), _MOST_HELD_OUT)
    method = Distillation(
        stack,
        teaching,
        structure=_structure(run, config, known, device),
        posterior=posterior,
        members=order[count:].sort().values,
        mask_diameter=inputs.mask_diameter,
        seed=config.seed,
    )
    folder, fingerprint = run / FOLDER, f"{made_from} {teaching}"
    folder.mkdir(exist_ok=True)
    checkpoint = folder / f"checkpoint_{hashlib.sha256(fingerprint.encode()).hexdigest()[:8]}.safetensors"
    run_method(
        method,
        checkpoint=checkpoint,
        history=History(folder / "history.jsonl"),
        progress=progress,
        fingerprint=fingerprint,
    )
    weights = {k: v.detach().clone() for k, v in method.encoder.state_dict().items()}
    known = _calibrated(run, config, known, weights, stack, posterior, order[:count].sort().values)
    save_checkpoint(folder / WEIGHTS, weights, {"made_from": made_from, "knowledge": asdict(known)})
    for path in folder.glob("checkpoint_*.safetensors"):  # others are of interrupted teaching with other settings
        path.unlink()
    return weights, known


def _calibrated(
    run: Path,
    config: RunConfig,
    known: Knowledge,
    weights: dict[str, Tensor],
    stack: FourierStack,
    posterior: PosePosterior,
    held_out: Tensor,
) -> Knowledge:
    """Both ways of posing tried on particles of the run that the encoder has not seen, and on images of noise alone, where none is right.

    Without the latter a run whose held-out particles are all right would teach that everything always is.
    """
    assigner = assigner_of(run, config, known, weights, 2, stack.device)
    fits, shares = [], {"particles": float(len(held_out))}
    group, disk = point_group(config.symmetry).float(), stack.disk.to(stack.device)
    count = min(max(round(_NOISE_IMAGES * len(held_out)), _FEWEST_NOISE), len(held_out))
    drawn = torch.randn(count, len(disk), 2, generator=torch.Generator().manual_seed(config.seed)).to(stack.device)
    spread = (0.5 * torch.tensor(known.noise).to(stack.device)[disk.shell]).sqrt()
    noise = torch.view_as_complex(drawn * spread[:, None])
    for name, way in (("encoder", assigner.encoded), ("search", assigner.searched)):
        found = Assigned.joined([way(stack.images(b), stack.ctf(b)) for b in held_out.split(500)])
        empty = way(noise, stack.ctf(held_out[: len(noise)])).features.cpu()
        cosine = cosines(found.rotations[:, None], posterior.rotations[held_out, 0], group)[:, 0]
        error = torch.rad2deg(cosine.clamp(-1, 1).acos())
        right = error < _RIGHT_DEG
        known_right = torch.cat([right, torch.zeros(len(empty), dtype=torch.bool)])
        fits.append((fit_confidence(torch.cat([found.features, empty]), known_right), found.features, right))
        shares |= {f"{name}_right": float(right.double().mean()), f"{name}_median_deg": float(error.median())}
    line = threshold(fits[0][0](fits[0][1]), fits[0][2], _WANTED)
    return replace(known, by_encoder=fits[0][0], by_search=fits[1][0], threshold=line, held_out=shares)


def assigner_of(
    run: Path, config: RunConfig, known: Knowledge, weights: dict[str, Tensor], steps: int, device: torch.device
) -> Assigner:
    structure, teaching = _structure(run, config, known, device), known.teaching
    box = structure.volume.shape[-1]
    _, pixel_size = read_volume(run / "map.mrc")
    stack_disk = fourier_disk(box, 0.5 * box)
    view = View.around(stack_disk, teaching.side, config.mask_diameter / pixel_size)
    encoder = teaching.encoder(view).to(device)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise _unusable(run / FOLDER / WEIGHTS, error) from error
    coarse = min(round(_PERIODS * box * pixel_size / config.mask_diameter), int(stack_disk.shell.max()))
    return Assigner(
        encoder,
        structure.volume,
        structure.noise,
        stack_disk,
        coarse=float(coarse),
        fine=float(stack_disk.shell.max()),
        grid=rotation_grid(_ORDER, structure.symmetry),
        spacing=so3.grid_spacing(_ORDER),
        shift_sd=known.shift_sd,
        steps=steps,
    )
