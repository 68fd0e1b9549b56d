"""Finds libturnout.so, checks that it fits the running torch, and loads it.

A library built against another torch fails with a missing symbol, or not at all and later with wrong results, so the
version that it was built for, written beside it by the build, is compared before it is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_LIBRARY = "libturnout.so"
_BUILT_FOR = "torch_version.txt"
_PACKAGE = Path(__file__).resolve().parent


def find() -> Path:
    """Path of the library: what TURNOUT_LIBRARY names, else beside this package (a wheel), else in the build folder
    of the checkout that this package stands in.

    Raises ImportError that lists where it looked.
    """
    named = os.environ.get("TURNOUT_LIBRARY")
    if named:
        path = Path(named)
        if path.is_dir():
            path = path / _LIBRARY
        if not path.is_file():
            raise ImportError(f"turnout: TURNOUT_LIBRARY is {named!r}, but there is no {_LIBRARY}")
        return path.resolve()
    candidates = [_PACKAGE / _LIBRARY, _PACKAGE.parents[1] / "build" / "lib" / _LIBRARY]
    for path in candidates:
        if path.is_file():
            return path
    looked = "\n  ".join(str(path) for path in candidates)
    raise ImportError(
        f"turnout: {_LIBRARY} was not found. Looked at\n  {looked}\nand at the environment variable TURNOUT_LIBRARY, "
        f"which is not set. {_how_to_build(_PACKAGE)}"
    )


def check_torch(library: Path, installed: str) -> None:
    """Compares the torch that `library` was built for with the one that is `installed`.

    Raises ImportError that names both and the command that rebuilds.
    """
    record = library.parent / _BUILT_FOR
    if not record.is_file():
        raise ImportError(
            f"turnout: {record} is missing, so it is unknown which torch {library} was built for. "
            f"{_how_to_build(library.parent)}"
        )
    built_for = record.read_text(encoding="utf-8").strip()
    if built_for != installed:
        raise ImportError(
            f"turnout: {library} was built for torch {built_for}, but torch {installed} is installed. "
            f"{_how_to_build(library.parent)}"
        )


def _how_to_build(folder: Path) -> str:
    if folder == _PACKAGE and not (_PACKAGE.parents[1] / "CMakeLists.txt").is_file():
        return (
            "Build it for this torch: in a checkout of turnout, run "
            "`pip install --no-build-isolation --no-deps --force-reinstall .`"
        )
    return "Build it for this torch: in the checkout, run `make build`"


def load() -> Path:
    """Loads the library once; its ops are then in torch.ops.turnout. Returns the path."""
    path = find()
    check_torch(path, torch.__version__)
    torch.ops.load_library(str(path))
    return path
