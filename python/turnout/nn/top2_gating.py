"""GShard top-2 gating with capacity: route_top2 and limit_capacity in one module."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import ops

MIN_EXPERT_CAPACITY = 4
_NAME = "turnout.nn.Top2Gating"


class GatedChoices(NamedTuple):
    """What top-2 gating decided, after capacity; T = all tokens of all groups."""

    topk_ids: Tensor
    """[T, 2] int64; -1 = not sent, or dropped"""
    topk_weights: Tensor
    """[T, 2]; 0 where not sent"""
    loss: Tensor
    """scalar, taken before policy and capacity"""
    dropped: Tensor
    """scalar int64: choices that found no place"""
    capacity: int
    group_size: int


def gate_top2(
    logits: Tensor,
    policy: ops.SecondPolicy,
    threshold: float,
    epsilon: float,
    capacity_factor: float,
    importance: Tensor | None = None,
    uniform: Tensor | None = None,
) -> GatedChoices:
    """Routes logits [..., tokens, experts] and drops what finds none of max(4, floor(factor · tokens / experts)) places
    in its expert and group (the axis before last). importance, uniform: as in route_top2()."""
    routing = ops.route_top2(logits, policy, threshold, epsilon, importance=importance, uniform=uniform)
    group_size, num_experts = logits.shape[-2:]
    capacity = ops.expert_capacity(
        group_size,
        2,
        num_experts,
        factor=capacity_factor,
        minimum=MIN_EXPERT_CAPACITY,
        rounding="floor",
        count_choices=False,
    )
    group_size = max(group_size, 1)
    capped = ops.limit_capacity(
        routing.topk_ids.reshape(-1, 2), routing.topk_weights.reshape(-1, 2), num_experts, capacity, group_size
    )
    return GatedChoices(*capped[:2], routing.balance_loss, capped.dropped, capacity, group_size)


class Top2Gating(nn.Module):
    """Top-2 gating with capacity.

    policy_*: what becomes of the second expert in training and evaluation: all, none, threshold or random; threshold_*,
      epsilon: see route_top2()
    capacity_factor_*: of max(4, floor(factor · tokens / num_experts)) places of an expert in a sequence
    outer: gates that run side by side, one an outer expert; 1: a single level

    Parameter: w_gating [hidden, num_experts], or [outer, hidden, num_experts], drawn from a standard normal.
    Raises ValueError or TypeError for sizes below 1, fewer than 2 experts, unknown policies, factors not above 0.
    Source: tensor2tensor moe.py, arXiv:2006.16668.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int = 16,
        *,
        epsilon: float = 1e-9,
        policy_train: ops.SecondPolicy = "random",
        policy_eval: ops.SecondPolicy = "random",
        threshold_train: float = 0.2,
        threshold_eval: float = 0.2,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        outer: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.positive_int(_NAME, hidden=hidden, num_experts=num_experts, outer=outer)
        if num_experts < 2:
            raise ValueError(f"{_NAME}: num_experts is {num_experts}, expected at least 2")
        check.one_of(_NAME, get_args(ops.SecondPolicy), policy_train=policy_train, policy_eval=policy_eval)
        thresholds = {"threshold_train": threshold_train, "threshold_eval": threshold_eval}
        check.non_negative_number(_NAME, epsilon=epsilon, **thresholds)
        check.positive_number(
            _NAME, capacity_factor_train=capacity_factor_train, capacity_factor_eval=capacity_factor_eval
        )
        self.hidden, self.num_experts, self.outer, self.epsilon = hidden, num_experts, outer, epsilon
        self.policy_train, self.policy_eval = policy_train, policy_eval
        self.threshold_train, self.threshold_eval = threshold_train, threshold_eval
        self.capacity_factor_train, self.capacity_factor_eval = capacity_factor_train, capacity_factor_eval
        shape = (hidden, num_experts) if outer == 1 else (outer, hidden, num_experts)
        self.w_gating = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gating)

    def forward(self, x: Tensor, importance: Tensor | None = None, uniform: Tensor | None = None) -> GatedChoices:
        """x [groups, tokens, hidden], or [outer, groups, tokens, hidden] where outer is above 1; importance and uniform
        have its axes but the last, see route_top2()."""
        axes = "[groups, tokens, hidden]" if self.outer == 1 else "[outer, groups, tokens, hidden]"
        check.shaped(_NAME, "x", x, axes, self.hidden)
        check.typed_as(_NAME, "x", x, self.w_gating)
        if self.outer > 1 and x.shape[0] != self.outer:
            raise ValueError(f"{_NAME}: x has shape {list(x.shape)}, expected {self.outer} (outer) on the first axis")
        when = "train" if self.training else "eval"
        # An axis of one group: every group of an outer expert has the same gate.
        logits = x @ (self.w_gating if self.outer == 1 else self.w_gating.unsqueeze(1))
        return gate_top2(
            logits,
            getattr(self, f"policy_{when}"),
            getattr(self, f"threshold_{when}"),
            self.epsilon,
            getattr(self, f"capacity_factor_{when}"),
            importance,
            uniform,
        )

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, outer={self.outer}"
