"""What a finished run knows of its own map: ``cryorbit posterior run/``. Orchestration only."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from cryorbit.errors import ConfigError, RunError
from cryorbit.groups.point import point_group
from cryorbit.io.mrc import read_volume, write_volume
from cryorbit.io.particles import open_particles
from cryorbit.methods.halves import HALVES, members_of
from cryorbit.methods.held_out import HeldOut, held_out
from cryorbit.methods.map_posterior import MapPosterior, map_posterior, pose_variance
from cryorbit.methods.masked_posterior import MaskedPosterior, masked_posterior
from cryorbit.metrics.directions import missing_views, spectrum_by_direction, unseen_share
from cryorbit.metrics.masks import mask_within, soft_sphere
from cryorbit.metrics.resample import inverted, move_volume
from cryorbit.metrics.spectrum import (
    full_set_fsc,
    half_set_fsc,
    in_mask,
    predicted_resolution,
    ss_snr,
    truth_fsc,
)
from cryorbit.physics.fourier import full_transform, shell_index
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.finished import inputs_of, open_finished, posterior_of_run
from cryorbit.pipeline.inputs import Inputs, choose_device, read_mask
from cryorbit.pipeline.rundir import locked
from cryorbit.pipeline.start import fourier_stack
from cryorbit.poses.local import PoseSamples
from cryorbit.poses.posterior import PosePosterior
from cryorbit.poses.proposals import PoseProposals, proposed
from cryorbit.training.dataset import FourierStack

WRITTEN = ("map_mean.mrc", "map_std.mrc", "missing_views.mrc", "ss_snr.csv", "directions.csv", "posterior.json")
_NO_MASS = 1e-2  # of a particle's posterior: modes with less are left out
SPHERE, SOLVENT = "sphere", "solvent"
_ALIKE = 0.9  # of a mask that the point group lays on itself, at least
_SMOOTH_PX = 1.5  # standard deviation of the window over which voxel variances from few draws are averaged


def posterior(
    run: Path,
    *,
    draws: int = 8,
    seed: int = 0,
    device: str = "",
    memory_gib: float | None = None,
    prior_mask: str = "",
    non_negative: bool = False,
) -> dict[str, object]:
    """Mean, standard deviation, resolution and missing views of a finished run's map; writes them into its folder.

    Parameters
    ----------
    run
        Run folder of ``cryorbit reconstruct`` or ``cryorbit refine``.
    draws
        Joint draws of all particles' poses from ``poses.npz``, at least two; as many proposals of each held-out image's pose.
    seed
        Of the draws.
    device, memory_gib
        In place of the run's own.
    prior_mask
        Where the map may be other than zero: ``sphere`` (of the run's mask diameter), ``solvent`` (the mask the run's resolution was measured
        in) or a mask file in the frame of ``map.mrc``; empty: anywhere.
    non_negative
        Whether no voxel of the map may be negative.

    Returns
    -------
    What was written to ``posterior.json``.

    Raises
    ------
    RunError
        The folder is no finished run, its particles or map are not those it was made from, or a folder has the name of a file to write.
    ConfigError
        The mask is none of these particles, or has not the symmetry of their map.
    """
    if not 2 <= draws <= 1000:
        raise RunError("RUN042", f"{draws} draws of poses tell no variance", "give 2 to 1000, 8 is usual")
    if non_negative and not prior_mask:
        raise RunError(
            "RUN049",
            "--non-negative without --prior-mask: images have no level that density could be above",
            "add --prior-mask solvent: what is outside the molecule is zero",
        )
    config, metrics = open_finished(run)
    for name in WRITTEN:
        if (run / name).is_dir():
            raise RunError("RUN045", f"{run / name} is a folder, expected a file or nothing", "move it away")
    if (run / "figures").is_file():
        raise RunError("RUN045", f"{run / 'figures'} is a file, expected a folder or nothing", "move it away")
    if device:
        choose_device(device)
        config = replace(config, device=device)
    if memory_gib is not None:
        config = replace(config, memory_gib=memory_gib)
    begun = time.monotonic()
    with locked(run):
        inputs = inputs_of(run, config, metrics)
        stack = fourier_stack(config, inputs)
        mask = _mask(run, config, inputs, stack.box, stack.pixel_size)
        group, equal = point_group(inputs.symmetry).float(), torch.ones(len(stack))
        support = _support(prior_mask, inputs, mask, group) if prior_mask else None
        poses = posterior_of_run(run, len(stack)).in_pixels(stack.pixel_size)
        samples, modes = joint_draws(poses, draws, seed), weighted_modes(poses)
        found = map_posterior(stack, equal, modes, group)
        by_shell, by_voxel = pose_variance(stack, equal, samples, group, found)

        def within(samples: PoseSamples, found: MapPosterior) -> MaskedPosterior | None:
            if support is None:
                return None
            spectra = found.noise, found.prior
            return masked_posterior(
                stack, equal, samples, group, support, *spectra, draws=draws, seed=seed, non_negative=non_negative
            )

        proposals = proposed(poses, draws, torch.Generator().manual_seed(seed), group=len(group))
        unseen = _unseen(stack, proposals, _own_poses(run, stack), inputs.half_set, group, within)
        masked = within(modes, found)
        values = _write(run, inputs, stack, mask, found, masked, by_shell.cpu(), by_voxel.cpu(), unseen)
        values |= {"prior_mask": prior_mask, "non_negative": non_negative}
        values |= {"prior_mask_share": 1.0 if support is None else float(support.float().mean())}
        values |= {"draws": draws, "seed": seed, "particles": len(stack), "seconds": time.monotonic() - begun}
        outputs.write_json(run / "posterior.json", values)
    return values


def joint_draws(poses: PosePosterior, draws: int, seed: int) -> list[PoseSamples]:
    """Joint draws: one pose of every particle in each."""
    rotations, shifts = poses.drawn(draws, torch.Generator().manual_seed(seed))
    every, one = torch.arange(len(rotations)), torch.ones(len(rotations))
    return [PoseSamples(every, rotations[:, k].float(), shifts[:, k].float(), one) for k in range(draws)]


def weighted_modes(poses: PosePosterior) -> PoseSamples:
    """Every particle's modes, each weighted by its mass.

    Not draws around them: a pose drawn from the posterior is as far from the mode as the true one is, independently of it as far as the
    image did not decide, so a map of draws is blurred twice (docs/methods/variational.md has the numbers).
    """
    particle, mode = torch.nonzero(poses.mass > _NO_MASS, as_tuple=True)
    weight = poses.mass[particle, mode]
    total = torch.zeros(len(poses.mass)).index_add(0, particle, weight)
    return PoseSamples(
        particle, poses.rotations[particle, mode], poses.shifts[particle, mode], weight / total[particle]
    )


def _own_poses(run: Path, stack: FourierStack) -> PoseSamples:
    """The pose of every particle under the map of its own half (``particles.star``): those of ``poses.npz`` have seen the other half's."""
    ours = open_particles(run / "particles.star", require_images=False)
    rotations, shifts = (torch.as_tensor(x, dtype=torch.float32) for x in (ours.rotations, ours.shifts))
    return PoseSamples(torch.arange(len(ours)), rotations, shifts / stack.pixel_size, torch.ones(len(ours)))


