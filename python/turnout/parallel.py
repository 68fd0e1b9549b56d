"""Experts on several ranks of torch.distributed, by one op that knows a process group by its name."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import Activation, Weights, _as_list


def expert_bounds(num_experts: int, ranks: int, unit: int = 1) -> list[int]:
    """Experts of rank r are [bounds[r], bounds[r + 1]): contiguous, as even as whole units allow. [ranks + 1]"""
    return torch.ops.turnout.expert_bounds(num_experts, ranks, unit)


def _name_of(group: torch.distributed.ProcessGroup | str | None) -> str:
    if isinstance(group, str):
        return group
    if group is None:
        group = torch.distributed.group.WORLD
        if group is None:
            raise ValueError(
                "turnout.expert_parallel: group is None, which stands for all ranks, expected "
                "torch.distributed.init_process_group() before it"
            )
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"turnout.expert_parallel: group is {type(group).__name__}, expected a ProcessGroup of torch.distributed, "
            "its name or None"
        )
    return group.group_name


def expert_parallel(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: Weights,
    down: Weights,
    activation: Activation = "swiglu",
    *,
    num_experts: int,
    group: torch.distributed.ProcessGroup | str | None = None,
    up_bias: Weights | None = None,
    down_bias: Weights | None = None,
    chunks: int = 1,
) -> Tensor:
    """fused_experts() with the experts on the ranks of a process group: rows travel to them and back.

    Every rank of the group calls it, with its own tokens, also with none. Arguments are those of fused_experts, but:
    up, down, up_bias, down_bias: the experts of this rank alone, those of expert_bounds(num_experts, ranks)
    num_experts: of all ranks; topk_ids lie in [0, num_experts)
    group: a torch.distributed process group or its name; None: all ranks
    chunks: pieces of an exchange: while one runs through the experts the next is on its way

    Gradient: as fused_experts. Those of the weights hold what the tokens of all ranks of the group add, not divided.
    torch.compile takes it without a graph break; the backward then sends the rows once more instead of keeping them.
    Raises ValueError or TypeError that names the argument; RuntimeError, which names the rank, when rows, num_experts
    or chunks of the ranks differ, and when a rank is lost, at the time-out of the group at the latest. Who is lost is
    found by a heartbeat in the group's store, if that is a TCPStore; else the words are c10d's.
    """
    name = _name_of(group)
    weights = (_as_list("up", up), _as_list("down", down), _as_list("up_bias", up_bias),
               _as_list("down_bias", down_bias))  # fmt: skip
    return torch.ops.turnout.expert_parallel(
        x, topk_ids, topk_weights, *weights, activation, num_experts, name, chunks
    )
