"""The report renders from a run folder's files, says what is missing, and never needs torch."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cryorbit.errors import RunError
from cryorbit.report.figures import draw_orientations, history_figure, orientations_figure
from cryorbit.report.render import write_report
from cryorbit.report.rundata import load_run
from cryorbit.report.style import figure

FIGURES = ("fsc", "slices", "orientations", "examples", "overview")


def test_page_holds_the_numbers_and_nothing_from_outside(finished_run: Path) -> None:
    page = write_report(finished_run)
    text = page.read_text()
    assert page == finished_run / "report.html"
    assert "7.43 Å" in text
    assert "8.21 Å" in text
    assert "1.37" in text
    assert "2 min 11 s" in text
    assert "repeat with another seed" in text
    assert "&lt;unmodulated&gt; images" in text  # text from files is escaped
    assert text.count("data:image/png;base64,") == 6  # fsc, slices, orientations, examples, history, noise
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:|//)", text)
    assert "cryorbit evaluate writes evaluation.json" in text


def test_figures_lie_beside_the_page(finished_run: Path) -> None:
    write_report(finished_run)
    for name in FIGURES:
        with Image.open(finished_run / "figures" / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] > 900
        assert pixels.std() > 10


def test_missing_and_damaged_pieces_are_named_and_the_rest_is_shown(
    fabricate: Callable[[Path], Path], tmp_path: Path
) -> None:
    run = fabricate(tmp_path / "run")
    (run / "report_data.npz").unlink()
    (run / "map.mrc").write_bytes(b"nothing")
    (run / "provenance.json").write_text("{")
    (run / "history.jsonl").write_text("")
    text = write_report(run).read_text()
    assert "report_data.npz is not in the run folder" in text
    assert "provenance.json cannot be read" in text
    assert "the history holds no numbers" in text
    assert "map.mrc" in load_run(run).missing
    assert text.count("data:image/png;base64,") == 3  # fsc, orientations, noise
    assert "7.43 Å" in text


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(
        '{"stage": "abinitio", "step": 0, "x": 1.0}\n{"stage": "abinitio", "step": 1, "x": 2.0}\n'
    )
    text = write_report(tmp_path).read_text()
    assert "unfinished or damaged: metrics.json is not in the run folder" in text
    assert text.count("data:image/png;base64,") == 1


def test_a_comparison_with_the_truth_is_shown(fabricate: Callable[[Path], Path], tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    (run / "evaluation.json").write_text(
        '{"resolution_0.5_masked_A": 6.66, "resolution_0.5_A": 7.77, "hand": "mirrored", '
        '"poses": {"median_deg": 1.234, "chance_median_deg": 126.1}}'
    )
    text = write_report(run).read_text()
    assert "6.66 / 7.77 Å" in text
    assert "1.23 / not given degrees" in text
    assert "126.1 degrees" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="RUN020"):
        write_report(tmp_path)
    with pytest.raises(RunError, match="RUN020"):
        write_report(tmp_path / "absent")


def test_even_views_are_drawn_even() -> None:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(40_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    drawn = draw_orientations(figure(4.0, 3.0).add_subplot(projection="mollweide"), directions)
    cells = np.asarray(drawn.get_array())
    assert cells.mean() == pytest.approx(1.0, abs=0.01)
    assert cells.std() < 0.15
    top = np.array([[0.0, 0.0, 1.0]] * 500)
    cells = np.asarray(draw_orientations(orientations_figure(top).add_subplot(projection="mollweide"), top).get_array())
    assert cells[-1].mean() == pytest.approx(0.75 * 7, rel=0.01)  # seven rows; what smoothing leaves in the polar one


def test_history_without_numbers_draws_nothing() -> None:
    assert history_figure([{"stage": "a", "step": 0, "note": "x"}, {"stage": "a", "step": 1, "note": "y"}]) is None


def test_importing_the_report_does_not_import_torch() -> None:
    code = "import sys, cryorbit.report.render, cryorbit.cli.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
