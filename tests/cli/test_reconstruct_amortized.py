"""``cryorbit reconstruct --method amortized`` through a real process: chance is called chance, and halves are learnt apart."""

import json
from pathlib import Path

import pytest
from processes import FINAL, cryorbit

from cryorbit.simulate.particles import make_projector
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import SimulationSettings
from cryorbit.simulate.write import write_simulation
from cryorbit.training.checkpoint import load_checkpoint

FEW = ["amortized.steps=4", "amortized.side=16", "abinitio.order=1", "refine.sweeps=1", "refine.search_every=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("amortized")
    write_simulation(
        folder / "in", make_projector(phantom(), 16, 6.0), SimulationSettings(count=60, snr_db=0.0, seed=2)
    )
    settings = [f"--set={text}" for text in FEW]
    star = folder / "in" / "particles.star"
    done = cryorbit(
        "reconstruct", star, "-o", folder / "run", "--method", "amortized", "--mask-diameter", "70", *settings
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_a_run_that_stayed_at_chance_says_so(finished):
    run, said = finished
    assert "Do not trust this map" in said
    assert "--method marginal" in said
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["method"] == "amortized"
    assert metrics["probability_right"] < 0.5
    assert metrics["halves_same_pose"] < 0.6
    for name in FINAL:
        assert (run / name).stat().st_size > 0, name


def test_each_half_is_learnt_from_its_own_images(finished):
    run, _ = finished
    stages = [json.loads(line)["stage"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert stages.count("amortized 1") == stages.count("amortized 2") == 6  # the first step from three starts
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()[:3]]
    assert [line["start"] for line in lines] == ["0", "1", "2"]
    assert len({line["unexplained"] for line in lines}) == 3  # of the same images
    assert stages.index("abinitio") == 12  # what they learnt is improved on
    first, second = (load_checkpoint(run / "checkpoint" / f"amortized_{half}.safetensors")[0] for half in (1, 2))
    last = "encoder.network.last.weight"
    one, other = (next(v for k, v in state.items() if k.endswith(last)) for state in (first, second))
    assert float((one - other).abs().max()) > 0.01
