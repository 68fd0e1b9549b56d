"""The usage and verification code of the five documents, as it stands there, with only the import changed."""

import torch

LLMBOOK = """
from turnout.compat import MoeLayer

import torch
from torch import nn

hidden_dim = 512
num_experts = 8
top_k = 2

# Create expert networks and gate
experts = [nn.Linear(hidden_dim, hidden_dim) for _ in range(num_experts)]
gate = nn.Linear(hidden_dim, num_experts)

# Instantiate MoE layer
moe = MoeLayer(experts=experts, gate=gate, num_experts_per_tok=top_k)

# Forward pass
inputs = torch.randn(32, hidden_dim)  # 32 tokens
outputs = moe(inputs)
# outputs.shape == (32, 512)
"""

COURSE = """
import torch
import torch.nn as nn
from turnout.compat import SimpleMoELayer
# --- Verification ---
batch_size = 4
seq_len = 16
embedding_dim = 32
num_experts = 8
top_k = 2
moe_layer = SimpleMoELayer(embedding_dim, num_experts, top_k)
x = torch.randn(batch_size, seq_len, embedding_dim)
output = moe_layer(x)
# 1. Check output shape
assert output.shape == (batch_size, seq_len, embedding_dim)
# 2. Check for gradients
# Ensure that gradients flow to both the gating network and the experts.
output.sum().backward()
assert moe_layer.gating_network.weight.grad is not None
for expert in moe_layer.experts:
    assert expert.weight.grad is not None
print("Verification passed!")
"""

FEED_FORWARD_BLOCK = """
import torch
from turnout.compat import MoELayer

# Example: input tensor [batch_size, seq_len, hidden_dim]
x = torch.randn(32, 128, 512)

# Create MoE layer with 4 experts and top-2 routing
moe = MoELayer(hidden_dim=512, num_experts=4, top_k=2)

# Forward pass
output, aux_loss = moe(x)
"""


def run(code: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(code, "document", "exec"), names)
    return names


def test_seed_000() -> None:
    names = run(LLMBOOK)
    assert names["outputs"].shape == (32, 512)


def test_seed_001() -> None:
    """The document has no code left; these are its statements, one by one."""
    from turnout.compat import MixtureOfExperts, MoEConfig, TopKRouter

    config = MoEConfig(num_experts=8, top_k=2)
    x = torch.randn(2, 5, 16)
    router = TopKRouter(16, config)
    assert (router.dim, router.config, router.gate.bias) == (16, config, None)
    assert router.gate.weight.shape == (8, 16)
    scores, indices = router(x)
    assert scores.shape == indices.shape == (2, 5, 2)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 5))
    assert int(indices.min()) >= 0 and int(indices.max()) < 8

    layer = MixtureOfExperts(16, config)
    assert (layer.dim, layer.config) == (16, config)
    assert isinstance(layer.router, TopKRouter) and len(layer.experts) == 8
    first, act, second = layer.experts[0]
    assert first.weight.shape == (64, 16) and second.weight.shape == (16, 64)
    assert isinstance(act, torch.nn.GELU) and act.approximate == "none"
    assert layer(x).shape == (2, 5, 16)


def test_seed_002(capsys) -> None:
    run(COURSE)
    assert capsys.readouterr().out == "Verification passed!\n"


def test_seed_003() -> None:
    names = run(FEED_FORWARD_BLOCK)
    assert names["output"].shape == (32, 128, 512)
    assert names["aux_loss"].shape == ()


def test_seed_004() -> None:
    """The experiments that the document proposes at its end: b=2, n=8, d=16, num_experts=4."""
    from turnout.compat import Experts, HeirarchicalMoE, HierarchicalMoE, MoE, Top2Gating

    x = torch.randn(2, 8, 16)
    sent = {}
    for policy in ("all", "none", "threshold", "random"):
        torch.manual_seed(0)
        gate = Top2Gating(16, num_gates=4, second_policy_train=policy)
        dispatch, combine, loss = gate(x)
        # int(8 · 1.25 / 4) = 2 places, but 4 at least
        assert dispatch.shape == combine.shape == (2, 8, 4, 4)
        assert loss.shape == ()
        assert torch.equal(dispatch, combine.bool().to(combine))
        sent[policy] = int(dispatch.sum())
    assert sent["none"] <= sent["random"] <= sent["all"]
    assert sent["none"] <= sent["threshold"] <= sent["all"]

    for factor, places in ((1.25, 4), (4.0, 8), (100.0, 8)):  # at most the group
        assert Top2Gating(16, 4, capacity_factor_train=factor)(x)[0].shape[-1] == places

    output, loss = MoE(16, num_experts=4)(x)
    assert output.shape == x.shape and loss.shape == ()
    assert HierarchicalMoE is HeirarchicalMoE
    output, loss = HeirarchicalMoE(16)(x)
    assert output.shape == x.shape and loss.shape == ()
    bank = Experts(16, num_experts=(4, 4))
    assert bank.w1.shape == (4, 4, 16, 64) and bank.w2.shape == (4, 4, 64, 16)
    assert bank(torch.randn(4, 4, 3, 16)).shape == (4, 4, 3, 16)
