"""Top2Gating, Experts, MoE and HeirarchicalMoE of the package mixture-of-experts 0.2.3 on PyPI.

Same arguments, defaults, parameter names and draws: after the same torch.manual_seed the parameters are the package's,
and so are the outputs, losses and gradients, `random` policy included. Four things differ:
- policy `threshold` keeps the second expert where its gate exceeds the threshold, as the text says; the package's
  line lacks a dimension and raises
- a NaN token harms only itself; the package's einsums spread it over its sequence
- with `experts` given no default bank is drawn, so what is drawn afterwards differs from what follows the package
- dispatch and combine tensors are made only where Top2Gating itself is called; MoE and HeirarchicalMoE route rows

Legend: b groups (sequences), n tokens of a group, d dim, e experts, c places of an expert in a group.
Sources: tensor2tensor moe.py, arXiv:2006.16668.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import ops
from ..experts import fused_experts
from ..nn import GatedChoices, activation_name
from ..nn.hierarchical_moe import route_to_slots
from ..nn.top2_gating import gate_top2

_POLICIES = ("all", "none", "threshold", "random")


def _uniform(shape: tuple[int, ...]) -> nn.Parameter:
    """Uniform in ±1/√(last axis)."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.zeros(shape).uniform_(-bound, bound))


class Experts(nn.Module):
    """A bank of two-layer perceptrons without biases, any number of outer axes.

    num_experts: a number, or a tuple of one number an outer axis
    hidden_dim: 4 · dim by default
    activation: a class (or function) that makes the activation module; ReLU, GELU and SiLU run fused

    Attributes: w1 [*num_experts, dim, hidden_dim], w2 [*num_experts, hidden_dim, dim], act.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, ...] = 16,
        hidden_dim: int | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        outer = num_experts if isinstance(num_experts, tuple) else (num_experts,)
        hidden_dim = dim * 4 if hidden_dim is None else hidden_dim
        check.positive_int("turnout.compat.Experts", dim=dim, hidden_dim=hidden_dim)
        for size in outer:
            check.positive_int("turnout.compat.Experts", num_experts=size)
        if isinstance(activation, nn.Module) or not callable(activation):
            raise TypeError(
                f"turnout.compat.Experts: activation is {activation!r}, expected a class or function that makes the "
                "module, such as torch.nn.ReLU"
            )
        self.w1 = _uniform((*outer, dim, hidden_dim))
        self.w2 = _uniform((*outer, hidden_dim, dim))
        self.act = activation()

    def forward(self, x: Tensor, topk_ids: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        """x [..., *num_experts, n, dim], the rows of each expert → the same shape.

        With topk_ids and topk_weights [tokens, k]: x [tokens, dim], which are sent to the experts, numbered through
        over the outer axes (-1 = not sent), and their weighted sum comes back [tokens, dim].
        """
        if topk_ids is None or topk_weights is None:
            return self.act(x @ self.w1) @ self.w2
        name = self.fused_activation
        if name is None:
            raise TypeError(
                f"turnout.compat.Experts: act is {type(self.act).__name__}, expected ReLU, GELU or SiLU for routed rows"
            )
        up, down = (w.flatten(0, -3).transpose(-1, -2) for w in (self.w1, self.w2))
        return fused_experts(x, topk_ids, topk_weights, up, down, name)

    @property
    def fused_activation(self) -> str | None:
        """The fused op's name for act; None where it has none and experts run on slots."""
        return activation_name(self.act)


