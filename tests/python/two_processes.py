"""Run by test_data_parallel.py, once a rank: MoE layers under DistributedDataParallel and FSDP2 over gloo.

    python two_processes.py RANK FILE

Each rank sees its half of the batch; gradients, and parameters after a step, must be those of one process that averages
the losses of both halves.
"""

import copy
import datetime
import sys

import torch
import torch.distributed as dist
import turnout
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

RANKS, HIDDEN = 2, 8


class Model(nn.Module):
    """Three layers; the second one's experts are more than the ranks, and no multiple of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = turnout.MoE(HIDDEN, 6, 4, activation="swiglu", shared_ffn=5, shared_gated=True)
        self.second = turnout.MoE(HIDDEN, 6, 5, 1, router="switch", z_coefficient=1e-3)
        sure = {"policy_train": "all"}  # nothing at random
        self.third = turnout.HierarchicalMoE(HIDDEN, 6, (2, 2), gating=sure)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(x + first.output)
        third = self.third(x + second.output)
        return (x + third.output).square().mean() + first.aux_loss + second.aux_loss + third.aux_loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def compare(what: str, model: nn.Module, alone: nn.Module, eps: float) -> None:
    """Sums over ranks and over tokens run in another order: a few roundings of the largest gradient."""
    for (name, mine), (_, truth) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        for kind, a, e in (("gradient", mine.grad, truth.grad), ("parameter", mine, truth)):
            error = float((whole(a) - whole(e)).abs().max())
            allowed = 64 * eps * float(whole(e).abs().max())
            assert error <= allowed, f"{what}: {kind} of {name} is off by {error:.3e}, allowed {allowed:.3e}"


def train(model: nn.Module, losses) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        losses(model).backward()
        optimizer.step()


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    torch.manual_seed(1)
    start = Model()
    halves = torch.randn(RANKS, 2, 6, HIDDEN)
    eps = torch.finfo(torch.float32).eps

    alone = copy.deepcopy(start)
    train(alone, lambda model: torch.stack([model(half) for half in halves]).mean())

    model = nn.parallel.DistributedDataParallel(copy.deepcopy(start))
    train(model, lambda model: model(halves[rank]))
    compare("DistributedDataParallel", model.module, alone, eps)

    mesh = init_device_mesh("cpu", (RANKS,))
    model = copy.deepcopy(start)
    for layer in (model.first, model.second, model.third):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    train(model, lambda model: model(halves[rank]))
    compare("FSDP2", model, alone, eps)

    model = copy.deepcopy(start)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    train(model, lambda model: model(halves[rank]))
    assert all(whole(p.grad).isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
