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
from cryorbit.report.figures import draw_fsc, draw_orientations, history_figure, orientations_figure
from cryorbit.report.render import _draw, write_report
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


def _half(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


def _bent(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("report_data.npz", _half),  # BadZipFile
        ("report_data.npz", _bent),  # zlib.error
        ("report_data.npz", lambda _: b""),  # EOFError
        ("report_data.npz", lambda _: b"PK\x03\x04 no archive"),
        ("metrics.json", lambda _: b"{"),
        ("metrics.json", lambda _: b"[]"),
        ("metrics.json", lambda _: b"\xff\xfe\x00"),
        ("metrics.json", lambda _: b"[" * 100_000),  # RecursionError
        ("metrics.json", lambda _: b'{"warnings": 3}'),
        ("metrics.json", lambda _: b'{"stage_seconds": [1]}'),
        ("history.jsonl", lambda _: b'{"step": 1, "x": 1.0}\n{"step": 2, "x"'),
        ("history.jsonl", lambda _: b"\x80\x81"),
        ("evaluation.json", lambda _: b"{"),
        ("evaluation.json", lambda _: b'{"poses": [1]}'),
        ("evaluation.json", lambda _: b'{"poses": {"fraction_below_5_deg": "all"}}'),
        ("fsc.csv", lambda _: b"spatial_frequency_1_per_A,fsc\n0.1,0.2,0.3\n"),
        ("fsc.csv", lambda _: b"\x00\xff"),
        ("config.toml", lambda _: b"= 3"),
    ],
)
def test_a_damaged_piece_is_told_and_the_rest_is_shown(
    fabricate: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[Path], bytes],
) -> None:
    monkeypatch.setattr("cryorbit.report.render.png", lambda _: b"picture")  # drawing is tested elsewhere
    run = fabricate(tmp_path / "run")
    (run / name).write_bytes(damage(run / name))
    text = write_report(run).read_text()
    assert name in load_run(run).missing
    assert re.search(f"(cannot be read|in {name} is|{name} holds|{name} lacks)", text)
    assert text.count("data:image/png;base64,") >= 4


@pytest.mark.parametrize(
    ("name", "content", "figure_name"),
    [
        ("metrics.json", '{"noise_variance": ["a", "b", "c"], "box": 32, "pixel_size_A": 2.0}', "noise"),
        ("evaluation.json", '{"fsc_masked": ' + str(["a"] * 17).replace("'", '"') + "}", "evaluation"),
    ],
)
def test_values_that_cannot_be_drawn_are_told(
    fabricate: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    figure_name: str,
) -> None:
    monkeypatch.setattr("cryorbit.report.render.png", lambda _: b"picture")
    run = fabricate(tmp_path / "run")
    (run / name).write_text(content)
    images, failed = _draw(load_run(run))
    assert figure_name not in images
    assert f"{name} holds values that cannot be drawn" in failed[figure_name]
    assert write_report(run).stat().st_size > 1000


@pytest.mark.parametrize("masked", [True, False])
def test_a_curve_that_never_falls_has_no_dot(masked: bool) -> None:
    s = np.linspace(0, 0.25, 17)
    high, falling = np.linspace(1.0, 0.4, 17), np.linspace(1.0, -0.05, 17)
    curves = {"spatial_frequency_1_per_A": s, "fsc": falling if masked else high}
    if masked:
        curves["fsc_masked"] = high
    axes = figure(4.0, 3.0).add_subplot()
    draw_fsc(axes, curves, None, 4.0)
    assert not [line for line in axes.lines if line.get_marker() == "o"]
    label = next(text for text in axes.texts if "Nyquist" in text.get_text())
    assert label.get_text() == "Nyquist, 4.0 Å"
    assert label.xy == (0.25, 0.4)
    axes = figure(4.0, 3.0).add_subplot()
    draw_fsc(axes, {"spatial_frequency_1_per_A": s, "fsc": falling}, None, 4.9)
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert dots[0].get_xydata().tolist() == [[pytest.approx(1 / 4.9), 0.143]]
    assert not [text for text in axes.texts if "Nyquist" in text.get_text()]


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
    (tmp_path / "classes.mrcs").touch()
    with pytest.raises(RunError, match="2-D classes"):
        write_report(tmp_path)


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