def _unseen(
    stack: FourierStack,
    proposals: PoseProposals,
    own: PoseSamples,
    half_set: Int[Tensor, " n"],
    group: Float[Tensor, "s 3 3"],
    within: Callable[[PoseSamples, MapPosterior], MaskedPosterior | None],
) -> tuple[HeldOut, HeldOut | None]:
    """Every image scored under the map of the half it is not in, made at that half's ``own`` poses, and under that map with the mask
    that ``within`` gives it."""
    plain, masked = [], []
    for half in HALVES:
        rest, seen = members_of(half_set, half), own.rows(half_set != half)
        other = map_posterior(stack, torch.ones(len(stack)), seen, group)
        plain.append(held_out(stack, rest, proposals.rows(rest), other.volume, other.noise))
        if (inside := within(seen, other)) is not None:
            masked.append(held_out(stack, rest, proposals.rows(rest), inside.volume, other.noise))
    return HeldOut.joined(plain), HeldOut.joined(masked) if masked else None


def _mask(run: Path, config: RunConfig, inputs: Inputs, box: int, pixel_size: float) -> Float[Tensor, "d d d"]:
    """The mask the run's own resolution was measured in."""
    if inputs.mask is not None:
        return inverted(inputs.mask) if config.flip_hand else inputs.mask
    sphere = soft_sphere(box, 0.5 * inputs.mask_diameter / pixel_size)
    data, _ = read_volume(run / "map.mrc")
    if data.shape != sphere.shape:
        raise RunError(
            "RUN043",
            f"{run / 'map.mrc'} has {data.shape[0]} pixels on a side, the run's images have {box}",
            "put the run's own map back, or run it again",
        )
    found = mask_within(sphere, torch.from_numpy(data).float(), pixel_size)
    return sphere if found is None else found


