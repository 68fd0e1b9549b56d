"""The experts of a transformers model as a bank of Turnout, and the function that transformers calls for them.

transformers describes an experts module by flags (has_gate, has_bias, is_transposed, is_concatenated) and by names of
weights; here they become the arguments of turnout.fused_experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..experts import Activation, PackedExperts, Weights, fused_experts

IMPLEMENTATION = "turnout"
"""The name under which transformers finds the experts of this library."""

_PACKED = "_turnout_packed"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# transformers' classes of activations, which compute what the torch modules of the same meaning do.
_ACTIVATIONS: dict[str, Activation] = {
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
_GATED: dict[str, Activation] = {"silu": "swiglu", "gelu": "geglu"}


class Bank(NamedTuple):
    """Weights of all experts in Turnout's layout, with the names of fused_experts."""

    up: Weights
    down: Weights
    activation: Activation
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def register() -> None:
    """Tells transformers of the implementation, once for plain and once for quantised experts, which it refuses."""
    from transformers.integrations import finegrained_fp8, moe

    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    quantised = getattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    if quantised is not None:
        quantised.register(IMPLEMENTATION, experts_forward)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls as the forward of an experts module.

    hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, top_k] → [tokens, hidden]
    Raises TypeError or ValueError for experts that Turnout does not compute, RuntimeError for training from packed
    ones.
    """
    # Under expert parallelism the experts of other ranks have ids from num_experts on.
    if getattr(module, "_is_expert_parallel", True):
        top_k_index = top_k_index.masked_fill(top_k_index >= module.num_experts, -1)
    packed = packed_of(module)
    if packed is not None:
        return run_packed(module, hidden_states, top_k_index, top_k_weights, packed)
    if is_copied(module) and top_k_index.numel() < module.num_experts:
        # Fewer choices than experts, as in decoding: only the chosen ones are copied, one for each choice.
        bank = bank_of(module, top_k_index.reshape(-1).clamp_min(0))
        of_choice = torch.arange(top_k_index.numel(), device=top_k_index.device).view_as(top_k_index)
        top_k_index = of_choice.masked_fill(top_k_index < 0, -1)
    else:
        bank = bank_of(module)
    return run(bank, hidden_states, top_k_index, top_k_weights)


def run(bank: Bank, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return fused_experts(
        x, topk_ids, topk_weights, bank.up, bank.down, bank.activation, up_bias=bank.up_bias, down_bias=bank.down_bias
    )


def packed_of(module: nn.Module) -> PackedExperts | None:
    """What prepack() left on the module."""
    return module.__dict__.get(_PACKED)


def run_packed(
    module: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, packed: PackedExperts
) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad):
        raise RuntimeError(
            f"turnout.hf: a gradient is asked of {type(module).__name__}, whose weights are packed for inference; call "
            "the model under torch.no_grad(), or turnout.hf.unpack(model) before training"
        )
    return fused_experts(x, topk_ids, topk_weights, packed)


def uses_interface(module: nn.Module) -> bool:
    """Whether transformers lets this module's forward be chosen by name."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias") and hasattr(module, "config")


def bank_of(module: nn.Module, chosen: Tensor | None = None) -> Bank:
    """The weights of an experts module that goes through transformers' interface, or of the chosen experts alone.

    Views of the parameters where those stand in Turnout's layout. Transposed weights, and rows that alternate between
    gate and up, are copied at each call (GPT-OSS: both matrices).
    Raises TypeError or ValueError in words for experts that Turnout does not compute.
    """

    def read(name: str) -> Tensor:
        weight = _weight(module, name)
        return weight if chosen is None else weight[chosen]

    up_name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    up, down, up_bias, down_bias = read(up_name), read("down_proj"), None, None
    if module.has_bias:
        up_bias, down_bias = read(f"{up_name}_bias"), read("down_proj_bias")
    activation = activation_of(module)
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if is_interleaved(module):
        up = _gate_rows_first(up)
        up_bias = None if up_bias is None else _gate_rows_first(up_bias)
    return Bank(up, down, activation, up_bias, down_bias)


def activation_of(module: nn.Module) -> Activation:
    """Turnout's name for what the experts compute between the products.

    Raises TypeError or ValueError that names the module, its activation and the known ones.
    """
    owner = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise TypeError(f"turnout.hf: {owner} normalises the output of each expert, which Turnout's experts do not")
    gate = _gate_name(module)
    if gate == "GptOssExperts._apply_gate":
        return _clamped_swiglu(module)
    act = getattr(module, "act_fn", None)
    name, act = activation_name(act), type(act).__name__
    if not getattr(module, "has_gate", True):
        if name is None:
            raise ValueError(f"turnout.hf: {owner} has the activation {act}, expected one of {', '.join(_ACTIVATIONS)}")
        return name
    if gate != "_default_apply_gate":
        raise TypeError(f"turnout.hf: {owner} has a gate of its own, {gate}, which Turnout's experts do not compute")
    if name not in _GATED:
        raise ValueError(
            f"turnout.hf: {owner} has the activation {act} in its gate, expected SiLU (swiglu) or exact GELU (geglu)"
        )
    return _GATED[name]


def activation_name(act: object) -> Activation | None:
    """Turnout's name for an activation module; None where it has none."""
    return _ACTIVATIONS.get(type(act).__name__)


def is_copied(module: nn.Module) -> bool:
    """Whether the weights stand in another layout than Turnout's."""
    return module.is_transposed or is_interleaved(module)


def is_interleaved(module: nn.Module) -> bool:
    """Whether gate and up alternate. transformers 5.0 has no flag for it; its one such family is GPT-OSS."""
    return not getattr(module, "is_concatenated", _gate_name(module) != "GptOssExperts._apply_gate")


def _gate_name(module: nn.Module) -> str:
    return getattr(getattr(type(module), "_apply_gate", None), "__qualname__", "_default_apply_gate")


def _clamped_swiglu(module: nn.Module) -> Activation:
    """GPT-OSS. Its two numbers are constants of Turnout's activation."""
    alpha, limit = float(module.alpha), float(module.limit)
    if not (math.isclose(alpha, 1.702) and math.isclose(limit, 7.0)):
        raise ValueError(
            f"turnout.hf: {type(module).__name__} has alpha {alpha} and limit {limit}, expected 1.702 and 7.0"
        )
    return "swiglu_clamped"


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"turnout.hf: {type(module).__name__}.{name} is a {type(weight).__name__}, expected a tensor")
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"turnout.hf: {type(module).__name__}.{name} is {weight.dtype}, expected float32, float64, bfloat16 or "
            "float16. Turnout reads no quantised weights: load the model without quantization_config, or dequantised"
        )
    return weight


def _gate_rows_first(rows: Tensor) -> Tensor:
    """Rows gate, up, gate, up, … on axis 1 → all gate rows, then all up rows: one strided copy."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
