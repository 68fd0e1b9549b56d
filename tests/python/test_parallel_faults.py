"""Ranks of torch.distributed that are lost in turnout.expert_parallel: the others name them."""

import datetime
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import turnout

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 5  # seconds


def be_rank(rank, port):
    """Says when it has begun, then calls the layer until that fails, and says how."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                                         timeout=datetime.timedelta(seconds=TIMEOUT))
    x, ids, weights = torch.ones(4, 8), torch.tensor([[0], [1]] * 2), torch.ones(4, 1)
    up, down = torch.ones(1, 12, 8), torch.ones(1, 8, 6)
    torch.distributed.barrier()
    while True:
        try:
            turnout.expert_parallel(x, ids, weights, up, down, num_experts=2)
        except RuntimeError as error:
            print(str(error).splitlines()[0], flush=True)
            return
        print("went on", flush=True)
        time.sleep(0.05)


@pytest.fixture
def ranks():
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        port = end.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "GLOO_SOCKET_IFNAME": "lo",
                   "TORCH_CPP_LOG_LEVEL": "FATAL"}
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(port)], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    for rank in started:
        assert rank.stdout.readline() == "went on\n", rank.communicate()
    yield started
    for rank in started:
        rank.kill()
        rank.communicate()


@pytest.mark.parametrize(("lost", "how", "words"), [
    (1, signal.SIGKILL, r"rank 1 \(last sign .*, during: .*\) no longer answers"),
    (1, signal.SIGSTOP, r"rank 1 \(last sign .*, during: .*\) no longer answers"),
    (0, signal.SIGKILL, r"the store at 127.0.0.1:\d+, held by rank 0 or the launcher, is lost"),
    (0, signal.SIGSTOP, r"the store at 127.0.0.1:\d+, held by rank 0 or the launcher, no longer answers"),
])
def test_a_lost_rank_is_named(ranks, lost, how, words):
    began = time.monotonic()
    ranks[lost].send_signal(how)
    said, errors = ranks[1 - lost].communicate(timeout=60)
    assert ranks[1 - lost].returncode == 0, errors
    last = said.splitlines()[-1]
    assert re.match(rf"turnout: exchange of (counts|rows) failed: {words}; c10d says: ", last), last
    assert time.monotonic() - began < 2 * TIMEOUT + 5  # it ends in time too: nothing holds the process


if __name__ == "__main__":
    be_rank(int(sys.argv[1]), sys.argv[2])
