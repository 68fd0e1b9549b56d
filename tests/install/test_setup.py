"""The set-up is quick and silent once done, and says which step broke, why, and what to do."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(script, **environment):
    return subprocess.run(["bash", script], env=environment, text=True, capture_output=True)


def test_second_run_is_quick_and_says_nothing():
    started = time.monotonic()
    result = run(ROOT / "scripts" / "setup.sh", **os.environ)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and time.monotonic() - started < 5


@pytest.fixture
def checkout(tmp_path):
    """The set-up's files alone, without an environment."""
    for name in ("scripts", "requirements", "cmake"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(checkout, name, body):
    tool = checkout / "bin" / name
    tool.write_text(f"#!/bin/bash\n{body}\n")
    tool.chmod(0o755)


def broken(checkout):
    result = run(checkout / "scripts" / "setup.sh", PATH=f"{checkout}/bin:/usr/bin:/bin", HOME=str(checkout))
    assert result.returncode == 1
    return result.stderr


def test_old_compiler(checkout):
    stand_in(checkout, "g++", "echo 9.4.0")
    message = broken(checkout)
    assert "failed at: compiler" in message
    assert "why: g++ is version 9.4.0" in message
    assert "do:  install g++ 12" in message


def test_missing_headers_where_nobody_may_install(checkout):
    stand_in(checkout, "g++", 'if [[ "$1" == -dumpversion ]]; then echo 12; else exit 1; fi')
    stand_in(checkout, "id", "echo 1000")
    stand_in(checkout, "sudo", "exit 1")
    stand_in(checkout, "apt-get", "exit 1")
    message = broken(checkout)
    assert "failed at: Debian packages" in message
    assert "apt-get install -y libcli11-dev nlohmann-json3-dev libgtest-dev libbenchmark-dev libgloo-dev" in message


def test_old_python(checkout):
    stand_in(checkout, "python3", 'if [[ "$1" == --version ]]; then echo Python 3.9.2; else exit 1; fi')
    message = broken(checkout)
    assert "failed at: Python" in message and "Python 3.9.2 is too old" in message


def test_failed_download(checkout):
    stand_in(checkout, "python3", 'if [[ "$2" != venv ]]; then exit 0; fi; mkdir -p .venv/bin\n'
             'printf "#!/bin/bash\\necho no route to host; exit 1\\n" >.venv/bin/python; chmod +x .venv/bin/python')
    message = broken(checkout)
    assert "failed at: torch" in message and "no route to host" in message and "check the network" in message


@pytest.mark.parametrize("fits", [True, False])
def test_active_environment_is_used_where_its_torch_fits(checkout, fits):
    stand_in(checkout, "python", "exit 0" if fits else "exit 1")
    found = run(checkout / "scripts" / "python.sh", PATH="/usr/bin:/bin", VIRTUAL_ENV=str(checkout))
    assert found.stdout.strip() == str(checkout / ("bin" if fits else ".venv/bin") / "python")