def _support(
    name: str, inputs: Inputs, mask: Float[Tensor, "d d d"], group: Float[Tensor, "s 3 3"]
) -> Bool[Tensor, "d d d"]:
    """Where ``--prior-mask`` lets the map be other than zero: wherever that mask is."""
    if name == SOLVENT:
        return mask > 0
    particles, diameter = inputs.particles, inputs.mask_diameter
    if name == SPHERE:
        return soft_sphere(particles.box, 0.5 * diameter / particles.pixel_size) > 0
    given = read_mask(Path(name), particles, diameter)
    for element in group[1:]:
        common = float(torch.minimum(move_volume(given, element, torch.zeros(3)), given).sum() / given.sum())
        if common < _ALIKE:
            raise ConfigError(
                "CONF027",
                f"{100 * common:.0f} % of the mask {name} is where a rotation of {inputs.symmetry}, the run's symmetry, puts it, expected "
                f"{100 * _ALIKE:.0f} %",
                "make it from the run's own map.mrc, or pass --prior-mask solvent",
            )
    return given > 0


def _write(
    run: Path,
    inputs: Inputs,
    stack: FourierStack,
    mask: Float[Tensor, "d d d"],
    found: MapPosterior,
    masked: MaskedPosterior | None,
    by_shell: Float[Tensor, " shells"],
    by_voxel: Float[Tensor, "d d d"],
    scores: tuple[HeldOut, HeldOut | None],
) -> dict[str, object]:
    box, apix, scale = stack.box, stack.pixel_size, stack.scale
    group = point_group(inputs.symmetry).float()
    plain, inside = scores
    unseen, (gain, gain_error) = inside or plain, (None, None) if inside is None else inside.beside(plain)
    map_, seen = masked or found, found.information.cpu()
    mean, variance = map_.mean.cpu(), added_to_shells(map_.variance.cpu(), by_shell)
    # of what is uncertain of the map, how much a mask would keep
    filled = mask if masked is None else torch.ones_like(mask)
    alpha = ss_snr(mean, variance)
    alpha_masked = in_mask(alpha, filled)
    resolution, resolution_inside = (predicted_resolution(a, box, apix) for a in (alpha, alpha_masked))
    pose_part = torch.from_numpy(ndimage.gaussian_filter(by_voxel.numpy(), _SMOOTH_PX))
    voxels = (found.volume.voxel_variance(group) if masked is None else masked.voxel_variance).cpu()
    if masked is not None:
        pose_part = pose_part * (voxels > 0)
    spread = (voxels + pose_part).sqrt() / scale
    views = missing_views(seen)
    directions, curves = spectrum_by_direction(mean, variance)
    along = torch.tensor([predicted_resolution(in_mask(c, filled), box, apix) for c in curves])
    write_volume(run / "map_mean.mrc", (mean / scale).numpy(), apix)
    write_volume(run / "map_std.mrc", spread.float().numpy(), apix)
    write_volume(run / "missing_views.mrc", full_transform(views).numpy(), apix)
    curves_by_name = {
        "ss_snr": alpha,
        "fsc_full_set": full_set_fsc(alpha),
        "fsc_half_set": half_set_fsc(alpha),
        "fsc_truth": truth_fsc(alpha),
        "ss_snr_masked": alpha_masked,
        "fsc_half_set_masked": half_set_fsc(alpha_masked),
        "held_out_residual": unseen.residual,
    }
    outputs.write_fsc(run / "ss_snr.csv", curves_by_name, box, apix)
    outputs.write_directions(run / "directions.csv", directions, along)
    solid = mask > 0.5
    limit = round(box * apix / resolution)
    return {
        "resolution_A": resolution,
        "resolution_masked_A": resolution_inside,
        "resolution_best_direction_A": float(along.min()),
        "resolution_worst_direction_A": float(along.max()),
        "unseen_share": unseen_share(views, limit),
        "std_mean": float(spread[solid].mean()),
        "signal_to_std": float((mean / scale)[solid].std() / spread[solid].mean()),
        "pose_share_of_variance": float(pose_part[solid].mean() / (voxels + pose_part)[solid].mean()),
        "held_out_gain_nats": unseen.gain,
        "held_out_gain_error": unseen.gain_error,
        "prior_mask_gain_nats": gain,
        "prior_mask_gain_error": gain_error,
        "held_out_residual": float(unseen.residual[2 : max(limit, 2) + 1].mean()),
        "held_out_effective_draws": float(unseen.effective.median()),
        "noise_variance": [float(x) / scale**2 for x in found.noise],
        "prior_variance": [float(x) / scale**2 for x in found.prior],
        "symmetry": inputs.symmetry,
        "box": box,
        "pixel_size_A": apix,
    }


def added_to_shells(variance: Float[Tensor, "d d h"], added: Float[Tensor, " shells"]) -> Float[Tensor, "d d h"]:
    """Variances plus a number for each shell, where there are coefficients."""
    index = shell_index(variance.shape[0]).clamp(max=len(added) - 1)
    return torch.where(variance > 0, variance + added[index], 0.0)
