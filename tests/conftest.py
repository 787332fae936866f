"""Fixtures every test may use."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small problems; the cores are for the test workers

from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # how busy a machine is fails no test
hypothesis.settings.load_profile("untimed")


def _shared_data() -> Path | None:
    named = os.environ.get("CRYORBIT_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party test data beside the checkout, or named by CRYORBIT_TEST_DATA."""
    folder = _shared_data()
    if folder is None:
        pytest.skip("third-party test data not found: put it in ../shared/data or set CRYORBIT_TEST_DATA")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator, fresh for each test."""
    return torch.Generator().manual_seed(20)
