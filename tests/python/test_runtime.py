"""Each implementation of the kernels that this machine has runs under the ops and gives what the loop gives."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
import turnout

ROOT = pathlib.Path(__file__).resolve().parents[2]
CPP_TESTS = ROOT / "build" / "bin" / "cpp_tests"
HERE = [choice.name for choice in turnout.kernel_choices() if "this machine lacks" not in choice.reason]


def run(command, isa):
    environment = {**os.environ, "TURNOUT_FORCE_ISA": isa, "PYTHONPATH": str(ROOT / "python")}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)


def test_one_choice_is_active_and_the_others_say_why_not():
    choices = turnout.kernel_choices()
    assert [choice.name for choice in choices][-2:] == ["portable", "reference"]
    assert sum(choice.active for choice in choices) == 1


@pytest.mark.parametrize("isa", HERE)
def test_experts_agree_with_the_loop_under_each_implementation(isa):
    """KernelChoices asserts that the forced one is the active one."""
    result = run([CPP_TESTS, "--gtest_brief=1", "--gtest_filter=*ExpertsTest*:KernelChoices*:Determinism*"], isa)
    assert result.returncode == 0 and "[  PASSED  ] 254 tests." in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("isa, words", [("avx1024", "known: "), ("", "known: ")])
def test_an_unknown_implementation_is_an_error_in_words(isa, words):
    result = run([sys.executable, "-c", "import turnout; turnout.kernel_choices()"], isa)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: turnout: TURNOUT_FORCE_ISA: ") and words in result.stderr, result.stderr


def test_scratch_is_kept_and_released():
    """Of a call whose rows of float32 alone take 16 MiB."""

    def resident():
        line = next(row for row in open("/proc/self/status") if row.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    x, ids, weights = torch.randn(8192, 256), torch.tensor([[0, 1]]).expand(8192, 2), torch.full((8192, 2), 0.5)
    up, down = torch.randn(2, 64, 256), torch.randn(2, 256, 64)
    first = turnout.fused_experts(x, ids, weights, up, down, "relu")
    kept = resident()
    turnout.release_scratch()
    assert kept - resident() > 8 << 20
    turnout.release_scratch()  # nothing is left to free
    assert torch.equal(first, turnout.fused_experts(x, ids, weights, up, down, "relu"))
