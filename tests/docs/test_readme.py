"""The README's examples are what the tests compile and run."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SAMPLE = ROOT / "tests" / "install" / "sample"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_cpp_example_is_the_sample_project_that_the_installation_test_builds():
    assert blocks("cpp") == [(SAMPLE / "main.cpp").read_text()]
    for line in blocks("cmake")[0].splitlines():
        assert line in (SAMPLE / "CMakeLists.txt").read_text().splitlines()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_example_runs(code):
    result = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("torch.Size([")


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
