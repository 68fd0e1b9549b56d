"""The stages as typed functions, one call of an op each.

Shapes: T tokens, K choices of a token (top_k), E experts, D hidden, R rows. Arguments are checked by the ops: a
ValueError or TypeError names the op, the argument, what it got and what was expected. What is of another Python type
(a list or an array for a tensor, a float for an int) torch itself refuses, by a RuntimeError that names both types.
"""

from __future__ import annotations

import operator
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

RouterWeights = Literal["normalized", "probability", "softmax_of_topk"]
ScoreFunction = Literal["softmax", "sigmoid"]
GroupMask = Literal["minus_infinity", "zero"]
RouterPrecision = Literal["float32", "logits"]
SecondPolicy = Literal["all", "none", "threshold", "random"]
DropOrder = Literal["choice", "position", "score", "random"]
CapacityRounding = Literal["ceil", "floor", "share"]

_ops = torch.ops.turnout


class Routing(NamedTuple):
    """What a router decided, one row a token."""

    topk_ids: Tensor
    """[T, K] int64, best choice first; -1 = not sent"""
    topk_weights: Tensor
    """[T, K] float32 (float64 for float64 logits), or by option the logits' type; 0 where not sent"""
    scores: Tensor
    """[T, E] router probabilities, rows sum to 1, for losses and statistics"""


class RouterOptions(TypedDict):
    """The switches of route() by their names there: `route(logits, 2, **router_preset("mixtral"))`.

    In the order of the op router_preset."""

    score: ScoreFunction
    weights: RouterWeights
    epsilon: float
    scale: float
    groups: int
    kept_groups: int
    group_top: int
    group_mask: GroupMask
    precision: RouterPrecision
    cast_weights: bool


class Top2Routing(NamedTuple):
    """What GShard top-2 gating decided, before capacity. Leading axes are those of the logits."""

    topk_ids: Tensor
    """[..., T, 2] int64; -1 = not sent"""
    topk_weights: Tensor
    """[..., T, 2]; 0 where not sent"""
    scores: Tensor
    """[..., T, E] router probabilities"""
    balance_loss: Tensor
    """scalar: mean over groups and experts of density · density_proxy · E²"""


class Capped(NamedTuple):
    """Choices after capacity."""

    topk_ids: Tensor
    """[T, K]; -1 where dropped"""
    topk_weights: Tensor
    """[T, K]; 0 where dropped"""
    dropped: Tensor
    """scalar int64: choices that found no place"""


