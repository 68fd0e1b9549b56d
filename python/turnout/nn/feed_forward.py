"""Feed-forward networks that own their weights: one dense, a bank of many, and experts that are any modules.

Names, shapes and initial values of the parameters are those of the C++ modules, so a state_dict moves between both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import ops
from ..experts import GATED, Activation, fused_experts
from .perceptron import run_experts


class _Bank(nn.Module):
    """Parameters of one feed-forward network, or of as many as `leading` says."""

    up: nn.Parameter
    down: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self, leading: tuple[int, ...], hidden: int, ffn: int, activation: Activation, bias: bool, **where: Any
    ) -> None:
        super().__init__()
        name = f"turnout.nn.{type(self).__name__}"
        check.positive_int(name, hidden=hidden, ffn=ffn)
        check.one_of(name, get_args(Activation), activation=activation)
        self.hidden, self.ffn, self.activation = hidden, ffn, activation
        rows = 2 * ffn if activation in GATED else ffn
        shapes: dict[str, tuple[int, ...]] = {"up": (rows, hidden), "down": (hidden, ffn)}
        if bias:
            shapes |= {"up_bias": (rows,), "down_bias": (hidden,)}
        for part in ("up", "down", "up_bias", "down_bias"):
            shape = shapes.get(part)
            made = None if shape is None else nn.Parameter(torch.empty(*leading, *shape, **where))
            self.register_parameter(part, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights and biases uniformly from ±1/√fan_in, as nn.Linear does."""
        for parameter, fan_in in (
            (self.up, self.hidden), (self.down, self.ffn), (self.up_bias, self.hidden), (self.down_bias, self.ffn)
        ):  # fmt: skip
            if parameter is not None:
                bound = 1 / math.sqrt(fan_in)
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, ffn={self.ffn}, activation={self.activation}, bias={self.up_bias is not None}"


class FeedForward(_Bank):
    """A dense feed-forward block, x [..., hidden] → the same shape: the twin of an MoE layer, and its shared expert.

    Attributes: up [ffn, hidden], or [2·ffn, hidden] for swiglu and geglu, gate rows first; down [hidden, ffn]; up_bias
    and down_bias, or None.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        activation: Activation = "gelu",
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((), hidden, ffn, activation, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.feed_forward(
            x, self.up, self.down, self.activation, up_bias=self.up_bias, down_bias=self.down_bias
        )


class FeedForwardBank(_Bank):
    """Feed-forward experts whose weights stand in one tensor a matrix; runs as one fused op.

    Attributes: those of FeedForward with a leading axis of num_experts.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        num_experts: int,
        activation: Activation = "gelu",
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.positive_int("turnout.nn.FeedForwardBank", num_experts=num_experts)
        super().__init__((num_experts,), hidden, ffn, activation, bias, device=device, dtype=dtype)
        self.num_experts = num_experts

    def forward(self, x: Tensor, topk_weights: Tensor, plan: ops.DispatchPlan) -> Tensor:
        """x [tokens, hidden], topk_weights [tokens, top_k] → [tokens, hidden]"""
        return fused_experts(
            x, plan, topk_weights, self.up, self.down, self.activation, up_bias=self.up_bias, down_bias=self.down_bias
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"


class ModuleExperts(nn.ModuleList):
    """Experts that are any modules from [rows, hidden] to [rows, hidden], driven by a plan.

    Each is called once on its rows, also on none, so that every parameter gets a gradient; two-layer perceptrons of one
    size run as one fused op instead.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        if not isinstance(experts, Iterable):
            raise TypeError(
                f"turnout.nn.ModuleExperts: experts is a {type(experts).__name__}, expected a list of modules"
            )
        modules = list(experts)
        for index, module in enumerate(modules):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"turnout.nn.ModuleExperts: experts[{index}] is a {type(module).__name__}, expected a "
                    "torch.nn.Module"
                )
        if not modules:
            raise ValueError("turnout.nn.ModuleExperts: experts is empty, expected at least one module")
        super().__init__(modules)

    @property
    def num_experts(self) -> int:
        return len(self)

    def forward(self, x: Tensor, topk_weights: Tensor, plan: ops.DispatchPlan) -> Tensor:
        """x [tokens, hidden], topk_weights [tokens, top_k] → [tokens, hidden]"""
        return run_experts(self, x, topk_weights, plan)
