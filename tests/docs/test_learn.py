"""docs/learn.md: its commands print what it shows, and its text names no number that they do not print."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("TURNOUT_PROGRAM", ROOT / "build" / "bin" / "turnout"))
PAGE = (ROOT / "docs" / "learn.md").read_text()
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w]|\.\d)")


def sections():
    """Title and text of each part of the page."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.M)
    return list(zip(parts[1::2], parts[2::2]))


def sessions(text):
    """(command, lines that it printed) of each $ in the console blocks of a text."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *output = part.rstrip("\n").split("\n")
            yield command, output


def run(command, folder):
    words = shlex.split(command)
    assert words[0] == "turnout", command
    done = subprocess.run([PROGRAM, *words[1:]], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n").split("\n")


def agree(shown, printed):
    """Equal text; a number with a fraction may differ by one in its last digit, as instruction sets round differently."""
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed)):
        digits = len(a.partition(".")[2])
        if a != b and (digits == 0 or abs(float(a) - float(b)) > 1.01 * 10 ** -digits):
            return False
    return True


ALL = [(title, command, output) for title, text in sections() for command, output in sessions(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's commands run, one after the other: a folder that holds the documentation."""
    folder = tmp_path_factory.mktemp("learn")
    shutil.copytree(ROOT / "docs", folder / "docs")
    return folder


@pytest.mark.parametrize("title, command, output", ALL, ids=[command for _, command, _ in ALL])
def test_each_command_prints_what_the_page_shows(title, command, output, folder):
    printed = iter(run(command, folder))
    for line in output:
        if line.strip() == "...":  # lines that the page leaves out
            continue
        assert any(agree(line, candidate) for candidate in printed), f"{title}: {command} no longer prints\n{line}"


@pytest.mark.parametrize("title, text", sections(), ids=[title for title, _ in sections()])
def test_each_number_in_the_text_is_one_that_was_printed(title, text):
    shown = [number for command, output in sessions(text) for line in [command, *output] for number in NUMBER.findall(line)]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    prose = re.sub(r"\]\([^)]*\)|arXiv:[\d.]+", "", prose)
    for number in NUMBER.findall(prose):
        digits = len(number.partition(".")[2])
        known = any(f"{abs(float(other)):.{digits}f}" == number.lstrip("-") for other in shown)
        assert known, f"{title}: {number} stands in the text, but no command of this part prints it"


def test_the_tour_follows_its_order_and_has_commands():
    titles = [title for title, _ in sections()]
    for earlier, later in zip(["gate", "choices", "capacity", "dispatch", "combine", "loss", "levels"],
                              ["choices", "capacity", "dispatch", "combine", "loss", "levels", "trained"]):
        position = {word: next(i for i, title in enumerate(titles) if word in title.lower()) for word in (earlier, later)}
        assert position[earlier] < position[later]
    assert len(ALL) >= 8