class DispatchPlan(NamedTuple):
    """Rows grouped by expert. Shapes are static, so that compiled graphs keep them."""

    expert_offsets: Tensor
    """[E + 1] int64: rows of expert e are [offsets[e], offsets[e + 1]); the last is the number of live rows"""
    token_of_row: Tensor
    """[R] int64; -1 where the row is empty"""
    row_of_choice: Tensor
    """[T, K] int64; -1 = not sent"""

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.shape[0] - 1

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E] int64"""
        return self.expert_offsets.diff()


class DispatchTensors(NamedTuple):
    """GShard's dense tensors, one entry a place of an expert."""

    dispatch: Tensor
    """[T, E, capacity] 1 where combine is not 0, else 0"""
    combine: Tensor
    """[T, E, capacity] its weight there"""


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as nn.Linear computes it, but with the same bits at any number of threads.

    x: [T, D]; weight: [E, D] and bias: [E], of x's type. Returns [T, E] of x's type.
    Gradient: to all three; double backward works. Deterministic at any thread count, forward and backward, in float32
    and bfloat16 on the CPU. A NaN token harms only its own row.
    """
    return _ops.gate_logits(x, weight, bias)


def topk(scores: Tensor, top_k: int) -> Tensor:
    """Ids of the top_k largest scores of each row, largest first: [..., E] → [..., K] int64.

    Ties go to the lower id (torch.topk promises no order). NaN ranks above every number, so a row of NaN still gives
    distinct ids in range. Gradient: none; gather the scores with the ids. Deterministic.
    """
    return _ops.topk(scores, top_k)


def route(
    logits: Tensor,
    top_k: int,
    weights: RouterWeights = "normalized",
    epsilon: float = 0.0,
    *,
    score: ScoreFunction = "softmax",
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_top: int = 1,
    group_mask: GroupMask = "minus_infinity",
    precision: RouterPrecision = "float32",
    cast_weights: bool = False,
    selection_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Routing:
    """Routes tokens: scores, choice of top_k, weights. logits: [T, E].

    score: softmax over the experts, or each expert's sigmoid (DeepSeek-V3)
    weights: how those of the chosen experts follow
      normalized       their scores, divided by their sum + epsilon (Mixtral, DeepSeek-V3)
      probability      their scores as they are (Switch, Qwen, DeepSeek-V2)
      softmax_of_topk  softmax over the chosen logits alone (GPT-OSS, Shazeer)
    scale: of the weights, at the end
    groups, kept_groups: a token chooses within its kept_groups best of `groups` groups of neighbouring experts; a
      group's score is the sum of its best group_top; those left out never win (minus_infinity) or count as score 0
    precision: float32 whatever the logits' type (float64 stays float64), or the logits' own type
    cast_weights: round the weights to the logits' type at the end
    selection_bias: [E] float32: experts are chosen by score + bias, weights stay those of the scores
    token_mask: [T] bool; False: padding, sent nowhere (ids -1, weights 0)

    `router_preset` gives a published family's switches. `scores` are the softmax, or the sigmoids divided by their sum.
    Ties go to the lower id; a NaN token harms only its own row.
    Gradient: to logits through topk_weights and scores. With top_k = 1 `normalized` and `softmax_of_topk` give the
    constant weight 1, so the router then learns from the losses alone.
    """
    return Routing(
        *_ops.route(
            logits,
            top_k,
            weights,
            epsilon,
            score=score,
            scale=scale,
            groups=groups,
            kept_groups=kept_groups,
            group_top=group_top,
            group_mask=group_mask,
            precision=precision,
            cast_weights=cast_weights,
            selection_bias=selection_bias,
            token_mask=token_mask,
        )
    )


def router_preset(family: str) -> RouterOptions:
    """The switches of a published family's router: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v2_lite
    (greedy), deepseek_v3, gpt_oss, switch, gshard, noisy_topk.

    Numbers that a model's own config sets (scale, groups) stand as in the family's best-known one, norm_topk_prob as
    its config class has it by default.
    """
    return RouterOptions(zip(RouterOptions.__annotations__, _ops.router_preset(family), strict=True))


def router_preset_names() -> list[str]:
    """The families that router_preset knows."""
    return _ops.router_preset_names()


def route_top2(
    logits: Tensor,
    policy: SecondPolicy = "random",
    threshold: float = 0.2,
    epsilon: float = 1e-9,
    *,
    importance: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Top2Routing:
    """GShard top-2 gating. logits: [..., T, E]; the axis before last is the group of the loss's means.

    policy: what becomes of the second expert: always kept (all), never (none), where its gate exceeds the threshold
      (threshold), or with probability gate_2 / max(threshold, epsilon) (random)
    importance: [..., T]. 1: both choices; above 0: only a second choice, which is then the best expert; 0: not sent
    uniform: [..., T] numbers in [0, 1) for `random`; by default drawn from torch's generator

    Weights are g / (g1 + g2 + epsilon), not renormalised when the second is left out. Gradient: to logits.
    Source: tensor2tensor moe.py, mixture-of-experts 0.2.3 on PyPI, arXiv:2006.16668.
    """
    return Top2Routing(*_ops.route_top2(logits, policy, threshold, epsilon, importance, uniform))


def plan(topk_ids: Tensor, num_experts: int) -> DispatchPlan:
    """Groups routed rows by expert, stable in token order; R = T · K, live rows first.

    topk_ids: [T, K] int32 or int64, each in [0, num_experts); -1 = not sent. Gradient: none. Deterministic.
    Source: MegaBlocks, arXiv:2211.15841.
    """
    return DispatchPlan(*_ops.plan(topk_ids, num_experts))


def queue_positions(
    topk_ids: Tensor, num_experts: int, group_size: int, order: DropOrder = "choice", priority: Tensor | None = None
) -> Tensor:
    """Place of each choice in the queue of its expert within its group, from 0; -1 = not sent. [T, K] int64.

    order: all first choices before any second one (choice), by token position (position), or by `priority` [T, K],
      larger first (score, random)
    """
    return _ops.queue_positions(topk_ids, num_experts, group_size, order, priority)


def expert_capacity(
    group_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    factor: float = 0.0,
    fixed: int = 0,
    minimum: int = 0,
    rounding: CapacityRounding = "ceil",
    count_choices: bool = True,
) -> int:
    """Places of each expert for a group of tokens.

    `fixed` when above 0; else max(minimum, min(group_tokens, rounded)) of factor · group_tokens · top_k / num_experts
    (without top_k when count_choices is false), or of top_k · ⌊factor · ⌈group_tokens / num_experts⌉⌋ (share, Tutel);
    group_tokens when both are 0, so that nothing drops. At least 1.
    Compiled graphs take it as a number: they hold for one group_tokens and are made anew for another, without a break.
    """
    counted = operator.index(group_tokens)  # no symbol any more
    return _places(factor, fixed, minimum, rounding, count_choices, counted, top_k, num_experts)


@torch.compiler.assume_constant_result
def _places(*arguments: float | str) -> int:
    return _ops.expert_capacity(*arguments)


def limit_capacity(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int,
    group_size: int,
    order: DropOrder = "choice",
    renormalize: bool = False,
    priority: Tensor | None = None,
) -> Capped:
    """Drops the choices that find no place among `capacity` in their expert and group of group_size tokens.

    renormalize: divide the kept weights of a token by their sum. Gradient: to the topk_weights that are kept.
    priority: [T, K]: what the orders score and random rank by, larger first, in place of the weights or of new random
      numbers: `torch.rand(…, generator=g)` makes random drops repeat
    """
    return Capped(
        *_ops.limit_capacity(topk_ids, topk_weights, num_experts, capacity, group_size, order, renormalize, priority)
    )


def apply_capacity(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group_size: int,
    *,
    factor: float = 0.0,
    fixed: int = 0,
    minimum: int = 0,
    rounding: CapacityRounding = "ceil",
    count_choices: bool = True,
    order: DropOrder = "choice",
    renormalize: bool = False,
) -> Capped:
    """expert_capacity() and limit_capacity() in one op. No factor and no fixed number: nothing is dropped.

    A compiled graph holds for one group_size and is made anew for another, without a break.
    """
    return Capped(
        *_ops.apply_capacity(
            topk_ids,
            topk_weights,
            num_experts,
            group_size,
            factor=factor,
            fixed=fixed,
            minimum=minimum,
            rounding=rounding,
            count_choices=count_choices,
            order=order,
            renormalize=renormalize,
        )
    )


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows of x [T, D] in the plan's order: [R, D], zeros where a row is empty.

    Gradient: to x, summed over choices in order; double backward works. Deterministic.
    """
    return _ops.dispatch(x, plan.token_of_row, plan.row_of_choice)


