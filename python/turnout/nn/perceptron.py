"""Experts that are modules: the two-layer perceptron, and how any modules run on routed tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..experts import fused_experts

# Activations that both a module and the fused op know.
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
}


def activation_name(module: object) -> str | None:
    """What the fused op calls the activation that this module computes; None where it has no name for it."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


class Perceptron(nn.Sequential):
    """Linear, activation, Linear: [..., hidden] → [..., hidden], with biases, drawn as nn.Linear draws them."""

    def __init__(self, hidden: int, ffn: int, activation: str = "gelu") -> None:
        if activation not in _MODULES:
            raise ValueError(
                f"turnout.nn.Perceptron: activation is {activation!r}, expected one of {', '.join(_MODULES)}"
            )
        super().__init__(nn.Linear(hidden, ffn), _MODULES[activation](), nn.Linear(ffn, hidden))

    @property
    def weight(self) -> nn.Parameter:
        """The first matrix, [ffn, hidden]."""
        return self[0].weight


class _Weights(NamedTuple):
    """Weights of a module that the fused op computes exactly as the module does."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    def fits(self, other: _Weights) -> bool:
        """Both can stand in one call: same sizes, types, biases and activation."""

        def kind(tensor: Tensor | None) -> tuple[object, ...] | None:
            return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)

        return self.activation == other.activation and all(
            kind(mine) == kind(theirs) for mine, theirs in zip(self[:4], other[:4], strict=True)
        )


def _has_own_behaviour(module: nn.Module) -> bool:
    """Hooks or a replaced forward, which a fused call would pass over."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _weights_of(module: nn.Module) -> _Weights | None:
    """The weights of Sequential(Linear, activation, Linear); None for anything else, subclasses of Linear included."""
    if type(module) not in (nn.Sequential, Perceptron) or len(module) != 3:
        return None
    first, act, second = module
    name = activation_name(act)
    if type(first) is not nn.Linear or type(second) is not nn.Linear or name is None:
        return None
    if first.out_features != second.in_features or first.in_features != second.out_features:
        return None
    if any(_has_own_behaviour(part) for part in (module, first, act, second)):
        return None
    return _Weights(first.weight, second.weight, first.bias, second.bias, name)


def _all_weights(experts: Iterable[nn.Module]) -> list[_Weights] | None:
    found: list[_Weights] = []
    for expert in experts:
        weights = _weights_of(expert)
        if weights is None or (found and not weights.fits(found[0])):
            return None
        found.append(weights)
    return found


def run_experts(experts: Sequence[nn.Module], x: Tensor, topk_weights: Tensor, plan: ops.DispatchPlan) -> Tensor:
    """y[t] = Σ_k topk_weights[t, k] · experts[topk_ids[t, k]](x[t]), for the choices that `plan` grouped.

    experts: any modules that make [rows, hidden] of [rows, hidden]. Two-layer perceptrons (nn.Sequential of Linear,
      ReLU, GELU or SiLU, Linear, all of one size, without hooks) run as one fused op over lists of their weights;
      others are called once each on their rows, also on none, so that every parameter gets a gradient
    x: [tokens, hidden]; topk_weights: [tokens, top_k] float32 or x's type

    Double backward works through modules; the fused op refuses it in words.
    Raises ValueError or TypeError that names the expert whose output is no tensor of the expected shape.
    """
    if len(experts) != plan.num_experts:
        raise ValueError(f"turnout: experts holds {len(experts)} modules, expected {plan.num_experts} as the plan has")
    perceptrons = _all_weights(experts)
    if perceptrons is None:
        return _run_modules(experts, x, topk_weights, plan)
    up, down, up_bias, down_bias, names = zip(*perceptrons, strict=True)
    biases = {
        "up_bias": None if up_bias[0] is None else up_bias,
        "down_bias": None if down_bias[0] is None else down_bias,
    }
    return fused_experts(x, plan, topk_weights, up, down, names[0], **biases)


def _run_modules(experts: Sequence[nn.Module], x: Tensor, topk_weights: Tensor, plan: ops.DispatchPlan) -> Tensor:
    rows = ops.dispatch(x, plan)
    counts = plan.tokens_per_expert.tolist()
    # Copies, not views: a module may start with an operation in place.
    *parts, rest = torch.split_with_sizes_copy(rows, [*counts, rows.shape[0] - sum(counts)])
    made = [_call(expert, e, part) for e, (expert, part) in enumerate(zip(experts, parts, strict=True))]
    return ops.combine(torch.cat([*made, rest.to(made[0].dtype)]), topk_weights, plan)


def _call(expert: nn.Module, index: int, rows: Tensor) -> Tensor:
    y = expert(rows)
    if not isinstance(y, Tensor):
        raise TypeError(
            f"turnout: expert {index} ({type(expert).__name__}) returned {type(y).__name__}, expected a tensor"
        )
    if y.shape != rows.shape:
        raise ValueError(
            f"turnout: expert {index} ({type(expert).__name__}) returned shape {list(y.shape)} for rows of shape "
            f"{list(rows.shape)}, expected the same shape"
        )
    return y
