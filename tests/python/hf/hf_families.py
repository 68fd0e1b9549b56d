"""Tiny random models of each transformers family, and two runs of one compared: Turnout's experts against eager ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import turnout.hf
from packaging.version import Version
from torch import Tensor, nn
from turnout.hf.models import experts_of

VOCABULARY, HIDDEN, FFN, EXPERTS, TOP_K, LAYERS = 61, 32, 24, 6, 2, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LATENT: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": FFN,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": LAYERS + 1,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}

# Before 5.18 transformers' own code fails at the other one.
_DEEPSEEK_V2_TOPK = "greedy" if Version(transformers.__version__) < Version("5.18") else "group_limited_greedy"

CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, intermediate_size=FFN, num_local_experts=EXPERTS),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_COMMON, intermediate_size=40, moe_intermediate_size=FFN, shared_expert_intermediate_size=20,
        num_experts=EXPERTS, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, head_dim=8, intermediate_size=40, moe_intermediate_size=FFN, num_experts=EXPERTS,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**_COMMON, intermediate_size=FFN, num_experts=EXPERTS),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**_LATENT, topk_method=_DEEPSEEK_V2_TOPK),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_LATENT, norm_topk_prob=True),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_COMMON, head_dim=8, intermediate_size=FFN, num_local_experts=EXPERTS, sliding_window=16,
    ),
    "switch_transformers": lambda: transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_ff=FFN, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=EXPERTS, expert_capacity=3,
        dropout_rate=0.0, router_jitter_noise=0.0, pad_token_id=0, eos_token_id=None,
        decoder_start_token_id=1,
    ),
}  # fmt: skip

FAMILIES = tuple(CONFIGS)


def make_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in evaluation mode whose experts run eagerly, with weights that let every part matter."""
    config = CONFIGS[family]()
    causal = transformers.AutoModelForCausalLM
    model = (transformers.SwitchTransformersForConditionalGeneration(config) if family == "switch_transformers"
             else causal.from_config(config))  # fmt: skip
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif "norm" in name and tensor.dim() == 1 and name.endswith("weight"):
                tensor.normal_(1, 0.1)
            elif isinstance(tensor, nn.Parameter):
                tensor.normal_(0, 0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5)
        # Each token leans towards another one: with flat logits bfloat16 would leave few greedy tokens to compare.
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if head is not embedding:
            head += 2 * embedding.roll(7, 0)
    model = model.to(dtype).eval()
    if family != "switch_transformers":
        model.set_experts_implementation("eager")
    return model


def make_inputs(family: str, batch: int, tokens: int, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        for row in range(batch):  # on the left, as generate() wants it
            inputs["attention_mask"][row, : row % tokens] = 0
        inputs["input_ids"] = ids * inputs["attention_mask"]
    if family == "switch_transformers":
        inputs["decoder_input_ids"] = torch.randint(2, VOCABULARY, (batch, tokens))
    return inputs


def on_turnout(model: Any) -> Any:
    """A copy whose experts run by Turnout; the user's way where the family has one."""
    model = copy.deepcopy(model)
    if hasattr(model.config, "dense_act_fn"):
        return turnout.hf.patch(model)
    model.set_experts_implementation("turnout")
    return model


@contextmanager
def recorded_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the experts were asked for, module by module: ids (Switch: one-hot), [tokens, …]."""
    choices: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: choices.append(given[1].detach()))
        for _, module in experts_of(model)
    ]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Run:
    logits: Tensor
    """[batch, tokens, vocabulary], detached"""
    gradients: dict[str, Tensor]
    choices: list[Tensor]


def forward(model: Any, inputs: dict[str, Tensor]) -> Run:
    with recorded_choices(model) as choices, torch.no_grad():
        logits = model(**inputs).logits
    return Run(logits, {}, choices)


def backward(model: Any, inputs: dict[str, Tensor], rows: Tensor) -> Run:
    """With the gradients of a random linear function of the logits of the given sequences."""
    with recorded_choices(model) as choices:
        logits = model(**inputs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (logits[rows] * weights[rows].to(logits.dtype)).sum().backward()
    return Run(logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, choices)


def sequences_of_one_mind(batch: int, *runs: Run) -> Tensor:
    """[sequences] whose experts are the same in all runs.

    Near a tie of the router, rounding decides, and what follows differs by more than rounding: such sequences are left
    out. Tests ask that most remain.
    """
    agree = torch.ones(batch, dtype=torch.bool)
    for first, *others in zip(*(run.choices for run in runs), strict=True):
        for other in others:
            same = first.sort(-1).values == other.sort(-1).values if first.dim() == 2 else first == other
            agree &= same.reshape(batch, -1).all(-1)
    return agree.nonzero()[:, 0]
