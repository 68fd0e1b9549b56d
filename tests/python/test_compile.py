"""torch.compile without a graph break, with a dynamic number of tokens, and torch.export."""

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import turnout
from naive import assert_close, bank
from torch import nn

from turnout import compat

HIDDEN, FFN, EXPERTS = 8, 16, 4
TERMS = HIDDEN + FFN + 64


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Block(nn.Module):
    """Gate, route, experts, loss: what a layer calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        w = bank(EXPERTS, HIDDEN, FFN, "swiglu", torch.float32, bias=False)
        self.up, self.down = nn.Parameter(w["up"]), nn.Parameter(w["down"])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = turnout.route(self.gate(x), 2)
        y = turnout.fused_experts(x, routing.topk_ids, routing.topk_weights, self.up, self.down)
        return y, turnout.balance_loss(routing.scores, routing.topk_ids) + turnout.z_loss(self.gate(x))


def step(block, call, x):
    y, loss = call(x)
    (y.square().sum() + loss).backward()
    grads = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    return [y.detach(), loss.detach(), *grads]


def same(block, compiled, x) -> None:
    for a, e in zip(step(block, compiled, x), step(block, block, x), strict=True):
        assert_close(a, e, TERMS)


def test_inductor_forward_and_backward() -> None:
    block = Block()
    same(block, torch.compile(block, fullgraph=True), torch.randn(32, HIDDEN))


def test_one_graph_for_any_number_of_tokens() -> None:
    block = Block()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    same(block, compiled, torch.randn(12, HIDDEN))
    compiled_once = counter.frame_count
    for tokens in (5, 64):
        same(block, compiled, torch.randn(tokens, HIDDEN))
    assert counter.frame_count == compiled_once


def test_lists_of_experts_and_packed_weights() -> None:
    w = bank(EXPERTS, HIDDEN, FFN, "gelu", torch.float32, bias=False)
    ups, downs = list(w["up"].unbind()), list(w["down"].unbind())
    packed = turnout.prepack(ups, downs, "gelu")
    x, ids, weights = torch.randn(6, HIDDEN), torch.randint(0, EXPERTS, (6, 2)), torch.rand(6, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, ids, weights, ups, downs):
        plain = turnout.fused_experts(x, ids, weights, ups, downs, "gelu")
        return plain, turnout.fused_experts(x, ids, weights, packed)

    expected = turnout.fused_experts(x, ids, weights, ups, downs, "gelu")
    plain, of_packed = both(x, ids, weights, ups, downs)
    assert torch.equal(plain, expected)
    assert torch.equal(of_packed, turnout.fused_experts(x, ids, weights, packed))
    assert_close(of_packed, expected, TERMS)


def test_capacity_and_slots_compile() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def call(logits, x):
        routing = turnout.route_top2(logits, "all")
        ids, weights = routing.topk_ids.view(-1, 2), routing.topk_weights.view(-1, 2)
        capped = turnout.limit_capacity(ids, weights, EXPERTS, 3, logits.shape[1])
        slots = turnout.slot_plan(capped.topk_ids, EXPERTS, 3, logits.shape[1])
        return turnout.combine(turnout.dispatch(x, slots), capped.topk_weights, slots)

    for groups, tokens in ((2, 8), (3, 6)):
        logits, x = torch.randn(groups, tokens, EXPERTS), torch.randn(groups * tokens, HIDDEN)
        y = call(logits, x)
        torch._dynamo.config.disable = True
        try:
            assert_close(y, call(logits, x), terms=8)
        finally:
            torch._dynamo.config.disable = False


LAYERS = {
    "MoeLayer": lambda: compat.MoeLayer(
        [torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS)], torch.nn.Linear(HIDDEN, EXPERTS), 2
    ),
    "SimpleMoELayer": lambda: compat.SimpleMoELayer(HIDDEN, EXPERTS, 2),
    "MoELayer": lambda: compat.MoELayer(HIDDEN, EXPERTS, 2, alpha=0.5),
    "MixtureOfExperts": lambda: compat.MixtureOfExperts(HIDDEN, compat.MoEConfig(EXPERTS, 2)),
    "MoE": lambda: compat.MoE(HIDDEN, EXPERTS, second_policy_train="all"),
    "HeirarchicalMoE": lambda: compat.HeirarchicalMoE(HIDDEN, (2, 2), second_policy_train="all"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compile_whole(name) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 8, HIDDEN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def once(call):
        result = call(x)
        y = result[0] if isinstance(result, tuple) else result
        y.square().sum().backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        return [y.detach(), *grads]

    for a, e in zip(once(compiled), once(layer), strict=True):
        assert_close(a, e, TERMS)


@pytest.mark.parametrize("name", ["MixtureOfExperts", "MoE", "HeirarchicalMoE"])
def test_other_sizes_break_no_graph_with_capacity(name) -> None:
    """The places are a number that depends on the tokens: a graph is made anew for another size."""
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (8, 16):
        x = torch.randn(2, tokens, HIDDEN)
        made, expected = compiled(x), layer(x)
        first = (lambda y: y[0] if isinstance(y, tuple) else y)
        assert_close(first(made), first(expected), TERMS)


def test_export_with_a_dynamic_number_of_tokens() -> None:
    block = Block()
    tokens = torch.export.Dim("tokens", min=1)
    program = torch.export.export(block, (torch.randn(7, HIDDEN),), dynamic_shapes={"x": {0: tokens}})
    for count in (1, 7, 40):
        x = torch.randn(count, HIDDEN)
        for a, e in zip(program.module()(x), block(x), strict=True):
            assert_close(a, e, TERMS)


class PackedBlock(nn.Module):
    """A layer for inference that holds packed experts."""

    def __init__(self, activation="swiglu") -> None:
        super().__init__()
        w = bank(EXPERTS, HIDDEN, FFN, activation, torch.float32)
        self.packed = turnout.prepack(**w, activation=activation)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return turnout.fused_experts(x, ids, weights, self.packed)


def test_packed_experts_compile_whole() -> None:
    block = PackedBlock()
    x, ids, weights = torch.randn(6, HIDDEN), torch.randint(-1, EXPERTS, (6, 2)), torch.rand(6, 2)
    assert torch.equal(torch.compile(block, fullgraph=True)(x, ids, weights), block(x, ids, weights))


def test_packed_experts_export_for_any_number_of_tokens() -> None:
    block = PackedBlock()
    tokens = torch.export.Dim("tokens", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens})

    def inputs(n):
        return torch.randn(n, HIDDEN), torch.randint(-1, EXPERTS, (n, 2)), torch.rand(n, 2)

    program = torch.export.export(block, inputs(6), dynamic_shapes=shapes)
    for n in (2, 33):
        given = inputs(n)
        assert torch.equal(program.module()(*given), block(*given))
