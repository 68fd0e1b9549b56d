"""Feed-forward experts over routed tokens, from plain or packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .ops import DispatchPlan

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "swiglu_clamped"]
GATED: tuple[Activation, ...] = ("swiglu", "geglu", "swiglu_clamped")
"""Activations whose `up` holds gate rows, then up rows."""
Weights = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class PackedExperts:
    """An owned snapshot of expert weights for inference, made by prepack(). Later changes of the weights it was made
    from do not reach it. Plain tensors and words: it pickles, copies and compiles."""

    data: Tensor | None
    """[bytes] uint8, up and down in the panels of one kernel; None where up and down hold them"""
    layout: str
    """which kernel, type and sizes data is for; empty where it is None"""
    num_experts: int
    ffn: int
    activation: Activation
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    up_bias: tuple[Tensor, ...]
    down_bias: tuple[Tensor, ...]


def fused_experts(
    x: Tensor,
    topk_ids: Tensor | DispatchPlan,
    topk_weights: Tensor,
    up: Weights | PackedExperts,
    down: Weights | None = None,
    activation: Activation = "swiglu",
    *,
    up_bias: Weights | None = None,
    down_bias: Weights | None = None,
    recompute: bool = False,
    weight_before_down: bool = False,
) -> Tensor:
    """y[t] = Σ_k topk_weights[t, k] · (down_e · act(up_e · x[t] + up_bias_e) + down_bias_e), e = topk_ids[t, k].

    x: [tokens, hidden] float32, float64, bfloat16 or float16; all weights and biases of the same type
    topk_ids: [tokens, top_k] int32 or int64; -1 = not sent, adds nothing. Or the plan() of them, where there is one
    topk_weights: [tokens, top_k] float32, or x's type
    up: [experts, ffn, hidden]; for the gated activations (swiglu, geglu, swiglu_clamped) [experts, 2·ffn, hidden], gate
      rows first. A list of one tensor an expert does as well and is never stacked. Or what prepack() returned, which
      stands in for all weights, biases and the activation
    activation: swiglu_clamped is GPT-OSS's, g·σ(1.702·g)·(v + 1) with g = min(gate, 7) and v = up within ±7
    down: [experts, hidden, ffn], or a list; up_bias: [experts, rows of up]; down_bias: [experts, hidden]
    recompute: keep no pre-activations for the backward; it computes them anew
    weight_before_down: apply topk_weights to act(…) and down_bias (Megatron), not to the expert's output (Hugging
      Face): the same but for rounding

    Returns [tokens, hidden] of x's type; tokens that are not sent get zeros.
    Raises ValueError or TypeError that names the argument; RuntimeError when a gradient is asked of packed weights.
    Gradient: to x, topk_weights, weights and biases; an expert without tokens gets zeros. Double backward is refused.
    Deterministic. A NaN token harms only itself. torch.compile takes it without a graph break. Under autocast x and
    the weights are cast, topk_weights are not.
    """
    if isinstance(up, PackedExperts):
        _check_packed_call(up, x, topk_weights, down, activation, up_bias, down_bias)
        if up.data is not None:
            plan = topk_ids if isinstance(topk_ids, DispatchPlan) else torch.ops.turnout.plan(topk_ids, up.num_experts)
            return torch.ops.turnout.experts_packed(
                x, topk_weights, *plan, up.data, up.layout, up.ffn, up.up_bias, up.down_bias, up.activation,
                weight_before_down,
            )  # fmt: skip
        weights = (up.up, up.down, up.up_bias, up.down_bias)
        activation = up.activation
    else:
        if down is None:
            raise TypeError(
                "turnout.fused_experts: down is None, expected a tensor or a list of tensors; only weights from "
                "turnout.prepack stand in for both"
            )
        weights = (_as_list("up", up), _as_list("down", down), _as_list("up_bias", up_bias),
                   _as_list("down_bias", down_bias))  # fmt: skip
    options = (activation, recompute, weight_before_down)
    if isinstance(topk_ids, DispatchPlan):
        return torch.ops.turnout.experts(x, topk_weights, *topk_ids, *weights, *options)
    return torch.ops.turnout.fused_experts(x, topk_ids, topk_weights, *weights, *options)


def prepack(
    up: Weights,
    down: Weights,
    activation: Activation = "swiglu",
    *,
    up_bias: Weights | None = None,
    down_bias: Weights | None = None,
) -> PackedExperts:
    """An owned snapshot of expert weights for inference; arguments as in fused_experts.

    Pass it as turnout.fused_experts(x, topk_ids, topk_weights, packed). float32 and bfloat16 weights on the CPU are
    packed for the active kernel (TURNOUT_FORCE_ISA, or the machine's best) and run on that kernel alone; other types
    and devices keep copies. Costs reading and writing the weights once, and their memory, an expert's outputs padded
    to a panel (32 on AVX-512); nothing is packed at any other time, and the weights themselves may be freed.
    It carries no gradient: call under torch.no_grad() or with inputs that need none. Call it outside of compiled code.
    Raises ValueError or TypeError for weights that do not fit together.
    """
    named = (("up", up), ("down", down), ("up_bias", up_bias), ("down_bias", down_bias))
    lists = [_as_list(name, weights, "turnout.prepack") for name, weights in named]
    lists = [[t.detach() for t in tensors] for tensors in lists]
    layout, num_experts, ffn = torch.ops.turnout.packed_layout(*lists[:2], activation)
    data = torch.ops.turnout.prepack(*lists[:2], activation) if layout else None
    kept = [() if layout and i < 2 else tuple(t.clone() for t in tensors) for i, tensors in enumerate(lists)]
    packed = PackedExperts(data, layout, num_experts, ffn, activation, *kept)
    _check_biases(packed, lists[0][0])
    return packed


def _as_list(name: str, weights: Weights | None, owner: str = "turnout.fused_experts") -> list[Tensor]:
    if weights is None:
        return []
    if not isinstance(weights, (Tensor, Iterable)):
        raise TypeError(
            f"{owner}: {name} is a {type(weights).__name__}, expected a tensor or a list of tensors"
        )
    axes = 2 if name.endswith("bias") else 3
    if isinstance(weights, Tensor) and weights.dim() != axes:
        raise ValueError(
            f"{owner}: {name} has shape {list(weights.shape)}, expected {axes} axes, the first of them the experts"
        )
    tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{owner}: {name} holds a {type(tensor).__name__}, expected a tensor or a list of tensors"
            )
    return tensors


def _check_biases(packed: PackedExperts, up: Tensor) -> None:
    """The op checks them: it is asked with no token."""
    x = up.new_empty((0, up.shape[-1]))
    ids = torch.empty((0, 1), dtype=torch.int64, device=up.device)
    weights = torch.empty((0, 1), dtype=torch.float32, device=up.device)
    fused_experts(x, ids, weights, packed)


def _check_packed_call(
    packed: PackedExperts,
    x: Tensor,
    topk_weights: Tensor,
    down: object,
    activation: str,
    up_bias: object,
    down_bias: object,
) -> None:
    for name, value in (("down", down), ("up_bias", up_bias), ("down_bias", down_bias)):
        if value is not None:
            raise TypeError(f"turnout.fused_experts: {name} is given beside packed weights, which hold all of them")
    if activation not in ("swiglu", packed.activation):  # swiglu is what an omitted argument says
        raise ValueError(
            f"turnout.fused_experts: activation is {activation!r}, expected {packed.activation!r}, for which the "
            "weights were packed"
        )
    if torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad):
        name = "x" if x.requires_grad else "topk_weights"
        raise RuntimeError(
            f"turnout.fused_experts: {name} requires a gradient, but packed weights are for inference; pass the plain "
            "weights, or call under torch.no_grad()"
        )
