"""How far to trust a run: the chance that it is right, the reasons, and one sentence. ``benchmarks/success_rate.py`` measures it.

Two questions. Did both halves find the same poses, and what error do refined posteriors expect of theirs? A logistic function of this evidence,
fitted to runs of known outcome. And is what they found all there is in the images? The signal that the refined map leaves unexplained: two
molecules in one set can make halves agree on their average.
"""

import math
from dataclasses import dataclass

TRUSTED, DOUBTED = 0.95, 0.5
TRUST = "trust"

# Share of the signal that the map leaves, less two standard errors: some is worth a note; where half of the images show another
# molecule, whatever the halves agree on, little chance is left.
NOTED, MIXED, MIXED_CHANCE = 0.03, 0.075, 0.05

OTHERS = (
    "The images show more than this map: other molecules or states, broken particles, junk, or wrong CTFs. Sort the particles by 2-D or 3-D "
    "classes and run again with those of one"
)

OTHER_METHOD = (
    "the autoencoder may have stayed at chance, which it does from some starts: try another --seed, or --method marginal, which the chance of "
    "being right was fitted to"
)

_LOST_DEG = 90.0  # poses that are expected to be so far off are none

# Weights of a logistic function of `features`, fitted to simulated runs by benchmarks/success_rate.py --fit.
WEIGHTS = {"constant": -4.18, "periods": 1.3, "posed": 2.95, "spread": 3.1}
RUNS = 265


@dataclass(frozen=True)
class Evidence:
    """What a run knows about itself.

    Attributes
    ----------
    joined
        The halves' first maps disagreed, so both were started again from the likelier one.
    periods
        Fourier periods per particle diameter to which the halves' ab initio maps correlate by 0.5; before the join where there was one.
    posed
        Share of images to which the two ab initio maps give poses within 20 degrees; likewise.
    pose_difference_deg
        Median angle between those poses, degrees; likewise.
    effective
        Median effective number of poses per particle that ab initio left, over the asymmetric unit.
    intensity_sd
        Standard deviation over particles of how much stronger than the map each is.
    spread_deg
        Error that the refined poses' own posteriors expect, median over particles in degrees, up to a symmetry that the map shows; None, which
        counts as no pose at all, before refinement.
    unexplained, unexplained_error
        Share of the images' signal that the refined map leaves in the residual (``metrics/explained.py``) and its standard error; None where
        none was measured.
    """

    joined: bool
    periods: float
    posed: float
    pose_difference_deg: float
    effective: float
    intensity_sd: float
    spread_deg: float | None = None
    unexplained: float | None = None
    unexplained_error: float = 0.0

    @property
    def mixed(self) -> bool:
        """Whether the images show much that the map does not."""
        return self.unexplained is not None and self.unexplained - 2 * self.unexplained_error > MIXED

    def features(self) -> dict[str, float]:
        """Numbers the chance of being right is a logistic function of."""
        return {
            "constant": 1.0,
            "periods": min(self.periods, 10.0),
            "posed": self.posed,
            "spread": -math.log(min(max(self.spread_deg or _LOST_DEG, 1.0), _LOST_DEG)),
        }


@dataclass(frozen=True)
class Verdict:
    """``probability`` that the map is right (median pose error under 5 degrees, resolution within 1.3 of known poses), and why."""

    probability: float
    level: str
    reasons: tuple[str, ...]
    advice: str


def probability(evidence: Evidence) -> float:
    """Chance that the run is right."""
    score = sum(WEIGHTS[name] * value for name, value in evidence.features().items())
    chance = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, score))))
    return min(chance, MIXED_CHANCE) if evidence.mixed else chance


def judge(evidence: Evidence) -> Verdict:
    """Chance, level (``trust``, ``doubt``, ``do not trust``), reasons in words, and what to try."""
    chance = probability(evidence)
    level = TRUST if chance >= TRUSTED else "doubt" if chance >= DOUBTED else "do not trust"
    reasons = []
    if evidence.joined:
        reasons.append(
            "the two halves found different structures, and both were started again from the likelier one: "
            "their agreement is not independent"
        )
    reasons += [
        f"the halves' independent ab initio maps agree{'d' if evidence.joined else ''} to {evidence.periods:.1f} periods per particle diameter",
        f"they g{'ave' if evidence.joined else 'ive'} {100 * evidence.posed:.0f} % of the same images the same pose (within 20 degrees)",
        f"a median of {evidence.effective:.1f} poses per particle is left",
    ]
    if evidence.spread_deg is not None:
        reasons.append(f"refined poses are expected to be off by {evidence.spread_deg:.1f} degrees (median)")
    if evidence.unexplained is None:
        reasons.append("whether images show more than the map could not be measured")
    else:
        reasons.append(f"the map leaves {100 * max(evidence.unexplained, 0.0):.0f} % of the images' signal unexplained")
    advice = ""
    if evidence.mixed:
        advice = f"{OTHERS}."
    elif level != TRUST:
        advice = (
            "Compare a run with another --seed, try --preset thorough, and check mask diameter, CTF and symmetry with "
            "`cryorbit inspect`; junk and mixed particles do this too."
        )
    return Verdict(chance, level, tuple(reasons), advice)


def agree(count: int, masked: float, unmasked: float, nyquist: float) -> str:
    """How far the half maps agree, in words."""
    limit = ", the limit of the pixel size," if masked < 1.01 * nyquist else ""
    return (
        f"the half maps of {count} particles agree to {masked:.1f} A{limit} inside the molecule's mask and {unmasked:.1f} A without "
        "it (FSC 0.143)"
    )


def sentence(verdict: Verdict, agreement: str, masked: float) -> str:
    """What a biologist can act on; ``agreement`` from :func:`agree`."""
    chance = (
        f"the chance of being right is put at {math.floor(100 * verdict.probability)} % (fitted to {RUNS} simulated runs; real data hold more "
        "that can go wrong)"
    )
    because = "; ".join(verdict.reasons)
    if verdict.level == TRUST:
        return f"Trust to {masked:.1f} A: {agreement}; {because}. {chance[0].upper()}{chance[1:]}."
    opening = "Do not trust this map yet" if verdict.level == "doubt" else "Do not trust this map"
    return f"{opening}: {chance}. {because[0].upper()}{because[1:]}; {agreement}. {verdict.advice}"
