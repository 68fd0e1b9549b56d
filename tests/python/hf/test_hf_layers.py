"""turnout.MoE against the sparse block of each family: choices exactly, weights to ulps, outputs and all gradients."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
import transformers
import turnout
from hf_bounds import assert_as_exact
from hf_families import EXPERTS, FAMILIES, HIDDEN, TOP_K, make_inputs, make_model
from hf_layers import CASES, in_turnout, make_block, make_layer
from packaging.version import Version
from torch import Tensor, nn

# 5.7's router counts places along an axis of length 1 and so drops nothing; the pinned 5.24 counts them by sequence.
SWITCH_DROPS = Version(transformers.__version__) >= Version("5.24")
families = pytest.mark.parametrize("family", FAMILIES)
whole_layers = pytest.mark.parametrize("family", [f for f in FAMILIES if SWITCH_DROPS or f != "switch_transformers"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def routed_by(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights [tokens, top_k] that the block gives to its experts; -1 where Switch drops."""
    given: list[Tensor] = []
    hook = block.experts.register_forward_pre_hook(lambda _, arguments: given.extend(arguments[1:3]))
    with torch.no_grad():
        block(x)
    hook.remove()
    ids, weights = given
    if ids.dim() == 3:  # Switch: one-hot [tokens, 1, experts]
        ids = ids.argmax(-1).masked_fill(ids.sum(-1) == 0, -1)
    return ids, weights


def without_ties(family: str, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens] whose logits all differ; Switch chooses by probabilities rounded to the model's type. torch.topk promises
    no order of equal ones."""
    if family == "switch_transformers":
        logits = logits.softmax(-1).to(dtype)
    order = logits.sort(-1).values
    return (order.diff(dim=-1) != 0).all(-1)


def compare_routing(family: str, layer: turnout.MoE, block: nn.Module, x: Tensor) -> None:
    made = layer(x)
    ids, weights = routed_by(block, x)
    rows = without_ties(family, layer.gate(x.view(-1, HIDDEN).to(layer.gate.weight.dtype)), x.dtype)
    assert rows.float().mean() > 0.9
    mine, mine_order = made.routing.topk_ids[rows].sort(-1)
    theirs, their_order = ids[rows].sort(-1)  # DeepSeek's choices have no order
    assert torch.equal(mine, theirs)
    a = made.routing.topk_weights[rows].gather(-1, mine_order).double()
    e = weights[rows].gather(-1, their_order).double().masked_fill(theirs < 0, 0)
    assert bool(((a - e).abs() <= 8 * torch.finfo(weights.dtype).eps * e.abs()).all())


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Output, gradient of x, gradients of the parameters of a random linear function of the output."""
    x = x.clone().requires_grad_()
    made = module(x)
    y = made.output if isinstance(made, turnout.MoEOutput) else made[0] if isinstance(made, tuple) else made
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y * weights.to(y.dtype)).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


def compare(family: str, block: nn.Module, layer: turnout.MoE, x: Tensor) -> None:
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(block).to(wide)
    y, dx, grads = run(layer, x)
    eager_y, eager_dx, eager_grads = run(block, x)
    true_y, true_dx, true_grads = run(exact, x.to(wide))
    assert_as_exact("output", y, eager_y, true_y)
    assert_as_exact("gradient of x", dx, eager_dx, true_dx)
    eager_grads, true_grads = (in_turnout(family, block, grads) for grads in (eager_grads, true_grads))
    # The gradients of gates are sums that cancel, in tiny layers nearly all of them.
    largest = max(float(gradient.norm()) for gradient in true_grads.values())
    for name, gradient in grads.items():
        scale = largest if name.startswith(("gate.", "shared_gate.")) else 0.0
        assert_as_exact(f"gradient of {name}", gradient, eager_grads[name].to(gradient.dtype), true_grads[name], scale)


def inputs(dtype: torch.dtype, batch: int = 4, tokens: int = 16) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN).to(dtype)


@dtypes
@whole_layers
def test_layer(family, dtype) -> None:
    block, config = make_block(family, dtype)
    layer, x = make_layer(family, block, config, dtype), inputs(dtype)
    compare_routing(family, layer, block, x)
    # Outputs and gradients: tokens that all three runs send to the same experts.
    wide = copy.deepcopy(block).to(torch.float64 if dtype == torch.float32 else torch.float32)
    chosen = [ids.sort(-1).values for ids in (
        layer(x).routing.topk_ids, routed_by(block, x)[0], routed_by(wide, x.to(next(wide.parameters()).dtype))[0]
    )]  # fmt: skip
    agree = ((chosen[0] == chosen[1]) & (chosen[0] == chosen[2])).all(-1)
    if family == "switch_transformers":  # places depend on the whole sequence
        agree = agree.view(4, 16).all(-1, keepdim=True).expand(4, 16).flatten()
    kept = x.view(-1, HIDDEN)[agree]
    assert len(kept) >= (64 if dtype == torch.float32 else 32)
    compare(family, block, layer, kept.view(-1, 16 if family == "switch_transformers" else 1, HIDDEN))


