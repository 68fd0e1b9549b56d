"""The layers as modules: state, copies, autocast, torch.compile, torch.export, activation checkpointing, LoRA."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import turnout
from naive import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

HIDDEN, FFN, EXPERTS = 8, 12, 4
TERMS = HIDDEN + FFN + 64
SURE = {"policy_train": "all", "policy_eval": "all"}  # nothing at random


def moe(**options) -> turnout.MoE:
    return turnout.MoE(HIDDEN, FFN, EXPERTS, activation="swiglu", shared_ffn=6, shared_gated=True, z_coefficient=1e-3,
                       **options)  # fmt: skip


class Masked(nn.Module):
    """Every third token is padding."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> turnout.MoEOutput:
        return self.layer(x, (torch.arange(x.shape[1]) % 3 != 0).expand(x.shape[:-1]))


LAYERS = {
    "MoE": moe,
    "MoE with capacity": lambda: moe(capacity=turnout.CapacityOptions(factor=1.0)),
    "MoE with a mask": lambda: Masked(moe()),
    "MoE with a selection bias": lambda: moe(router={"score": "sigmoid", "scale": 2.5}, selection_bias=True),
    "MoE by expert choice": lambda: moe(selection="expert_choice"),
    "MoE by Sinkhorn": lambda: moe(selection="sinkhorn"),
    "MoE of modules": lambda: turnout.MoE(
        HIDDEN, FFN, EXPERTS, experts=[turnout.nn.Perceptron(HIDDEN, FFN) for _ in range(EXPERTS)]
    ),
    "HierarchicalMoE": lambda: turnout.HierarchicalMoE(HIDDEN, FFN, (2, 2), gating=SURE),
}
layers = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def inputs() -> torch.Tensor:
    return torch.randn(2, 8, HIDDEN)


def step(layer: nn.Module, call, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, loss and the gradients of x and all parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    made = call(x)
    (made.output.float().square().sum() + made.aux_loss).backward()
    return [made.output.detach(), made.aux_loss.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, TERMS)


@layers
def test_state_copies_and_pickles(name) -> None:
    layer, other, x = LAYERS[name](), LAYERS[name](), inputs()
    expected = step(layer, layer, x)
    assert not torch.equal(other(x).output, expected[0])
    other.load_state_dict(layer.state_dict(), strict=True)
    for made in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for a, e in zip(step(made, made, x), expected, strict=True):
            assert torch.equal(a, e)
    assert repr(layer).startswith(type(layer).__name__)


@pytest.mark.parametrize("name", ["MoE", "HierarchicalMoE"])
def test_parameters_can_be_made_on_the_meta_device(name) -> None:
    how = {"device": "meta", "dtype": torch.bfloat16}
    made = (turnout.MoE(HIDDEN, FFN, EXPERTS, **how) if name == "MoE"
            else turnout.HierarchicalMoE(HIDDEN, FFN, (2, 2), **how))  # fmt: skip
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in made.parameters())
    assert made(inputs().to(**how)).output.is_meta
    made.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert made(inputs().bfloat16()).output.isfinite().all()


def test_draws_are_those_of_linear_layers() -> None:
    bank = turnout.nn.FeedForwardBank(100, 400, 3)
    for tensor, fan_in in ((bank.up, 100), (bank.up_bias, 100), (bank.down, 400), (bank.down_bias, 400)):
        bound = fan_in**-0.5
        assert float(tensor.detach().abs().max()) <= bound
        assert abs(float(tensor.detach().std()) - bound / 3**0.5) < 0.1 * bound


