"""``cryorbit simulate-mra`` and ``cryorbit mra``: files in, files out, and a coded error for every bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from cryorbit.cli.mra import RESULTS, SET, mra, simulate_mra
from cryorbit.errors import CryorbitError
from cryorbit.io.observations import read_observations, read_pair
from cryorbit.metrics.signals import FINE, signal_error
from cryorbit.physics.fourier import signal_to_fourier
from cryorbit.physics.moments import analytic_moments
from cryorbit.pipeline.mra import METHODS, recover

COUNT = 8000
app = Typer()
app.command("mra")(mra)
app.command("simulate-mra")(simulate_mra)


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mra") / "set"
    run("simulate-mra", "--output", folder, "--count", COUNT, "--length", "25", "--seed", "3")
    return folder


def test_a_set_is_what_it_says(made):
    table = read_observations(made / "observations.npy")
    signal, density = read_pair(made / "truth.npz")
    assert table.shape == (COUNT, 25)
    assert sorted(p.name for p in made.iterdir()) == sorted(SET)
    first = torch.from_numpy(np.array(table)).mean(0).double()
    expected = analytic_moments(torch.from_numpy(signal), torch.from_numpy(density))
    assert float((signal_to_fourier(first) - expected.first).norm() / expected.first.norm()) < 0.05
    with pytest.raises(CryorbitError, match="RUN301"):
        run("simulate-mra", "--output", made)


def test_recovers_and_writes_every_file(made, tmp_path):
    out = tmp_path / "out"
    text = run("mra", made / "observations.npy", "-o", out, "--sigma", "1", "--truth", made / "truth.npz")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["observations"] == COUNT
    assert metrics["signal_error"] < 0.06
    assert metrics["density_error"] < 0.1
    assert "signal off by" in text
    assert sorted(p.name for p in out.iterdir()) == sorted(RESULTS)
    signal, density = read_pair(out / "mra.npz")
    truth = read_pair(made / "truth.npz")
    assert np.linalg.norm(signal - truth[0]) / np.linalg.norm(truth[0]) == pytest.approx(metrics["signal_error"])
    assert np.linalg.norm(density - truth[1]) < 0.1 * np.linalg.norm(truth[1])
    rows = np.loadtxt(out / "mra.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows[:, 1:], np.stack([signal, density], 1), rtol=1e-6, atol=1e-8)
    assert (out / "mra.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CryorbitError, match="RUN301"):
        run("mra", made / "observations.npy", "-o", out, "--sigma", "1")
    run("mra", made / "observations.npy", "-o", out, "--sigma", "auto", "--method", "spectral", "--overwrite")
    estimated = json.loads((out / "metrics.json").read_text())
    assert estimated["sigma_estimated"]
    assert estimated["sigma"] == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("method", [m if m != "lbfgs" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_beats_no_method(method, made):
    """Against the mean observation as the signal, which is what one has without a method."""
    table = read_observations(made / "observations.npy")[:3000]
    signal = torch.from_numpy(read_pair(made / "truth.npz")[0])
    found = recover(table, 1.0, method)
    blurred = float(signal_error(torch.from_numpy(np.array(table)).mean(0).double(), signal, FINE))
    assert float(signal_error(found.signal, signal, FINE)) < 0.3 * blurred
    assert float(found.density.sum()) == pytest.approx(1.0)


def test_formats_hold_the_same_table(made, tmp_path):
    table = np.array(read_observations(made / "observations.npy")[:50])
    np.savetxt(tmp_path / "a.csv", table, delimiter=",")
    np.savez(tmp_path / "a.npz", table)
    np.savez(tmp_path / "b.npz", other=np.zeros(3), observations=table)
    named = ",".join(f"x{i}" for i in range(table.shape[1])) + "\n" + (tmp_path / "a.csv").read_text()
    (tmp_path / "named.csv").write_text(named, encoding="utf-8-sig")
    shutil.copy(tmp_path / "a.npz", tmp_path / "zip.npy")
    for name in ("a.csv", "a.npz", "b.npz", "named.csv", "zip.npy"):
        np.testing.assert_allclose(read_observations(tmp_path / name), table, rtol=1e-6)
    np.save(tmp_path / "whole.npy", np.arange(40).reshape(8, 5))
    assert read_observations(tmp_path / "whole.npy").dtype == np.float32


def test_uniform_shifts_are_told(generator, tmp_path):
    signal = torch.randn(21, generator=generator)
    shifts = torch.randint(21, (4000,), generator=generator)
    data = torch.stack([signal.roll(int(s)) for s in shifts]) + torch.randn(4000, 21, generator=generator)
    assert any("uniform" in warning for warning in recover(data.numpy(), 1.0).warnings)
    assert not any("uniform" in warning for warning in recover(data.numpy(), 1.0, "bispectrum").warnings)


BAD = {
    "missing.npy": (None, "FILE001"),
    "text.txt": ("1 2 3", "FILE003"),
    "broken.npy": ("no array", "FILE013"),
    "ragged.csv": ("1,2,3,4\n1,2,3\n", "FILE013"),
    "words.csv": ("a,b,c,d\n1,2,3,4\n1,two,3,4\n", "FILE013"),
    "flat.npy": (np.zeros(9), "DATA050"),
    "complex.npy": (np.zeros((9, 9), dtype=complex), "DATA050"),
    "row.npy": (np.zeros((1, 9)), "DATA051"),
    "narrow.npy": (np.zeros((9, 3)), "DATA051"),
    "nan.npy": (np.where(np.arange(45).reshape(9, 5) == 22, np.nan, 1.0), "DATA052.*observation 5 "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(name, tmp_path):
    content, code = BAD[name]
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(CryorbitError, match=code):
        run("mra", tmp_path / name, "-o", tmp_path / "out", "--sigma", "1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sigma", "code"), [("", "CONF407"), ("much", "CONF407"), ("-1", "CONF406"), ("nan", "CONF406"), ("50", "CONF406")]
)
def test_bad_sigma(sigma, code, made, tmp_path):
    with pytest.raises(CryorbitError, match=code):
        run("mra", made / "observations.npy", "-o", tmp_path / "out", "--sigma", sigma)
    assert not (tmp_path / "out").exists()


def test_noise_free_em_is_refused_and_leaves_nothing(made, tmp_path):
    with pytest.raises(CryorbitError, match="CONF402"):
        run("mra", made / "observations.npy", "-o", tmp_path / "out", "--sigma", "0", "--method", "em")
    assert not (tmp_path / "out").exists()


def test_an_offset_does_not_drown_the_signal(made):
    """Observations on a pedestal a thousand times their size, as raw detectors give them."""
    table = np.array(read_observations(made / "observations.npy")[:1000]).astype(np.float64)
    level, raised = (recover(table + up, 1.0, "em") for up in (0, 1000))
    a, b = level.signal - level.signal.mean(), raised.signal - raised.signal.mean()
    assert float(signal_error(b, a, FINE)) < 0.1


def test_truth_of_another_length(made, tmp_path):
    np.savez(tmp_path / "truth.npz", signal=np.arange(7.0), density=np.full(7, 1 / 7))
    with pytest.raises(CryorbitError, match="DATA404"):
        run("mra", made / "observations.npy", "-o", tmp_path / "o", "--sigma", "1", "--truth", tmp_path / "truth.npz")


def test_unknown_method(made):
    with pytest.raises(CryorbitError, match="CONF405"):
        recover(read_observations(made / "observations.npy"), 1.0, "magic")


def test_a_real_process_ends_in_one_message(tmp_path):
    command = [sys.executable, "-m", "cryorbit", "mra", str(tmp_path / "x.npy"), "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ})
    assert done.returncode == 1
    assert "CONF407" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("density", [np.full(7, -1.0), np.full(7, 5.0), np.zeros(7)], ids=["negative", "sum", "empty"])
def test_a_truth_that_is_no_density(made, tmp_path, density):
    np.savez(tmp_path / "truth.npz", signal=np.arange(7.0), density=density)
    with pytest.raises(CryorbitError, match="DATA050"):
        run("mra", made / "observations.npy", "-o", tmp_path / "o", "--sigma", "1", "--truth", tmp_path / "truth.npz")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_numbers_that_single_precision_does_not_hold(made, tmp_path, factor):
    np.save(tmp_path / "o.npy", factor * np.array(read_observations(made / "observations.npy")[:200], dtype=np.float64))
    with pytest.raises(CryorbitError, match="DATA405"):
        run("mra", tmp_path / "o.npy", "-o", tmp_path / "o", "--sigma", str(factor))
    assert not (tmp_path / "o").exists()


def test_a_set_that_cannot_be_leaves_no_folder(tmp_path):
    with pytest.raises(CryorbitError, match="CONF343"):
        run("simulate-mra", "-o", tmp_path / "o", "--sigma", "-1")
    assert not (tmp_path / "o").exists()
