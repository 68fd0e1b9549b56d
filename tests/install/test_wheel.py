"""`pip install --no-build-isolation .`: one wheel for every Python 3 that runs in a clean directory.

The wheel is built as a user's pip does it, in a folder of its own. A file that `make build` has compiled by the very same
command is not compiled once more: reuse.py hands its object over.
"""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"

EXAMPLE = """
import torch, turnout
x = torch.randn(6, 8, requires_grad=True)
ids = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2], [1, -1]])
weights = torch.full((6, 2), 0.5)
y = turnout.fused_experts(x, ids, weights, torch.randn(4, 32, 8), torch.randn(4, 8, 16), activation="swiglu")
y.sum().backward()
print(turnout.__file__, tuple(y.shape), x.grad.isfinite().all().item())
"""


def run(*command, environment=(), **options):
    tools = pathlib.Path(sys.executable).parent
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/"), **dict(environment)}
    return subprocess.run([str(word) for word in command], env=environment, text=True, capture_output=True, **options)


def reusing():
    """The launcher that takes objects of `make build` over, which is brought up to date first."""
    if run("cmake", "--build", BUILD, "--target", "turnout").returncode != 0:
        return {}
    return {"CMAKE_CXX_COMPILER_LAUNCHER": f"{sys.executable};{pathlib.Path(__file__).with_name('reuse.py')};{BUILD}"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    result = run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder,
                 "--config-settings", f"build-dir={folder / 'build'}", ROOT, environment=reusing())
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("turnout-*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A Python of its own that sees the packages of this environment and holds the wheel."""
    folder = tmp_path_factory.mktemp("venv")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    torch_site = next(path for path in sys.path if (pathlib.Path(path) / "torch").is_dir())
    (pathlib.Path(site) / "environment.pth").write_text(torch_site + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def test_tag_says_any_python_3(wheel):
    assert wheel.name.startswith("turnout-0.1.0-py3-none-linux")


def test_wheel_holds_package_library_and_version_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"turnout/__init__.py", "turnout/libturnout.so", "turnout/torch_version.txt"} <= set(names)
    assert all(name.startswith(("turnout/", "turnout-0.1.0.dist-info/")) for name in names)


def test_library_finds_torch_beside_the_package(python):
    site = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    dynamic = run("readelf", "-d", site / "turnout" / "libturnout.so").stdout
    assert "runpath: [$ORIGIN/../torch/lib]" in dynamic


def test_example_runs_in_a_clean_directory(python, tmp_path):
    result = run(python, "-c", EXAMPLE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, shape = result.stdout.strip().split(" ", 1)
    assert pathlib.Path(file).is_relative_to(python.parent.parent) and shape == "(6, 8) True"


def test_another_torch_is_refused_in_words(python, tmp_path):
    """The version beside the library is compared before the library is loaded."""
    site = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    built_for = site / "turnout" / "torch_version.txt"
    kept = built_for.read_text()
    built_for.write_text("2.12.0\n")
    try:
        result = run(python, "-c", "import turnout", cwd=tmp_path)
    finally:
        built_for.write_text(kept)
    assert result.returncode != 0
    assert "2.12.0" in result.stderr and kept.strip() in result.stderr
    assert "undefined symbol" not in result.stderr
