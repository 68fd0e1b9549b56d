"""Two levels of top-2 gating: outer slots become the tokens of the inner level, whose experts run as one bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import ops
from ..experts import Activation
from .feed_forward import FeedForwardBank
from .moe import as_experts
from .top2_gating import GatedChoices, Top2Gating

_NAME = "turnout.HierarchicalMoE"
_GATING = ("epsilon", "policy_train", "policy_eval", "threshold_train", "threshold_eval", "capacity_factor_train",
           "capacity_factor_eval")  # fmt: skip


class RoutedSlots(NamedTuple):
    """Tokens that an outer gate gave to slots, and what the inner gates decided of those."""

    plan: ops.DispatchPlan
    """tokens to slots, rows [outer, groups, capacity]"""
    x: Tensor
    """[outer · groups · capacity, hidden]; zeros in empty slots"""
    outer: GatedChoices
    inner: GatedChoices


def route_to_slots(
    gate_outer: Callable[[Tensor], GatedChoices],
    gate_inner: Callable[[Tensor, Tensor], GatedChoices],
    x: Tensor,
    num_outer: int,
) -> RoutedSlots:
    """Both levels of gating of x [groups, tokens, hidden].

    gate_inner is called on the slots [num_outer, groups, capacity, hidden] and their importance: a slot whose outer
    weight exceeds 0.5 has both choices, one above 0 the best expert alone, others are not sent. Empty slots count in
    its means.
    """
    outer = gate_outer(x)
    plan = ops.slot_plan(outer.topk_ids, num_outer, outer.capacity, outer.group_size)
    importance = ops.slot_importance(outer.topk_weights, plan)
    rows = ops.dispatch(x.reshape(-1, x.shape[-1]), plan)
    groups = rows.shape[0] // (num_outer * outer.capacity)  # sequences; none where they hold no token
    shape = (num_outer, groups, outer.capacity)
    inner = gate_inner(rows.view(*shape, x.shape[-1]), importance.view(shape))
    return RoutedSlots(plan, rows, outer, inner)


class HierarchicalMoEOutput(NamedTuple):
    """One forward of a two-level layer."""

    output: Tensor
    """[groups, tokens, hidden]"""
    aux_loss: Tensor
    """coefficient · (outer loss + inner loss)"""
    dropped: Tensor
    """scalar int64: choices without a place, at both levels"""
    tokens_per_expert: Tensor
    """[outer · inner] int64"""


def _gating(given: object) -> dict[str, Any]:
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise TypeError(f"{_NAME}: gating is {given!r}, expected keyword arguments of Top2Gating by name")
    for name in given:
        if name not in _GATING:
            raise TypeError(f"{_NAME}: gating holds {name!r}, expected arguments of Top2Gating: {', '.join(_GATING)}")
    return dict(given)


class HierarchicalMoE(nn.Module):
    """Outer gating gives each group of experts a fixed number of slots a sequence; inner gating routes the slots.

    ffn: 4 · hidden by default
    num_experts: outer, inner
    activation, bias: of the experts
    gating: keyword arguments of Top2Gating for both levels: policies, thresholds, epsilon, capacity factors
    experts: outer · inner modules, or one module with that num_experts, in place of the bank; number outer ·
      inner_count + inner. ffn, activation and bias are then not read

    Parameters: gate_outer.w_gating [hidden, outer], gate_inner.w_gating [outer, hidden, inner], experts.up and
    experts.down as in FeedForwardBank: those of turnout::HierarchicalMoE in C++, drawn in the same order (the bank
    first).
    Raises ValueError or TypeError naming the argument. Source: tensor2tensor moe.py, mixture-of-experts 0.2.3 on PyPI.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int | None = None,
        num_experts: tuple[int, int] = (4, 4),
        *,
        activation: Activation = "relu",
        bias: bool = False,
        loss_coefficient: float = 1e-2,
        gating: dict[str, Any] | None = None,
        experts: nn.Module | Iterable[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.positive_int(_NAME, hidden=hidden)
        check.non_negative_number(_NAME, loss_coefficient=loss_coefficient)
        if not isinstance(num_experts, (tuple, list)) or len(num_experts) != 2:
            raise ValueError(f"{_NAME}: num_experts is {num_experts!r}, expected a pair (outer, inner)")
        for count in num_experts:
            check.positive_int(_NAME, **{"num_experts of a level": count})
        self.hidden, self.num_experts, self.loss_coefficient = hidden, tuple(num_experts), loss_coefficient
        outer, inner = self.num_experts
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        how = _gating(gating)
        if experts is None:
            width = 4 * hidden if ffn is None else ffn
            bank: nn.Module = FeedForwardBank(hidden, width, outer * inner, activation, bias, **where)
        else:
            bank = as_experts(_NAME, experts, outer * inner)
        self.gate_outer = Top2Gating(hidden, outer, **how, **where)
        self.gate_inner = Top2Gating(hidden, inner, outer=outer, **how, **where)
        self.experts = bank

    def forward(self, x: Tensor) -> HierarchicalMoEOutput:
        """x [groups, tokens, hidden]: capacity is counted in each group (sequence)."""
        check.shaped(_NAME, "x", x, "[groups, tokens, hidden]", self.hidden)
        outer, inner = self.num_experts
        slots = route_to_slots(self.gate_outer, self.gate_inner, x, outer)
        # The experts of all outer groups are numbered through, so that one plan and one bank serve them.
        plan = ops.plan(ops.nested_ids(slots.inner.topk_ids, outer, inner), outer * inner)
        y = self.experts(slots.x, slots.inner.topk_weights, plan)
        output = ops.combine(y, slots.outer.topk_weights, slots.plan)
        return HierarchicalMoEOutput(
            output.view(x.shape),
            (slots.outer.loss + slots.inner.loss) * self.loss_coefficient,
            slots.outer.dropped + slots.inner.dropped,
            plan.tokens_per_expert,
        )

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}"
