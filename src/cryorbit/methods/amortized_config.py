"""Settings of the orientation autoencoder and its two yardsticks."""

from dataclasses import dataclass

from cryorbit.errors import ConfigError
from cryorbit.methods.refinement_config import checked_volume
from cryorbit.physics.copies import GROUPS
from cryorbit.poses.encoder import PARAMETRISATIONS

LIKELIHOODS = ("noise", "l2")
OBJECTIVES = ("best", "elbo")


@dataclass(frozen=True)
class DecoderConfig:
    """What known poses, a table of poses and an encoder have in common: the map, and the steps it is learnt in.

    Attributes
    ----------
    steps, batch
        Adam steps, and images in each.
    likelihood
        ``noise``: squared residuals over the noise variance of their shell, which follows the residuals; ``l2``: all alike (papers/001
        eq. 11).
    radius_start, radius_end
        Fourier radius at the first step and after ``march`` of the steps, in periods per particle diameter; 0 takes all there is.
    march
        Share of the steps in which the radius grows.
    volume
        What the map is made of: ``voxel``, or ``neural``, a coordinate network on top of the first map.
    volume_rate
        Adam's step for a voxel, in units of a voxel's own spread.
    field_width, field_rate
        Of a neural map: hidden units per layer, and Adam's step for a weight.
    """

    steps: int = 1400
    batch: int = 40
    likelihood: str = "noise"
    radius_start: float = 4.0
    radius_end: float = 8.0
    march: float = 0.9
    volume: str = "voxel"
    volume_rate: float = 0.15
    field_width: int = 64
    field_rate: float = 0.03


@dataclass(frozen=True)
class TableConfig(DecoderConfig):
    """A pose of its own for every image, by gradient (papers/001 section 4, "AD").

    Attributes
    ----------
    parametrisation
        ``euler``, ``quaternion`` or ``s2s2``.
    pose_rate
        Adam's step for the numbers of a pose.
    """

    parametrisation: str = "s2s2"
    pose_rate: float = 0.03


@dataclass(frozen=True)
class AmortizedConfig(DecoderConfig):
    """The orientation autoencoder (papers/001), with what makes it work.

    Attributes
    ----------
    parametrisation
        ``euler``, ``quaternion`` or ``s2s2``.
    heads
        Poses proposed per image, with ``polar`` from each direction; the best of all is followed (winner takes all), and the network learns
        which it will be.
    copies
        Copies of each image that the network is shown, of which the best candidate is followed: ``c1`` the image alone (papers/001), ``c2`` it
        and its half turn, ``c4`` its quarter turns, ``d4`` these and their mirror images. What is found turns with the image exactly.
    augmented
        Show the network each image turned by a random quarter turn and mirrored or not, at every step anew.
    polar
        Convolve over rings about the centre, and propose ``heads`` poses from each of 8 directions of the plane, which turn with the image.
    normalised, he
        Batch normalisation, and He's starting weights.
    matched
        Show the network images multiplied by their CTF.
    fit_shift
        Whether the network says where the particle is.
    objective
        ``best``: the best candidate of each image is followed and its weight grows; ``elbo``: the candidates are a posterior, whose
        evidence lower bound is climbed.
    gauss_newton
        Gauss-Newton steps that each image's best pose is moved by under the map before the map's gradient is taken; the network learns
        the pose they come to. 0: map and network follow the proposed pose.
    gauss_newton_from
        Share of the steps before the first of these.
    side
        Pixels across what the network sees, 1.25 particle diameters; 0 shows whole images as they are.
    encoder_rate
        Adam's step for the network's weights.
    bfloat16
        Convolve in bfloat16 where the device has instructions for it, elsewhere in float32.
    starts, trial
        Random starts, and the share of the steps that each makes before all but the one that leaves least of the images unexplained are
        given up (:func:`~cryorbit.methods.amortized.from_starts`).
    """

    parametrisation: str = "s2s2"
    heads: int = 2
    copies: str = "c1"
    augmented: bool = True
    polar: bool = True
    normalised: bool = True
    he: bool = True
    matched: bool = True
    fit_shift: bool = True
    objective: str = "best"
    gauss_newton: int = 0
    gauss_newton_from: float = 0.5
    side: int = 16
    encoder_rate: float = 1e-3
    bfloat16: bool = True
    starts: int = 3
    trial: float = 0.15


def _checked_together(config: AmortizedConfig) -> None:
    """Refuse settings of which one leaves the other nothing to do."""
    if config.augmented and config.copies == "d4":
        raise ConfigError(
            "CONF505",
            "augmented with copies d4: every turned and mirrored copy is shown already",
            "set augmented=false, or copies to c1, c2 or c4",
        )
    if config.polar and config.copies != "c1":
        raise ConfigError(
            "CONF508",
            f"polar with copies {config.copies}: what is proposed turns with the image already",
            "set copies=c1, or polar=false",
        )
    if config.objective == "elbo" and config.likelihood != "noise":
        raise ConfigError(
            "CONF506",
            f"objective elbo with likelihood {config.likelihood}: a posterior needs the noise",
            "set likelihood=noise, or objective=best",
        )
    if config.objective == "elbo" and config.gauss_newton:
        raise ConfigError(
            "CONF507",
            f"objective elbo with gauss_newton {config.gauss_newton}: the bound has no single pose to refine",
            "set gauss_newton=0, or objective=best",
        )


def checked(config: DecoderConfig) -> None:
    """Refuse settings no run can use."""
    checked_volume(config.volume)
    fine = {
        "steps": config.steps > 0,
        "batch": config.batch > 0,
        "likelihood": config.likelihood in LIKELIHOODS,
        "radius_start": config.radius_start >= 0,
        "radius_end": config.radius_end == 0 or config.radius_end >= max(config.radius_start, 1),
        "march": 0 <= config.march <= 1,
        "volume_rate": config.volume_rate > 0,
        "field_width": 0 < config.field_width <= 4096,
        "field_rate": config.field_rate > 0,
    }
    if isinstance(config, TableConfig | AmortizedConfig):
        fine["parametrisation"] = config.parametrisation in PARAMETRISATIONS
    if isinstance(config, TableConfig):
        fine["pose_rate"] = config.pose_rate > 0
    if isinstance(config, AmortizedConfig):
        fine |= {
            "batch": config.batch > 1 or not config.normalised,
            "heads": 1 <= config.heads <= 64,
            "gauss_newton": 0 <= config.gauss_newton <= 20,
            "gauss_newton_from": 0 <= config.gauss_newton_from < 1,
            "objective": config.objective in OBJECTIVES,
            "copies": config.copies in GROUPS,
            "side": config.side == 0 or config.side >= (16 if config.polar else 8),
            "encoder_rate": config.encoder_rate > 0,
            "starts": 1 <= config.starts <= 100,
            "trial": 0 < config.trial <= 1,
        }
    for name, good in fine.items():
        if not good:
            raise ConfigError(
                "CONF502",
                f"{name} = {getattr(config, name)!r} is out of range",
                f"likelihood: {', '.join(LIKELIHOODS)}; parametrisation: {', '.join(PARAMETRISATIONS)}; copies: {', '.join(GROUPS)}; "
                f"objective: {', '.join(OBJECTIVES)}; radii not negative and the last at least the first; march 0 to 1; heads 1 to 64; "
                "gauss_newton 0 to 20, from a share of the steps below 1; side 0 or at least 8, 16 where polar; starts 1 to 100, each "
                "for a trial above 0 and up to 1 of the steps; counts and rates positive, batches of 2 or more where they are normalised",
            )
    if isinstance(config, AmortizedConfig):
        _checked_together(config)