class Top2Gating(nn.Module):
    """Top-2 gating with capacity. Attributes: w_gating [*outer_expert_dims, dim, num_gates], and the arguments.

    second_policy_*: what becomes of the second expert: all, none, threshold or random, in training and evaluation
    capacity_factor_*: places = max(4, min(n, floor(n · factor / num_gates))) of an expert in a group

    Raises ValueError or TypeError for sizes below 1, fewer than 2 gates, unknown policies, factors that are not above
    0.
    """

    def __init__(
        self,
        dim: int,
        num_gates: int,
        eps: float = 1e-9,
        outer_expert_dims: tuple[int, ...] = (),
        second_policy_train: ops.SecondPolicy = "random",
        second_policy_eval: ops.SecondPolicy = "random",
        second_threshold_train: float = 0.2,
        second_threshold_eval: float = 0.2,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
    ) -> None:
        super().__init__()
        name = "turnout.compat.Top2Gating"
        check.positive_int(name, dim=dim, num_gates=num_gates)
        if num_gates < 2:
            raise ValueError(f"{name}: num_gates is {num_gates}, expected at least 2")
        check.one_of(name, _POLICIES, second_policy_train=second_policy_train, second_policy_eval=second_policy_eval)
        check.non_negative_number(
            name, eps=eps, second_threshold_train=second_threshold_train, second_threshold_eval=second_threshold_eval
        )
        check.positive_number(
            name, capacity_factor_train=capacity_factor_train, capacity_factor_eval=capacity_factor_eval
        )
        self.eps = eps
        self.num_gates = num_gates
        self.w_gating = nn.Parameter(torch.randn(*outer_expert_dims, dim, num_gates))
        self.second_policy_train = second_policy_train
        self.second_policy_eval = second_policy_eval
        self.second_threshold_train = second_threshold_train
        self.second_threshold_eval = second_threshold_eval
        self.capacity_factor_train = capacity_factor_train
        self.capacity_factor_eval = capacity_factor_eval

    def route(self, x: Tensor, importance: Tensor | None = None, uniform: Tensor | None = None) -> GatedChoices:
        """What forward() says, as ids and weights. uniform: [..., b, n] numbers for the policy `random`, by default
        drawn from torch's generator."""
        check.shaped("turnout.compat.Top2Gating", "x", x, "[..., b, n, dim]", self.w_gating.shape[-2])
        check.typed_as("turnout.compat.Top2Gating", "x", x, self.w_gating)
        when = "train" if self.training else "eval"
        logits = torch.einsum("...bnd,...de->...bne", x, self.w_gating)
        return gate_top2(
            logits,
            getattr(self, f"second_policy_{when}"),
            getattr(self, f"second_threshold_{when}"),
            self.eps,
            getattr(self, f"capacity_factor_{when}"),
            importance,
            uniform,
        )

    def forward(self, x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., b, n, dim] → dispatch and combine tensors [..., b, n, num_gates, capacity], and the loss.

        importance: [..., b, n]. 1: both choices; above 0: the best expert alone, as a second choice; 0: not sent
        Both tensors are float32 (float64 for float64); combine carries the gradient.
        """
        g = self.route(x, importance)
        tensors = ops.dispatch_tensors(g.topk_ids, g.topk_weights, self.num_gates, g.capacity, g.group_size)
        shape = (*x.shape[:-1], self.num_gates, g.capacity)
        return tensors.dispatch.view(shape), tensors.combine.view(shape), g.loss


def _runs_fused(experts: nn.Module) -> bool:
    return type(experts) is Experts and experts.fused_activation is not None


def _run_on_slots(experts: nn.Module, x: Tensor, gated: GatedChoices, num_inner: int, num_outer: int | None) -> Tensor:
    """Rows x [T, d] through experts of any kind, called as the package calls them: on slots [num_inner, b · c, d], or
    [num_outer, num_inner, b · c, d] where x holds num_outer equal blocks of rows; empty slots are zeros."""
    plan = ops.slot_plan(gated.topk_ids, num_inner, gated.capacity, gated.group_size)
    blocks = num_outer or 1
    places = x.shape[0] // gated.group_size // blocks * gated.capacity
    slots = ops.dispatch(x, plan).view(num_inner, blocks, places, x.shape[-1]).transpose(0, 1)
    slots = slots.squeeze(0) if num_outer is None else slots
    made = experts(slots)
    if not isinstance(made, Tensor) or made.shape != slots.shape:
        got = f"shape {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise ValueError(
            f"turnout.compat: experts ({type(experts).__name__}) returned {got} for slots of shape "
            f"{list(slots.shape)}, expected the same shape"
        )
    rows = made if num_outer is None else made.transpose(0, 1)
    return ops.combine(rows.reshape(-1, x.shape[-1]), gated.topk_weights, plan)


class MoE(nn.Module):
    """Top-2 mixture of experts.

    num_experts, hidden_dim, activation: of the default bank, an Experts
    second_policy_*, second_threshold_*, capacity_factor_*: as in Top2Gating
    loss_coef: scale of the returned loss
    experts: a module to use instead of the default bank; it is called on slots [num_experts, b · c, dim], zeros where
      empty, and returns the same shape

    Attributes: num_experts, gate, experts, loss_coef.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 16,
        hidden_dim: int | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        second_policy_train: ops.SecondPolicy = "random",
        second_policy_eval: ops.SecondPolicy = "random",
        second_threshold_train: float = 0.2,
        second_threshold_eval: float = 0.2,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        loss_coef: float = 1e-2,
        experts: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check.non_negative_number("turnout.compat.MoE", loss_coef=loss_coef)
        if experts is not None:
            check.module("turnout.compat.MoE", experts=experts)
        self.num_experts = num_experts
        self.gate = Top2Gating(
            dim,
            num_gates=num_experts,
            second_policy_train=second_policy_train,
            second_policy_eval=second_policy_eval,
            second_threshold_train=second_threshold_train,
            second_threshold_eval=second_threshold_eval,
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
        )
        self.experts = Experts(dim, num_experts, hidden_dim, activation) if experts is None else experts
        self.loss_coef = loss_coef

    def forward(self, inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """inputs [b, n, dim] → output of the same shape, and loss · loss_coef. kwargs are ignored, as there."""
        check.shaped("turnout.compat.MoE", "inputs", inputs, "[b, n, dim]", self.gate.w_gating.shape[-2])
        gated = self.gate.route(inputs)
        x = inputs.reshape(-1, inputs.shape[-1])
        if _runs_fused(self.experts):
            y = self.experts(x, gated.topk_ids, gated.topk_weights)
        else:
            y = _run_on_slots(self.experts, x, gated, self.num_experts, None)
        return y.view(inputs.shape), gated.loss * self.loss_coef


class HeirarchicalMoE(nn.Module):
    """Two levels of top-2 gating; the name is spelt as in the source, and HierarchicalMoE is the same class.

    The outer gate gives each of its experts c places a sequence. The inner gate of that expert routes those slots in
    groups of c, empty ones included in the means of its loss: where a slot's outer weight exceeds 0.5 it has both
    choices, where it exceeds 0 only the best expert, else it is not sent. Arguments as in MoE, num_experts a pair.
    experts: called on slots [outer, inner, places, dim].

    Attributes: num_experts_outer, num_experts_inner, gate_outer, gate_inner, experts, loss_coef.
    """

    def __init__(
        self,
        dim: int,
        num_experts: tuple[int, int] = (4, 4),
        hidden_dim: int | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        second_policy_train: ops.SecondPolicy = "random",
        second_policy_eval: ops.SecondPolicy = "random",
        second_threshold_train: float = 0.2,
        second_threshold_eval: float = 0.2,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        loss_coef: float = 1e-2,
        experts: nn.Module | None = None,
    ) -> None:
        super().__init__()
        name = "turnout.compat.HeirarchicalMoE"
        check.non_negative_number(name, loss_coef=loss_coef)
        if experts is not None:
            check.module(name, experts=experts)
        if not isinstance(num_experts, (tuple, list)) or len(num_experts) != 2:
            raise ValueError(f"{name}: num_experts is {num_experts!r}, expected a pair (outer, inner)")
        self.num_experts_outer, self.num_experts_inner = num_experts
        gating: dict[str, Any] = {
            "second_policy_train": second_policy_train,
            "second_policy_eval": second_policy_eval,
            "second_threshold_train": second_threshold_train,
            "second_threshold_eval": second_threshold_eval,
            "capacity_factor_train": capacity_factor_train,
            "capacity_factor_eval": capacity_factor_eval,
        }
        self.gate_outer = Top2Gating(dim, num_gates=self.num_experts_outer, **gating)
        self.gate_inner = Top2Gating(
            dim, num_gates=self.num_experts_inner, outer_expert_dims=(self.num_experts_outer,), **gating
        )
        self.experts = Experts(dim, tuple(num_experts), hidden_dim, activation) if experts is None else experts
        self.loss_coef = loss_coef

    def forward(self, inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """inputs [b, n, dim] → output of the same shape, and (outer loss + inner loss) · loss_coef. kwargs are
        ignored, as there."""
        dim = self.gate_outer.w_gating.shape[-2]
        check.shaped("turnout.compat.HeirarchicalMoE", "inputs", inputs, "[b, n, dim]", dim)
        outer_experts, inner_experts = self.num_experts_outer, self.num_experts_inner
        slots, x, outer, inner = route_to_slots(self.gate_outer.route, self.gate_inner.route, inputs, outer_experts)
        if _runs_fused(self.experts):
            ids = ops.nested_ids(inner.topk_ids, outer_experts, inner_experts)
            y = self.experts(x, ids, inner.topk_weights)
        else:
            y = _run_on_slots(self.experts, x, inner, inner_experts, outer_experts)

        output = ops.combine(y, outer.topk_weights, slots)
        return output.view(inputs.shape), (outer.loss + inner.loss) * self.loss_coef


HierarchicalMoE = HeirarchicalMoE