@layers
def test_autocast_is_the_layer_in_the_lower_type(name) -> None:
    """All but the gate of MoE, which stays in the type of its weights."""
    layer, x = LAYERS[name](), inputs()
    lower = copy.deepcopy(layer).bfloat16()
    for mine, theirs in zip(lower.modules(), layer.modules(), strict=True):
        if isinstance(mine, turnout.MoE):
            mine.gate = copy.deepcopy(theirs.gate)
    with torch.autocast("cpu", torch.bfloat16):
        made = layer(x.bfloat16())
    expected = lower(x.bfloat16())
    assert made.output.dtype == torch.bfloat16
    assert torch.equal(made.output, expected.output)
    assert made.aux_loss.dtype == torch.float32
    assert torch.equal(made.aux_loss, expected.aux_loss)
    (made.output.float().square().sum() + made.aux_loss).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_the_gate_keeps_its_type() -> None:
    layer, x = turnout.MoE(HIDDEN, FFN, EXPERTS), inputs()
    expected = layer(x).routing.scores
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x).routing.scores, expected)
    layer.bfloat16().gate.float()
    seen = []
    layer.gate.register_forward_hook(lambda *_: seen.append(_[-1].dtype))
    assert layer(x.bfloat16()).output.dtype == torch.bfloat16
    assert seen == [torch.float32]


@layers
def test_compiles_whole_in_training_and_inference(name) -> None:
    layer, x = LAYERS[name](), inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(step(layer, compiled, x), step(layer, layer, x))
    layer.eval()
    with torch.no_grad():
        same([compiled(x).output], [layer(x).output])


def test_compiles_by_inductor() -> None:
    layer, x = moe(), inputs()
    compiled = torch.compile(layer, fullgraph=True)
    same(step(layer, compiled, x), step(layer, layer, x))


def test_one_graph_for_any_number_of_tokens() -> None:
    layer = moe()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = 0
    for tokens in (12, 5, 64):
        x = torch.randn(tokens, HIDDEN)
        same(step(layer, compiled, x), step(layer, layer, x))
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once


def test_exports_for_any_number_of_tokens() -> None:
    layer = moe().eval()
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (torch.randn(7, HIDDEN),), dynamic_shapes={"x": {0: tokens}})
    for count in (2, 7, 40):
        x = torch.randn(count, HIDDEN)
        made = program.module()(x)
        assert_close(made.output, layer(x).output, TERMS)
        assert torch.equal(made.routing.topk_ids, layer(x).routing.topk_ids)


@pytest.mark.parametrize("name", ["MoE with capacity", "MoE by expert choice", "HierarchicalMoE"])
def test_other_sizes_break_no_graph_with_capacity(name) -> None:
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (8, 16):
        x = torch.randn(2, tokens, HIDDEN)
        same(step(layer, compiled, x), step(layer, layer, x))


@pytest.mark.parametrize("name", ["MoE with capacity", "HierarchicalMoE"])
def test_exports_with_places(name) -> None:
    layer, x = LAYERS[name]().eval(), inputs()
    made = torch.export.export(layer, (x,)).module()(x)
    assert_close(made.output, layer(x).output, TERMS)


@layers
def test_activation_checkpointing(name) -> None:
    layer, x = LAYERS[name](), inputs()
    expected = step(layer, layer, x)
    for a, e in zip(step(layer, lambda t: checkpoint(layer, t, use_reentrant=False), x), expected, strict=True):
        assert torch.equal(a, e)


def test_lora_on_the_bank() -> None:
    """PEFT reaches a bank by the names of its parameters."""
    import peft  # here: it takes seconds, and is used here alone

    layer, x = moe(), inputs()
    expected = layer(x).output.detach()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up", "experts.down"])
    adapted = peft.get_peft_model(layer, config)
    assert torch.equal(adapted(x).output.detach(), expected)  # B starts at 0

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5)
    for _ in range(2):  # A's gradient is 0 while B is
        optimizer.zero_grad()
        (adapted(x).output - 1).square().mean().backward()
        trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
        assert len(trained) == 4
        assert all("lora_" in name for name in trained)
        optimizer.step()
    changed = adapted(x).output.detach()
    assert not torch.allclose(changed, expected)

    merged = adapted.merge_and_unload()
    assert type(merged.experts) is turnout.nn.FeedForwardBank
    assert_close(merged(x).output.detach(), changed, TERMS)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in {"experts.up", "experts.down"})
