"""Compiled kernels where nothing may be written."""

import os
from pathlib import Path

import cryorbit


def test_compiled_code_has_a_folder_where_neither_package_nor_home_can_be_written(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of" / "nobody"))
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(Path(path)) is not None)
    monkeypatch.setattr(cryorbit.atexit, "register", lambda *_, **__: None)
    monkeypatch.setattr(cryorbit.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    cryorbit._keep_compiled_code()
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "cryorbit-")
    assert asked == [Path(cryorbit.__file__).parent, tmp_path]
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    cryorbit._keep_compiled_code()
    assert "NUMBA_CACHE_DIR" not in os.environ
