"""Router presets against transformers' own router modules: ids, weights, gradients, in float32 and bfloat16."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import turnout
from naive import assert_close

transformers = pytest.importorskip("transformers")

HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 12, 3, 200
_COMMON = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "num_attention_heads": 2}
_LATENT = {**_COMMON, "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2}

# family: module, router class, config class, config, the switches that the config changes
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralTopKRouter", "MixtralConfig", {"num_local_experts": EXPERTS}, {}),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", {"num_experts": EXPERTS}, {}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"num_experts": EXPERTS}, {}),
    "qwen3_moe norm_topk_prob": (
        "qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"num_experts": EXPERTS, "norm_topk_prob": True},
        {"weights": "normalized"},
    ),
    "olmoe": ("olmoe", "OlmoeTopKRouter", "OlmoeConfig", {"num_experts": EXPERTS}, {}),
    "deepseek_v2": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config",
        {**_LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        {"groups": 4, "kept_groups": 2},
    ),
    "deepseek_v2_lite": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config", {**_LATENT, "topk_method": "greedy"}, {},
    ),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", _LATENT, {"groups": 4, "kept_groups": 2}),
    "deepseek_v3 without norm_topk_prob": (
        "deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", {**_LATENT, "norm_topk_prob": False},
        {"groups": 4, "kept_groups": 2, "weights": "probability"},
    ),
    "gpt_oss": ("gpt_oss", "GptOssTopKRouter", "GptOssConfig", {"num_local_experts": EXPERTS}, {}),
}  # fmt: skip


def router_of(case: str) -> torch.nn.Module:
    module, router, config, more, _ = FAMILIES[case]
    made = getattr(transformers, config)(**{**_COMMON, **more})
    built = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), router)(made)
    for tensor in (*built.parameters(), *built.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)  # the selection bias too: about half of its entries are negative
    return built


def options_of(case: str) -> dict[str, Any]:
    return {**turnout.router_preset(case.split()[0]), **FAMILIES[case][4]}


def sorted_by_id(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, order = ids.sort(-1)
    return ids, weights.gather(-1, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [TOKENS, 1])
@pytest.mark.parametrize("case", FAMILIES)
def test_parity(case, tokens, dtype) -> None:
    router = router_of(case).to(dtype)
    x = torch.randn(tokens, HIDDEN, dtype=dtype)
    logits, their_weights, their_ids = router(x)
    weight = router.weight.detach().clone().requires_grad_()
    if "deepseek" in case:
        ours = F.linear(x.float(), weight.float())  # a gate in float32
    else:
        ours = F.linear(x, weight, getattr(router, "bias", None))
    assert torch.equal(ours, logits)
    routing = turnout.route(
        ours, TOP_K, **options_of(case), selection_bias=getattr(router, "e_score_correction_bias", None)
    )

    distinct = no_ties(logits)  # the lower id wins here, either there
    ids, weights = sorted_by_id(routing.topk_ids, routing.topk_weights)
    their_ids, their_weights = sorted_by_id(their_ids, their_weights)
    assert distinct.sum() > 0.6 * tokens or tokens == 1
    assert torch.equal(ids[distinct], their_ids[distinct])
    assert_close(weights[distinct], their_weights[distinct], terms=2)

    factor = torch.randn(tokens, TOP_K).to(weights.dtype) * distinct.unsqueeze(1)
    (weights * factor).sum().backward()
    (their_weights * factor).sum().backward()
    assert_close(weight.grad, router.weight.grad, terms=TOKENS)


def no_ties(logits: torch.Tensor) -> torch.Tensor:
    """Tokens whose logits all differ."""
    ordered = logits.detach().sort(-1).values
    return (ordered.diff(dim=-1) > 0).all(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switch_weights_are_the_largest_probability(dtype) -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = transformers.SwitchTransformersConfig(d_model=HIDDEN, num_experts=EXPERTS, expert_capacity=5)
    router = SwitchTransformersTop1Router(config).eval()
    torch.nn.init.normal_(router.classifier.weight)
    x = torch.randn(2, 40, HIDDEN, dtype=dtype)
    one_hot, probability, logits = router(x)
    routing = turnout.route(logits.view(-1, EXPERTS), 1, **turnout.router_preset("switch"))
    capped = turnout.limit_capacity(routing.topk_ids, routing.topk_weights, EXPERTS, 5, 40)
    assert_close(routing.topk_weights.to(dtype), probability.view(-1, 1), terms=1)
    # they choose by probabilities rounded to x's type, which can tie
    ties = (logits.softmax(-1).to(dtype).sort(-1).values[..., -2:].diff(dim=-1) == 0).any()
    dispatched = one_hot.view(-1, EXPERTS)
    expected = torch.where(dispatched.any(-1), dispatched.argmax(-1), -1)
    assert ties or torch.equal(capped.topk_ids[:, 0], expected)
    assert int(capped.dropped) > 0


def test_gshard_weighs_as_top2_gating_that_keeps_both() -> None:
    """route_top2 itself is compared with the package mixture-of-experts in test_gshard_oracle.py."""
    logits = torch.randn(TOKENS, EXPERTS)
    routing = turnout.route(logits, 2, **turnout.router_preset("gshard"))
    both = turnout.route_top2(logits, "all")
    assert torch.equal(routing.topk_ids, both.topk_ids)
    assert_close(routing.topk_weights, both.topk_weights, terms=2)


def test_every_preset_is_named_and_complete() -> None:
    names = turnout.router_preset_names()
    assert {case.split()[0] for case in FAMILIES} | {"switch", "gshard", "noisy_topk"} == set(names)
    for name in names:
        assert set(turnout.router_preset(name)) == set(turnout.RouterOptions.__annotations__)