@families
def test_one_token_leaves_most_experts_empty(family) -> None:
    block, config = make_block(family, torch.float32)
    layer, x = make_layer(family, block, config, torch.float32), inputs(torch.float32, 1, 1)
    compare_routing(family, layer, block, x)
    compare(family, block, layer, x)


def test_negative_selection_biases() -> None:
    block, config = make_block("deepseek_v3", torch.float32)
    block.gate.e_score_correction_bias.uniform_(-2, -1)
    layer, x = make_layer("deepseek_v3", block, config, torch.float32), inputs(torch.float32)
    compare_routing("deepseek_v3", layer, block, x)
    compare("deepseek_v3", block, layer, x)


@pytest.mark.parametrize("capacity", [1, 2, 100] if SWITCH_DROPS else [100])
def test_switch_capacity(capacity) -> None:
    block, config = make_block("switch_transformers", torch.float32)
    block.router.expert_capacity = config.expert_capacity = capacity
    layer, x = make_layer("switch_transformers", block, config, torch.float32), inputs(torch.float32)
    made = layer(x)
    assert (int(made.dropped) == 0) == (capacity == 100)
    compare_routing("switch_transformers", layer, block, x)
    compare("switch_transformers", block, layer, x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_balancing_loss(family, masked) -> None:
    block, config = make_block(family, torch.float32)
    layer, x = make_layer(family, block, config, torch.float32), inputs(torch.float32)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    if masked:
        mask[1, :5], mask[3, :15] = False, False
    theirs = import_module(f"transformers.models.{family}.modeling_{family}").load_balancing_loss_func
    gate = block.get_submodule(CASES[family].gate)
    logits = nn.functional.linear(x.view(-1, HIDDEN), gate.weight, getattr(gate, "bias", None))
    expected = theirs((logits,), EXPERTS, TOP_K, mask.long() if masked else None)
    made = layer(x, mask if masked else None)
    assert not made.output[~mask].any() or family == "qwen2_moe"  # whose shared expert runs on padding too
    assert int(made.plan.tokens_per_expert.sum()) == TOP_K * int(mask.sum())
    eps = torch.finfo(torch.float32).eps
    assert abs(float(made.aux_loss.detach()) - float(expected.detach())) <= 8 * eps * float(expected.detach())
    made.aux_loss.backward()
    expected.backward()
    scale = float(gate.weight.grad.abs().max())
    assert float((layer.gate.weight.grad - gate.weight.grad).abs().max()) <= 64 * eps * scale


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_loss_of_a_model_pools_its_layers(masked) -> None:
    model = make_model("mixtral")
    given = make_inputs("mixtral", 4, 6, padded=masked)
    result = model(**given, output_router_logits=True)
    mask = given["attention_mask"].bool().flatten()
    sums = []
    for logits in result.router_logits:
        routing = turnout.route(logits, TOP_K, **turnout.router_preset("mixtral"), token_mask=mask)
        sums.append(turnout.balance_sums(routing.scores, routing.topk_ids, "per_token", token_mask=mask))
    loss = turnout.balance_loss_of_sums(sum(sums))
    assert abs(float(loss) - float(result.aux_loss)) <= 8 * torch.finfo(torch.float32).eps * float(result.aux_loss)


def test_losses_of_switch() -> None:
    module = import_module("transformers.models.switch_transformers.modeling_switch_transformers")
    block, _ = make_block("switch_transformers", torch.float32)
    x = inputs(torch.float32)
    logits = block.router.classifier(x)
    probabilities = logits.softmax(-1)
    expected = module.load_balancing_loss_func(probabilities, probabilities.argmax(-1)), module.router_z_loss_func(logits)
    flat = logits.view(-1, EXPERTS)
    routing = turnout.route(flat, 1, **turnout.router_preset("switch"))
    mine = turnout.balance_loss(routing.scores, routing.topk_ids, "first_choice", 16), turnout.z_loss(flat)
    for a, e in zip(mine, expected, strict=True):
        assert abs(float(a.detach()) - float(e.detach())) <= 16 * torch.finfo(torch.float32).eps * float(e.detach())
