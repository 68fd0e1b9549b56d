"""`cmake --install` gives a prefix that can move and that a project outside the tree finds, or is told why not."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SAMPLE = pathlib.Path(__file__).parent / "sample"
TOOLS = pathlib.Path(sys.executable).parent
ENVIRONMENT = {"PATH": f"{TOOLS}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}


def run(*command, **options):
    return subprocess.run([str(word) for word in command], env=ENVIRONMENT, text=True, capture_output=True, **options)


def succeed(*command, **options):
    result = run(*command, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    succeed("cmake", "--install", BUILD, "--prefix", folder / "first")
    shutil.move(folder / "first", folder / "moved")
    return folder / "moved"


def configure(prefix, build, *options):
    return run("cmake", "-G", "Ninja", "-S", SAMPLE, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", *options)


def test_project_outside_the_tree_builds_and_runs(prefix, tmp_path):
    configured = configure(prefix, tmp_path, f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release")
    assert configured.returncode == 0, configured.stderr
    succeed("cmake", "--build", tmp_path)
    version = (prefix / "lib" / "torch_version.txt").read_text().strip()
    assert succeed(tmp_path / "sample").splitlines() == [
        "output [4, 16, 64]", "rows of the 8 experts: 128", f"turnout 0.1.0 for torch {version}"]


def test_prefix_holds_no_path_of_the_build(prefix):
    for path in (prefix / "lib" / "cmake" / "turnout").iterdir():
        assert str(ROOT) not in path.read_text(), path
    library = (prefix / "lib" / "libturnout.so").read_bytes()
    assert str(BUILD).encode() not in library


def test_installed_program_runs(prefix):
    assert "0.1.0" in succeed(prefix / "bin" / "turnout", "--version")


def fake_torch(folder, version):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "torch"


@pytest.mark.parametrize("version, reason", [
    ("2.14.99", "but torch 2.14.99 was found in"),
    ("2.10.0", "torch 2.10.0 in * does not fit: Turnout accepts at least 2.11 and below 2.16"),
    ("2.16.0", "torch 2.16.0 in * does not fit: Turnout accepts at least 2.11 and below 2.16"),
])
def test_another_torch_is_refused_in_words(prefix, tmp_path, version, reason):
    torch = fake_torch(tmp_path / "site", version)
    result = configure(prefix, tmp_path / "build", f"-DTURNOUT_TORCH_DIR={torch}")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    for part in reason.split("*"):
        assert part.strip() in message, result.stderr


def needed_openmp(library):
    lines = succeed("readelf", "-d", library).splitlines()
    return {line.split("[")[1].rstrip("]") for line in lines if "NEEDED" in line and "omp" in line}


def test_one_openmp_runtime(prefix):
    """What the library needs of OpenMP has the name that torch loads it by, so a process holds it once."""
    site = next(pathlib.Path(path) for path in sys.path if (pathlib.Path(path) / "torch" / "lib").is_dir())
    assert needed_openmp(prefix / "lib" / "libturnout.so") <= needed_openmp(site / "torch" / "lib" / "libtorch_cpu.so")