def combine(rows: Tensor, topk_weights: Tensor, plan: DispatchPlan) -> Tensor:
    """y[t] = Σ_k topk_weights[t, k] · rows[row_of_choice[t, k]], summed in order of choice: [T, D] of rows' type.

    rows: [R, D], what the experts made of the dispatched rows; topk_weights: [T, K] float32 or rows' type
    Gradient: to rows and topk_weights; double backward works. Accumulates in float32 (float64 for float64).
    """
    return _ops.combine(rows, topk_weights, plan.token_of_row, plan.row_of_choice)


def slot_plan(topk_ids: Tensor, num_experts: int, capacity: int, group_size: int) -> DispatchPlan:
    """A plan whose rows are places: row (e · groups + g) · capacity + p is place p of group g in expert e.

    dispatch() then gives [E, groups, capacity, D] with zeros in empty places, and combine() takes it back. First
    choices queue before second ones, by position; what queues behind `capacity` gets no place. Not for
    fused_experts, which takes plans without empty rows.
    """
    return DispatchPlan(*_ops.slot_plan(topk_ids, num_experts, capacity, group_size))


def slot_importance(topk_weights: Tensor, plan: DispatchPlan) -> Tensor:
    """What each slot of an outer router means to the inner one, [R]: 1 where its weight exceeds 0.5, 0.5 where it
    exceeds 0, else 0. Gradient: none."""
    return _ops.slot_importance(topk_weights, plan.token_of_row, plan.row_of_choice)


def nested_ids(topk_ids: Tensor, num_outer: int, num_inner: int) -> Tensor:
    """Ids of the leaves of a two-level hierarchy: inner expert i within outer expert o is o · num_inner + i.

    topk_ids: [R, K] of inner routers; rows lie in num_outer equal blocks, one an outer expert; -1 stays
    """
    return _ops.nested_ids(topk_ids, num_outer, num_inner)


def dispatch_tensors(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, capacity: int, group_size: int
) -> DispatchTensors:
    """GShard's dense dispatch and combine tensors [T, E, capacity]. Large: for reading and tests.

    Gradient: combine to topk_weights.
    """
    return DispatchTensors(*_ops.dispatch_tensors(topk_ids, topk_weights, num_experts, capacity, group_size))


def feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str = "swiglu",
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The same feed-forward network for every row of x [..., D]: the dense twin of an expert, and shared experts.

    up: [F, D], or [2·F, D] for gated activations, gate rows first; down: [D, F]; up_bias: rows of up; down_bias: [D]
    Gradient: to all tensors, once (double backward is refused).
    """
    return _ops.feed_forward(x, up, down, up_bias, down_bias, activation)


def add_shared(y: Tensor, shared: Tensor, gate_logits: Tensor | None = None) -> Tensor:
    """y + shared, or y + σ(gate_logits) · shared: what shared experts made, added to what the routed ones did.

    y, shared: [T, D]; gate_logits: [T, 1]. Gradient: to all three.
    """
    return _ops.add_shared(y, shared, gate_logits)
