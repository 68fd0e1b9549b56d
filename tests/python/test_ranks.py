"""The program on several ranks: under torchrun, started by hand, killed and resumed, and between two network namespaces."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from program import PROGRAM, ROOT, TINY, TOKENS_A_STEP, finish, start_ranks, train, turnout, wait_for_checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))
from two_hosts import ADDRESS, Unavailable, two_hosts  # noqa: E402

SHARDS = "checkpoint-*/model.safetensors.index.json"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--standalone", "--nproc-per-node", "2"]


def held_out(stdout):
    return float(re.search(r"held-out text: ([\d.]+) bits", stdout)[1])


def alone(arguments):
    done = turnout(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_compares_on_two_ranks_and_prints_once(tmp_path, text):
    arguments = ["compare", *TINY, "--text", text, "--tokens", TOKENS_A_STEP * 20, "--evaluations", 2]
    done = subprocess.run([*TORCHRUN, PROGRAM, *map(str, arguments), "--output", tmp_path / "two"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written: ") == 1 and done.stdout.count("FLOPs a token") >= 2
    alone([*arguments, "--output", tmp_path / "one"])
    one, two = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("one", "two"))
    assert two["ranks"] == 2 and one["ranks"] == 1
    curves = [[json.loads(line) for line in (tmp_path / name / "curves.jsonl").read_text().splitlines()]
              for name in ("one", "two")]
    for a, b in zip(*curves, strict=True):
        assert abs(a["bits_per_byte"] - b["bits_per_byte"]) < 2e-3
    generated = alone(["generate", tmp_path / "two" / "moe", "--prompt", "page", "--tokens", 4])
    assert generated.startswith("page")


def test_ranks_that_were_told_different_things_say_which(tmp_path, text):
    both = [train(text, tmp_path / "out", 5), [*train(text, tmp_path / "out", 5), "--lr", 0.5]]
    endings = finish(start_ranks(both))
    for rank, (status, _, stderr) in enumerate(endings):
        assert status == 1, stderr
        assert "the ranks differ in the options of training" in stderr
        assert 'rank 1 has "learning_rate": 0.5' in stderr
        assert stderr.startswith("turnout: rank 1: " if rank else "turnout: the ranks")


@pytest.mark.parametrize(("option", "words"), [(["--checkpoint-every", 3], "rank 1 has --checkpoint-every 3"),
                                               (["--minutes", 0.1], "rank 1 has --minutes 0.1")])
def test_ranks_that_would_make_other_steps_say_so(tmp_path, text, option, words):
    endings = finish(start_ranks([train(text, tmp_path / "out", 5), [*train(text, tmp_path / "out", 5), *option]]))
    for status, _, stderr in endings:
        assert status == 1 and "the ranks differ in what they were told to do" in stderr and words in stderr, stderr


def test_a_rank_that_alone_goes_on_is_named(tmp_path, text):
    out = tmp_path / "out"
    fresh = [*train(text, out, 5), "--checkpoint-every", 2]
    assert [status for status, _, _ in finish(start_ranks(fresh))] == [0, 0]
    resumed = ["train", "--resume", "--output", out, "--checkpoint-every", 2]
    for status, _, stderr in finish(start_ranks([resumed, fresh])):
        assert status == 1, stderr
        assert "rank 0 has --resume from step 5, rank 1 has no --resume" in stderr


def test_a_killed_rank_is_named_and_the_run_resumes_on_any_number(tmp_path, text):
    out, steps = tmp_path / "out", 400
    ranks = start_ranks([*train(text, out, steps), "--checkpoint-every", 5], size=4)
    wait_for_checkpoint(out, ranks, SHARDS)
    ranks[1].send_signal(signal.SIGKILL)
    endings = finish(ranks)
    for rank in (0, 2, 3):
        status, _, stderr = endings[rank]
        assert status == 1, stderr
        assert re.search(r"turnout: (rank .: )?.* failed: rank 1 .*no longer answers", stderr.splitlines()[-1]), stderr
    resumed = alone(["train", "--resume", "--output", out])
    first = int(re.search(r"steps (\d+) to 400", resumed)[1])
    assert first > 5 and first % 5 == 1
    whole = alone(train(text, tmp_path / "whole", steps))
    assert abs(held_out(resumed) - held_out(whole)) < 0.05


def test_ranks_end_when_their_launcher_is_killed_and_the_run_resumes(tmp_path, text):
    out = tmp_path / "out"
    arguments = [*train(text, out, 400), "--checkpoint-every", 5]
    with open(tmp_path / "said", "w") as said:
        launcher = subprocess.Popen([*TORCHRUN, PROGRAM, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=said,
                                    env={**os.environ, "TURNOUT_TIMEOUT": "10"})
    wait_for_checkpoint(out, [launcher], SHARDS)
    ranks = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    launcher.kill()
    launcher.wait()
    killed = time.monotonic()
    while subprocess.run(["ps", "-o", "stat=", "-p", ",".join(ranks)], capture_output=True).stdout.strip(b"Z \n"):
        assert time.monotonic() - killed < 30
        time.sleep(0.1)
    lost = re.findall(r"failed: the launcher at .*, which holds the store, is lost", (tmp_path / "said").read_text())
    assert len(ranks) == len(lost) == 2, (tmp_path / "said").read_text()
    resumed = alone(["train", "--resume", "--output", out])
    first = int(re.search(r"steps (\d+) to 400", resumed)[1])
    assert first > 5 and first % 5 == 1


def test_ctrl_c_stops_all_ranks_at_the_same_step(tmp_path, text):
    out = tmp_path / "out"
    ranks = start_ranks([*train(text, out, 20000), "--checkpoint-every", 5])
    wait_for_checkpoint(out, ranks, SHARDS)
    ranks[1].send_signal(signal.SIGINT)  # one of them is enough
    endings = finish(ranks)
    assert [status for status, _, _ in endings] == [130, 130], endings
    stopped = re.search(r"stopped at step (\d+) of 20000", endings[0][2])[1]
    assert endings[1][2] == ""
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{stopped}"]


@pytest.fixture
def hosts():
    """Prefixes that run a command on one of two hosts, which a link of 100 Mbit/s joins."""
    with contextlib.ExitStack() as stack:
        try:
            prefixes = stack.enter_context(two_hosts(megabits=100))
        except Unavailable as reason:
            pytest.skip(str(reason))
        yield prefixes


def test_two_hosts_train_as_one(tmp_path, text, hosts):
    arguments = train(text, tmp_path / "two", 30, "--chunks", 2)
    endings = finish(start_ranks(arguments, host=ADDRESS, prefixes=hosts))
    assert [status for status, _, _ in endings] == [0, 0], endings
    assert "2 ranks, experts on 2 of them, 1 times" in endings[0][1] and endings[1][1] == ""
    one = alone(train(text, tmp_path / "one", 30))
    assert abs(held_out(endings[0][1]) - held_out(one)) < 2e-3


def test_a_host_that_is_cut_off_is_named(tmp_path, text, hosts):
    out = tmp_path / "out"
    ranks = start_ranks([*train(text, out, 20000), "--checkpoint-every", 5], host=ADDRESS, prefixes=hosts, timeout=6)
    wait_for_checkpoint(out, ranks, SHARDS)
    subprocess.run(["ip", "-n", hosts[0][-1], "link", "set", "t0", "down"], check=True)
    cut = time.monotonic()
    endings = finish(ranks)
    assert time.monotonic() - cut < 25
    assert endings[0][0] == 1 and "rank 1" in endings[0][2].splitlines()[-1], endings
    assert endings[1][0] == 1 and "rank 0, which holds the store" in endings[1][2].splitlines()[-1], endings
