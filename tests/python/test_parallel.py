"""turnout.expert_parallel on two processes of torch.distributed, eager and compiled, against one process."""

import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

import turnout

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERTS, HIDDEN, FFN = 3, 8, 6


def inputs():
    """The joined batch: 5 tokens of rank 0, 4 of rank 1."""
    torch.manual_seed(3)
    x = torch.randn(9, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(9)])
    ids[2, 1] = -1
    weights = torch.rand(9, 2)
    up, down = torch.randn(EXPERTS, 2 * FFN, HIDDEN), torch.randn(EXPERTS, HIDDEN, FFN)
    grad = torch.randn(9, HIDDEN)
    return x, ids, weights, up, down, grad


def leave_together(rank, folder):
    """No barrier of gloo: a rank that leaves it first closes connections that the other may still wait for."""
    (folder / f"done-{rank}").touch()
    for _ in range(6000):
        if (folder / f"done-{1 - rank}").exists():
            return
        time.sleep(0.01)
    pytest.fail(f"rank {1 - rank} did not come within a minute")


def be_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    x, ids, weights, up, down, grad = inputs()
    leaves = [t.clone().requires_grad_() for t in (x, weights, up, down)]
    truth = turnout.fused_experts(leaves[0], ids, leaves[1], leaves[2], leaves[3])
    truth.backward(grad)

    tokens = slice(0, 5) if rank == 0 else slice(5, 9)
    bounds = turnout.expert_bounds(EXPERTS, 2)
    held = slice(bounds[rank], bounds[rank + 1])

    def layer(x, weights, up, down):
        group = torch.distributed.group.WORLD.group_name
        return turnout.expert_parallel(x, ids[tokens], weights, up, down, num_experts=EXPERTS, group=group, chunks=2)

    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        own = [t.clone().requires_grad_() for t in (x[tokens], weights[tokens], up[held], down[held])]
        y = call(*own)
        y.backward(grad[tokens])
        torch.testing.assert_close(y, truth[tokens])
        for got, whole, part in zip(own, leaves, (tokens, tokens, held, held)):
            torch.testing.assert_close(got.grad, whole.grad[part])
    with torch.no_grad():
        torch.testing.assert_close(layer(x[tokens], weights[tokens], up[held], down[held]), truth[tokens].detach())

    wrong = x[tokens] if rank == 0 else x[tokens].double()
    with pytest.raises(RuntimeError, match=r"rank 1 has x Double \[rows, 8\], rank 0 has x Float"):
        turnout.expert_parallel(wrong, ids[tokens], weights[tokens], up[held], down[held], num_experts=EXPERTS)
    with pytest.raises(RuntimeError, match="rank 0 has chunks 1, rank 1 has chunks 2"):
        turnout.expert_parallel(x[tokens], ids[tokens], weights[tokens], up[held], down[held], num_experts=EXPERTS,
                                chunks=1 + rank)
    with pytest.raises(RuntimeError, match="rank 1 has num_experts 2"):
        turnout.expert_parallel(x[tokens], ids[tokens].clamp_max(1), weights[tokens], up[held], down[held],
                                num_experts=EXPERTS - rank)
    with pytest.raises(ValueError, match="up holds 3 experts, expected"):
        turnout.expert_parallel(x[tokens], ids[tokens], weights[tokens], up, down, num_experts=EXPERTS)
    leave_together(rank, pathlib.Path(folder))
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "GLOO_SOCKET_IFNAME": "lo",
                   "TORCH_CPP_LOG_LEVEL": "ERROR"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    try:
        texts = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(texts)


def call(group, **changes):
    x, ids, weights, up, down, _ = inputs()
    return turnout.expert_parallel(x, ids, weights, up, down, **{"num_experts": EXPERTS, "group": group, **changes})


def test_groups_that_are_none_are_refused():
    with pytest.raises(ValueError, match="group is None, .* expected torch.distributed.init_process_group"):
        call(None)
    with pytest.raises(ValueError, match="group is 'nobody', expected the name of a process group"):
        call("nobody")
    for wrong in (3, torch.distributed, ["0"]):
        with pytest.raises(TypeError, match="expected a ProcessGroup of torch.distributed, its name or None"):
            call(wrong)


def test_a_group_of_one_needs_no_other(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        x, ids, weights, up, down, _ = inputs()
        torch.testing.assert_close(call(None, chunks=2), turnout.fused_experts(x, ids, weights, up, down))
        for changes, words in (({"chunks": 0}, "chunks is 0, expected at least 1"),
                               ({"num_experts": 0}, "num_experts is 0, expected at least 1"),
                               ({"num_experts": 4}, "up holds 3 experts, expected 4 of 4"),
                               ({"num_experts": 2}, "up holds 3 experts, expected 2 of 2"),
                               ({"activation": "swish"}, "activation is 'swish'")):
            with pytest.raises(ValueError, match=words):
                call(None, **changes)
        for changes in ({"chunks": "two"}, {"num_experts": 2.5}, {"up_bias": 3}):
            with pytest.raises((TypeError, RuntimeError)):
                call(None, **changes)
    finally:
        torch.distributed.destroy_process_group()


def test_bounds_are_checked():
    assert turnout.expert_bounds(7, 3) == [0, 3, 5, 7]
    with pytest.raises(ValueError, match="there are 1 experts for 2 ranks"):
        turnout.expert_bounds(1, 2)


if __name__ == "__main__":
    be_rank(int(sys.argv[1]), sys.argv[2])
