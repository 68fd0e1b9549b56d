"""Loading: where the library is looked for, and that it is refused in words when it does not fit the torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import turnout
from turnout import _library

ROOT = Path(__file__).resolve().parents[2]


def test_version_is_the_one_of_the_build() -> None:
    declared = re.search(r"project\(turnout VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert turnout.__version__ == declared.group(1)


def test_every_name_in_all_exists() -> None:
    for module in (turnout, turnout.compat):
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_library_for_another_torch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torch_version.txt").write_text("1.2.3+cpu\n")
    with pytest.raises(ImportError) as refused:
        _library.check_torch(tmp_path / "libturnout.so", "2.99.0")
    for word in ("1.2.3+cpu", "2.99.0", "make build"):
        assert word in str(refused.value)


def test_library_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"torch_version.txt is missing"):
        _library.check_torch(tmp_path / "libturnout.so", torch.__version__)


def test_library_that_fits_is_taken(tmp_path: Path) -> None:
    (tmp_path / "torch_version.txt").write_text(torch.__version__ + "\n")
    _library.check_torch(tmp_path / "libturnout.so", torch.__version__)


def test_missing_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TURNOUT_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(ImportError, match="TURNOUT_LIBRARY is .*nothing.so"):
        _library.find()
    monkeypatch.delenv("TURNOUT_LIBRARY")
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path / "site" / "turnout")
    with pytest.raises(ImportError, match="(?s)was not found.*pip install --no-build-isolation"):
        _library.find()


def test_wrong_library_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """The library here is no library at all: were it loaded first, the error would be the loader's."""
    (tmp_path / "libturnout.so").write_text("not a library")
    (tmp_path / "torch_version.txt").write_text("2.0.0")
    environment = {**os.environ, "TURNOUT_LIBRARY": str(tmp_path), "PYTHONPATH": str(ROOT / "python")}
    run = subprocess.run([sys.executable, "-c", "import turnout"], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "ImportError: turnout: " in run.stderr
    assert "was built for torch 2.0.0" in run.stderr
