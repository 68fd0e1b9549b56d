"""Balancing losses, the selection bias that balances without one, and statistics.

Shapes: T tokens, K choices of a token (top_k), E experts. No numeric logic here: each function calls ops in sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks as check
from .ops import DispatchPlan, Routing

LoadCount = Literal["per_assignment", "per_token", "first_choice"]
SumOverRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks of a job (an all-reduce) and returns the sum; called outside of the gradient."""

_ops = torch.ops.turnout


class RoutingStatistics(NamedTuple):
    """Statistics of one call, as tensors on its device."""

    tokens_per_expert: Tensor
    """[E] int64, after capacity"""
    dropped_share: Tensor
    """dropped choices / (sent + dropped)"""
    max_over_mean: Tensor
    """load of the fullest expert over the mean load: 1 when even"""
    entropy: Tensor
    """mean over tokens of −Σ p ln p, in nats"""
    dead_experts: Tensor
    """int64: experts without a row"""


def balance_loss(
    scores: Tensor,
    topk_ids: Tensor,
    count: LoadCount = "per_assignment",
    group_size: int = 0,
    *,
    token_mask: Tensor | None = None,
    sum_over_ranks: SumOverRanks | None = None,
) -> Tensor:
    """E · Σ f_i · P_i, a scalar: P_i is the mean probability of expert i, f_i its load.

    scores: [T, E]; topk_ids: [T, K] before capacity, -1 counts nowhere
    count: f = assignments / (T · K) (per_assignment; 1 when balanced), assignments / T (per_token; K when balanced),
      or first choices / T (first_choice; 1 when balanced)
    group_size: tokens over which f and P take their means; the loss is the mean over groups. 0 = all in one group
    token_mask: [T] bool; False: padding, which counts nowhere
    sum_over_ranks: sums a tensor over the ranks of a job (an all-reduce; called outside of the gradient) and returns
      the sum: f and P are then those of all ranks together, and the mean of the ranks' gradients is that of the whole
      batch's loss

    0 without tokens. Gradient: to scores through P; f is a count and has none.
    """
    if sum_over_ranks is None:
        return _ops.balance_loss(scores, topk_ids, count, group_size, token_mask)
    if group_size != 0:
        raise ValueError(
            f"turnout.balance_loss: group_size is {group_size}, expected 0 with a sum over ranks: "
            "their groups are not the same tokens"
        )
    sums = _ops.balance_sums(scores, topk_ids, count, 0, token_mask)
    return _ops.balance_loss_of_sums(sums, _total("balance_loss", sums, sum_over_ranks))


def _total(owner: str, sums: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
    check.function(f"turnout.{owner}", sum_over_ranks=sum_over_ranks)
    total = sum_over_ranks(sums.detach().clone())
    if not isinstance(total, Tensor):
        raise TypeError(
            f"turnout.{owner}: sum_over_ranks returned a {type(total).__name__}, expected the sum as a new tensor"
        )
    return total


def balance_sums(
    scores: Tensor,
    topk_ids: Tensor,
    count: LoadCount = "per_assignment",
    group_size: int = 0,
    *,
    token_mask: Tensor | None = None,
) -> Tensor:
    """What balance_loss is made of, [groups, 2 · E + 2]: sums that add up over layers, micro-batches and ranks.

    transformers pools layers: `balance_loss_of_sums(sum(balance_sums(s, i, "per_token") for s, i in layers))`.
    """
    return _ops.balance_sums(scores, topk_ids, count, group_size, token_mask)


def balance_loss_of_sums(sums: Tensor, total: Tensor | None = None) -> Tensor:
    """The loss of sums; total: their sum over ranks, where f and P are to be those of all ranks together."""
    return _ops.balance_loss_of_sums(sums, total)


def z_loss(
    logits: Tensor, *, token_mask: Tensor | None = None, sum_over_ranks: SumOverRanks | None = None
) -> Tensor:
    """mean(logsumexp(logits)²) of logits [T, E], a scalar; 0 without tokens. Source: ST-MoE, arXiv:2202.08906.

    token_mask: [T] bool; False: padding, out of the mean
    sum_over_ranks: as in balance_loss: the mean is then over the tokens of all ranks
    """
    if sum_over_ranks is None:
        return _ops.z_loss(logits, token_mask)
    sums = _ops.z_sums(logits, token_mask)
    return _ops.z_loss_of_sums(sums, _total("z_loss", sums, sum_over_ranks))


def z_sums(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """What z_loss is made of, [3]: the sum of the squares, tokens, and 1. They add up over micro-batches and ranks."""
    return _ops.z_sums(logits, token_mask)


def z_loss_of_sums(sums: Tensor, total: Tensor | None = None) -> Tensor:
    """The loss of sums; total: their sum over ranks, as in balance_loss_of_sums."""
    return _ops.z_loss_of_sums(sums, total)


def expert_importance(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    """[E] Σ_t weight of the expert for token t; -1 counts nowhere. Gradient: to topk_weights [T, K]."""
    return _ops.expert_importance(topk_ids, topk_weights, num_experts)


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation of a vector, with the population's variance; 0 where its mean is 0.

    Shazeer's losses: cv_squared(expert_importance(…)) and cv_squared(noisy_load(…)). Source: arXiv:1701.06538.
    """
    return _ops.cv_squared(values)


def expert_counts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[E] int64: choices that name each expert; -1 counts nowhere."""
    return _ops.expert_counts(topk_ids, num_experts)


def update_selection_bias(bias: Tensor, counts: Tensor, rate: float, center: bool = False) -> Tensor:
    """bias + rate · sign(mean count − count), a new tensor: balancing without a loss, after each training step.

    counts: [E] choices of the step over all ranks (expert_counts); center: subtract the mean of the step, so that the
    bias does not drift (torchtitan). Gradient: none. Source: arXiv:2408.15664.
    """
    return _ops.update_selection_bias(bias, counts, rate, center)


def routing_statistics(
    routing: Routing, plan: DispatchPlan, dropped: Tensor | None = None, *, token_mask: Tensor | None = None
) -> RoutingStatistics:
    """How even the load is, what was dropped, how sure the router is. Loads come from the plan; only the entropy passes
    over the scores. dropped: Capped.dropped; token_mask: [T] bool, False: padding. Gradient: none."""
    return RoutingStatistics(*_ops.routing_statistics(routing.scores, plan.expert_offsets, dropped, token_mask))
