"""Settings of the ab initio engine."""

import math
from dataclasses import dataclass

FINEST = 4
"""HEALPix order of the finest grid."""


@dataclass(frozen=True)
class MarginalConfig:
    """Settings of the ab initio engine. Radii count Fourier pixels of a box as wide as the particle, so they hold for any pixel size.

    Attributes
    ----------
    starts
        Runs from random starts on each half; with a symmetry of 4 or more elements four times as many, each the cheaper for it.
    heats
        Most rounds of starts; another follows while the halves give less than 60 % of the images the same pose and the last
        one found a likelier map.
    batch
        Images per run and step at first; grows by a quarter with every step that leaves posteriors broad, and to 2,000 while halves
        that have settled give less than 60 % of the images the same pose.
    order
        HEALPix order of the rotation grid (2: 4,608 rotations, 15 degrees apart). With an imposed symmetry of 8 or more elements one
        more from where a single run is left to each half: its asymmetric unit is then as long a list as the whole grid was.
    radius_start, radius_end
        Fourier radius at the first step and at the end, in units of 1 / particle diameter. With an imposed symmetry of S elements the
        first is ``S**(1/4)`` and the last ``S**(1/8)`` times as large: a symmetric map has that much less to tell at low resolution.
    march_steps
        Steps from the first radius to the last while posteriors are sharp; four times as many while they are broad.
    settle_steps
        Most steps at the last radius, with slowly forgotten statistics; fewer when the halves' correlation stands still, up to four
        times as many while halves pose images differently and more steps help.
    decay, settle_decay
        Factor on the old statistics at each step, while marching and while settling.
    sharp
        Posteriors count as sharp when the median effective number of poses is below this; on a grid one order finer an eighth of it, as
        grids of ``order`` count, sets the pace.
    shift_range
        Largest shift searched, in particle diameters; 0 searches none.
    tau_fudge
        Factor on the signal power in the Wiener prior (larger: noisier, more detailed map).
    modes
        Distinct poses per image handed to refinement.
    """

    starts: int = 2
    heats: int = 3
    batch: int = 200
    order: int = 2
    radius_start: float = 4.4
    radius_end: float = 10.5
    march_steps: int = 24
    settle_steps: int = 8
    decay: float = 0.6
    settle_decay: float = 0.8
    sharp: float = 50.0
    shift_range: float = 0.1
    tau_fudge: float = 0.5
    modes: int = 6

    def radii(self, elements: int) -> tuple[float, float]:
        """First and last Fourier radius under a group of so many elements, in units of 1 / particle diameter."""
        last = self.radius_end * elements**0.125
        return min(self.radius_start * elements**0.25, last), last

    def order_of(self, elements: int) -> int:
        """HEALPix order that leaves an asymmetric unit of so many elements no more rotations than ``order`` has for all of them."""
        return min(self.order + 1, FINEST) if elements >= 8 else self.order

    def most_steps(self, joined_from: float, extensions: int) -> int:
        """Steps if posteriors stay broad throughout, every heat settles ``extensions`` times more, and the halves never agree."""
        joined = math.ceil(4 * (1 - joined_from) * self.march_steps) + self.settle_steps
        heat = (
            4 * self.march_steps + 1 + (1 + extensions) * self.settle_steps
        )  # sums of 0.25 / march_steps may end just below 1
        return self.heats * heat + joined + 1
