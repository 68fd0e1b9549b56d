"""One sparse block of each transformers family, and the turnout.MoE that stands in for it with copies of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import turnout
from hf_families import make_model
from torch import Tensor, nn
from turnout.hf.models import experts_of

Named = dict[str, Tensor | None]


@dataclass
class Case:
    """How the options of a layer follow from the config of a model."""

    preset: str
    gate: str = "gate"
    shared: str = ""
    shared_gate: str = ""
    activation: str = "swiglu"
    float32_gate: bool = False
    """the gate computes in float32 whatever the model's type"""


CASES = {
    "mixtral": Case("mixtral"),
    "qwen2_moe": Case("qwen2_moe", shared="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_moe": Case("qwen3_moe"),
    "olmoe": Case("olmoe"),
    "deepseek_v2": Case("deepseek_v2", shared="shared_experts", float32_gate=True),
    "deepseek_v3": Case("deepseek_v3", shared="shared_experts", float32_gate=True),
    "gpt_oss": Case("gpt_oss", gate="router", activation="swiglu_clamped"),
    "switch_transformers": Case("switch", gate="router", activation="relu", float32_gate=True),
}


def make_block(family: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The first sparse block of a tiny model, and the model's config."""
    model = make_model(family, dtype)
    name = next(name for name, _ in experts_of(model))
    return model.get_submodule(name.rpartition(".")[0]), model.config


def switches(family: str, config: Any) -> dict[str, Any]:
    """The preset, with the numbers of this config."""
    chosen: dict[str, Any] = dict(turnout.router_preset(CASES[family].preset))
    if getattr(config, "norm_topk_prob", False):
        chosen["weights"] = "normalized"
    if family.startswith("deepseek"):
        chosen |= {"scale": config.routed_scaling_factor, "groups": config.n_group, "kept_groups": config.topk_group}
        if getattr(config, "topk_method", None) == "greedy":
            chosen |= {"groups": 1, "kept_groups": 1}
    return chosen


def make_layer(family: str, block: nn.Module, config: Any, dtype: torch.dtype) -> turnout.MoE:
    case = CASES[family]
    values = in_turnout(family, block, dict(block.named_parameters()))
    num_experts, hidden, ffn = values["experts.down"].shape
    capacity = turnout.CapacityOptions()
    if family == "switch_transformers":
        capacity = turnout.CapacityOptions(fixed=config.expert_capacity, per_sequence=True, order="position")
    shared = values.get("shared.down")
    layer = turnout.MoE(
        hidden,
        ffn,
        num_experts,
        1 if family == "switch_transformers" else config.num_experts_per_tok,
        activation=case.activation,
        bias="experts.up_bias" in values,
        shared_ffn=0 if shared is None else shared.shape[1],
        shared_gated=bool(case.shared_gate),
        gate_bias="gate.bias" in values,
        router=switches(family, config),
        selection_bias=family == "deepseek_v3",
        capacity=capacity,
        load_count="per_token",
        balance_coefficient=1.0,
        dtype=dtype,
    )
    if case.float32_gate:
        layer.gate.float()
    if layer.selection_bias is not None:
        values["selection_bias"] = block.gate.e_score_correction_bias
    layer.load_state_dict(values, strict=True)
    return layer


def in_turnout(family: str, block: nn.Module, tensors: dict[str, Tensor | None]) -> Named:
    """Parameters of a block, or their gradients, under the names and in the layout of turnout.MoE."""
    case = CASES[family]
    named: Named = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if tensor is None or owner.startswith("experts") and family == "switch_transformers":
            continue
        if owner == "experts":
            named["experts." + EXPERT_PARTS[part]] = in_layout(family, part, tensor)
        elif owner in (case.gate, case.gate + ".classifier"):
            named["gate." + part] = tensor
        elif owner == case.shared_gate:
            named["shared_gate." + part] = tensor
    if case.shared:
        matrices = [tensors.get(f"{case.shared}.{part}_proj.weight") for part in ("gate", "up", "down")]
        named |= {"shared.up": torch.cat(matrices[:2]), "shared.down": matrices[2]}
    if family == "switch_transformers":
        for mine, theirs in (("up", "wi"), ("down", "wo")):
            parts = [(tensors[f"experts.expert_{e}.{theirs}.weight"], getattr(block.experts[f"expert_{e}"], theirs).weight)
                     for e in range(len(block.experts))]  # fmt: skip
            named["experts." + mine] = torch.stack([torch.zeros_like(w) if t is None else t for t, w in parts])
    return named


EXPERT_PARTS = {
    "gate_up_proj": "up",
    "down_proj": "down",
    "gate_up_proj_bias": "up_bias",
    "down_proj_bias": "down_bias",
}


def in_layout(family: str, part: str, tensor: Tensor) -> Tensor:
    """GPT-OSS stores matrices transposed, with gate and up rows in turn."""
    if family != "gpt_oss":
        return tensor
    if not part.endswith("bias"):
        tensor = tensor.transpose(1, 2)
    if part.startswith("gate_up"):
        tensor = torch.cat([tensor[:, 0::2], tensor[:, 1::2]], 1)
    return tensor
