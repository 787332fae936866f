"""Everything that is measured when a run is laid beside the truth, as plain numbers for a table or a JSON file."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.metrics.align import PoseAlignment, align_poses, align_volumes, chance_level
from cryorbit.metrics.fsc import fsc, resolution
from cryorbit.metrics.masks import mask_from_map
from cryorbit.types import Poses, Volume


@dataclass(frozen=True)
class MapComparison:
    """A map beside the true one, after alignment over rotation, shift and hand.

    ``fsc`` and ``fsc_masked`` (shells,); resolutions in angstrom; ``correlation`` Pearson over the box,
    ``correlation_masked`` inside a soft mask drawn from the truth; ``hand`` ``"same"`` or ``"mirrored"``; ``aligned``
    the map in the true frame.
    """

    fsc: Float[Tensor, " shells"]
    fsc_masked: Float[Tensor, " shells"]
    resolution_05: float
    resolution_05_masked: float
    resolution_0143: float
    resolution_0143_masked: float
    correlation: float
    correlation_masked: float
    hand: str
    score: float
    score_other_hand: float
    hand_undecided: bool
    aligned: Volume

    def values(self) -> dict[str, object]:
        """For ``evaluation.json``."""
        return {
            "resolution_0.5_A": self.resolution_05,
            "resolution_0.5_masked_A": self.resolution_05_masked,
            "resolution_0.143_A": self.resolution_0143,
            "resolution_0.143_masked_A": self.resolution_0143_masked,
            "correlation": self.correlation,
            "correlation_masked": self.correlation_masked,
            "hand": self.hand,
            "hand_score": self.score,
            "hand_score_other": self.score_other_hand,
            "hand_undecided": self.hand_undecided,
            "fsc": [float(v) for v in self.fsc],
            "fsc_masked": [float(v) for v in self.fsc_masked],
        }


def compare_maps(estimated: Volume, truth: Volume, poses: PoseAlignment | None = None) -> MapComparison:
    """Align ``estimated`` to ``truth`` (trying what the poses say among the rest) and measure.

    The truth is one noise-free map, so FSC 0.5 is the customary threshold; 0.143 is reported too.
    """
    start = None if poses is None else (poses.rotation, poses.shift, poses.mirrored)
    found = align_volumes(estimated, truth, start=start)
    a, b = found.map.data.to(torch.float32), truth.data.to(torch.float32)
    mask = mask_from_map(b, truth.pixel_size)
    plain, masked = fsc(a, b), fsc(a * mask, b * mask)
    box, pixel_size = truth.box, truth.pixel_size
    weight = mask.flatten().double()
    centred = [v.flatten().double() - (v.flatten() * weight).sum() / weight.sum() for v in (a, b)]
    cross, left, right = (
        (x * y * weight).sum()
        for x, y in ((centred[0], centred[1]), (centred[0], centred[0]), (centred[1], centred[1]))
    )
    return MapComparison(
        fsc=plain,
        fsc_masked=masked,
        resolution_05=resolution(plain, 0.5, box, pixel_size),
        resolution_05_masked=resolution(masked, 0.5, box, pixel_size),
        resolution_0143=resolution(plain, 0.143, box, pixel_size),
        resolution_0143_masked=resolution(masked, 0.143, box, pixel_size),
        correlation=found.correlation,
        correlation_masked=float(cross / (left * right).sqrt().clamp(min=1e-30)),
        hand="mirrored" if found.mirrored else "same",
        score=found.score,
        score_other_hand=found.score_other_hand,
        hand_undecided=found.hand_undecided,
        aligned=found.map,
    )


def compare_poses(
    estimated: Poses, true: Poses, pixel_size: float, symmetry: Float[Tensor, "s 3 3"] | None = None
) -> tuple[PoseAlignment, dict[str, object]]:
    """Align poses over all particles; the alignment, and its numbers for ``evaluation.json`` with the level of chance
    beside them.
    """
    found = align_poses(estimated, true, symmetry)
    chance = chance_level(estimated, true, torch.Generator().manual_seed(0), symmetry)
    values: dict[str, object] = {
        **asdict(found.summary(pixel_size)),
        "chance_median_deg": float(torch.rad2deg(torch.tensor(chance))),
        "hand": "mirrored" if found.mirrored else "same",
        "mean_capped_deg": float(torch.rad2deg(torch.tensor(found.cost))),
        "mean_capped_other_hand_deg": float(torch.rad2deg(torch.tensor(found.cost_other_hand))),
        "origin_shift_A": [float(v) for v in found.shift],
    }
    return found, values
