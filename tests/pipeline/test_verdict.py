"""The verdict: a chance that follows the evidence, and a sentence that says what to do."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cryorbit.pipeline.verdict import DOUBTED, RUNS, TRUSTED, WEIGHTS, Evidence, agree, judge, probability, sentence

GOOD = Evidence(
    joined=False, periods=9.5, posed=0.95, pose_difference_deg=8.0, effective=1.1, intensity_sd=0.05, spread_deg=1.2
)
NOISE = Evidence(joined=True, periods=0.5, posed=0.02, pose_difference_deg=120.0, effective=4000.0, intensity_sd=0.05)


def test_good_evidence_is_trusted_and_noise_is_not():
    assert judge(GOOD).level == "trust"
    assert judge(NOISE).level == "do not trust"
    assert probability(NOISE) < 0.1 < TRUSTED <= probability(GOOD)


@pytest.mark.parametrize(
    "change",
    [
        {"spread_deg": 15.0},
        {"spread_deg": None},
        {"posed": 0.1},
        {"periods": 2.0, "posed": 0.1},
        {"joined": True, "periods": 1.0, "posed": 0.05},
    ],
)
def test_worse_evidence_never_raises_the_chance(change):
    assert probability(replace(GOOD, **change)) < probability(GOOD)


@pytest.mark.parametrize("left", [None, -0.2, 0.0, 0.03])
def test_a_map_that_explains_the_images_keeps_its_chance(left):
    assert probability(replace(GOOD, unexplained=left)) == probability(GOOD)


def test_a_share_that_its_error_explains_is_no_mixture():
    assert probability(replace(GOOD, unexplained=0.15, unexplained_error=0.04)) == probability(GOOD)


def test_halves_that_agree_on_part_of_the_signal_are_not_trusted():
    mixed = replace(GOOD, unexplained=0.15)
    assert probability(mixed) < DOUBTED
    assert probability(replace(NOISE, unexplained=0.15)) == probability(NOISE)
    text = sentence(judge(mixed), agree(1000, 3.0, 3.4, 3.0), 3.0)
    assert text.startswith("Do not trust this map")
    assert "15 % of the images' signal unexplained" in text
    assert "classes" in text


def test_every_feature_has_a_weight():
    assert GOOD.features().keys() == WEIGHTS.keys()


def test_weights_and_table_are_those_of_the_committed_runs_and_no_hopeless_run_is_trusted():
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("success_report", benchmarks / "success_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    found = json.loads((benchmarks / "results" / "success_rate.json").read_text())
    rows, superseded = found["rows"], found["superseded"]
    assert len(rows) == RUNS
    assert report.weights_of(rows + superseded) == pytest.approx(WEIGHTS, abs=0.05)
    page = (benchmarks.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for line in report.table(rows, found["ceilings"], superseded).splitlines():
        assert line.rsplit("|", 3)[0] in page  # without chance and time
    _, chances = report.left_out_chances(rows, superseded)  # of a fit that has not seen the like
    hopeless = [chance for row, chance in zip(rows, chances, strict=True) if row["hopeless"]]
    assert len(hopeless) > 5
    assert max(hopeless) < TRUSTED


def test_sentences():
    text = sentence(judge(GOOD), agree(1000, 3.0, 3.4, 3.0), 3.0)
    assert text.startswith("Trust to 3.0 A")
    assert "the limit of the pixel size" in text
    assert "limit" not in sentence(judge(GOOD), agree(1000, 4.0, 4.4, 3.0), 4.0)
    text = sentence(judge(NOISE), agree(1000, 20.0, 30.0, 3.0), 20.0)
    assert text.startswith("Do not trust this map")
    assert "different structures" in text
    assert "--seed" in text
