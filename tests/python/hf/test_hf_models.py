"""turnout.hf around a model: saving, loading, packing, copies, compilation, and every refusal in words."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers
import turnout.hf
from hf_families import EXPERTS, FAMILIES, HIDDEN, forward, make_inputs, make_model, on_turnout
from torch import nn
from transformers.integrations.moe import use_experts_implementation
from turnout.hf._version import check_transformers
from turnout.hf.models import experts_of

families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("family", ["qwen3_moe", "switch_transformers"])
TERMS = 64


def logits(model, inputs):
    return forward(model, inputs).logits


def close(a, b) -> bool:
    """Up to rounding: float32 sums of fewer than 64 terms through 3 layers, relative to the largest logit."""
    return float((a - b).abs().max()) <= 3 * TERMS * torch.finfo(a.dtype).eps * float(b.abs().max())


def reload(model, folder, **how):
    return type(model).from_pretrained(folder, **how).eval()


@families
def test_what_is_saved_is_what_eager_saves(family, tmp_path: Path) -> None:
    eager = make_model(family)
    mine = on_turnout(eager)
    eager.save_pretrained(tmp_path / "eager")
    mine.save_pretrained(tmp_path / "turnout")
    for path in (tmp_path / "eager").iterdir():
        assert (tmp_path / "turnout" / path.name).read_bytes() == path.read_bytes()

    inputs = make_inputs(family, 2, 5)
    if family == "switch_transformers":
        loaded = turnout.hf.patch(reload(mine, tmp_path / "turnout"))
    else:
        loaded = reload(mine, tmp_path / "turnout", experts_implementation="turnout")
    assert torch.equal(logits(loaded, inputs), logits(mine, inputs))


@families
def test_packed_and_unpacked_and_unpatched(family) -> None:
    eager = make_model(family)
    inputs = make_inputs(family, 2, 5)
    expected = logits(eager, inputs)
    model = turnout.hf.patch(copy.deepcopy(eager))
    plain = logits(model, inputs)
    packed = turnout.hf.prepack(model)
    assert packed is model
    assert close(logits(model, inputs), plain)
    assert close(plain, expected)

    with pytest.raises(RuntimeError, match="experts is packed, and what was packed would go on running; call turnout.hf"):
        model.load_state_dict(eager.state_dict())
    for _, module in experts_of(model):  # proof of what runs: the packed weights are a snapshot
        for parameter in module.parameters():
            parameter.data.zero_()
    assert close(logits(model, inputs), expected)
    turnout.hf.unpack(model)
    assert not close(logits(model, inputs), expected)

    model.load_state_dict(eager.state_dict())
    assert close(logits(model, inputs), expected)
    turnout.hf.unpatch(model)
    assert torch.equal(logits(model, inputs), expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in eager.modules()]


@families
def test_freed_weights(family, tmp_path: Path) -> None:
    eager = make_model(family)
    inputs = make_inputs(family, 2, 5)
    model = turnout.hf.prepack(copy.deepcopy(eager), free_weights=True)
    assert [name for name, _ in model.named_parameters() if ".experts." in name] == []
    assert close(logits(model, inputs), logits(eager, inputs))
    turnout.hf.prepack(model, free_weights=True)
    assert close(logits(copy.deepcopy(model), inputs), logits(eager, inputs))

    with pytest.raises(RuntimeError, match=r"experts has no weights to save, prepack\(free_weights=True\) freed them"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="experts takes no weights"):
        model.load_state_dict(eager.state_dict())
    for undo in (turnout.hf.unpack, turnout.hf.unpatch):
        with pytest.raises(RuntimeError, match="experts were freed by prepack"):
            undo(model)
    if family != "switch_transformers":
        model.set_experts_implementation("eager")
        with pytest.raises(RuntimeError, match="implementation is 'eager', but only 'turnout' can run"):
            logits(model, inputs)


@kinds
def test_packed_weights_are_not_trained(family) -> None:
    model = turnout.hf.prepack(make_model(family))
    with pytest.raises(RuntimeError, match="weights are packed for inference; call .*no_grad.* or turnout.hf.unpack"):
        model(**make_inputs(family, 1, 3))
    turnout.hf.unpack(model)(**make_inputs(family, 1, 3)).logits.sum().backward()


@kinds
def test_copies_and_pickles(family) -> None:
    inputs = make_inputs(family, 2, 5)
    for model in (turnout.hf.patch(make_model(family)), turnout.hf.prepack(make_model(family))):
        expected = logits(model, inputs)
        assert torch.equal(logits(copy.deepcopy(model), inputs), expected)
        assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), expected)


@kinds
def test_generates_the_same_packed_and_without_a_cache(family) -> None:
    model = on_turnout(make_model(family))
    inputs = make_inputs(family, 3, 4, padded=True)
    inputs.pop("decoder_input_ids", None)

    def tokens(**how):
        return model.generate(**inputs, max_new_tokens=8, do_sample=False, **how).tolist()

    expected = tokens()
    assert tokens(use_cache=False) == expected
    turnout.hf.prepack(model)
    assert tokens() == expected


@kinds
def test_gradient_checkpointing(family) -> None:
    model = on_turnout(make_model(family)).train()
    inputs = make_inputs(family, 2, 5)

    def gradients():
        model.zero_grad()
        model(**inputs, use_cache=False).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, expected[name])


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    model = on_turnout(make_model("qwen3_moe"))
    inputs = make_inputs("qwen3_moe", 2, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(**inputs, use_cache=False).logits
    assert close(y.detach(), logits(model, inputs))
    y.sum().backward()
    turnout.hf.prepack(model)
    with torch.no_grad():
        assert close(torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).logits, y.detach())


def test_patch_twice_and_unpatch_restore_what_was_set() -> None:
    model = make_model("mixtral")
    for _ in range(2):
        turnout.hf.patch(model)
        assert model.config._experts_implementation == "turnout"
    assert turnout.hf.unpatch(model).config._experts_implementation == "eager"
    model.set_experts_implementation("turnout")
    assert turnout.hf.unpatch(model).config._experts_implementation != "turnout"


def test_experts_of_other_ranks_add_nothing() -> None:
    """Expert parallelism gives them ids from num_experts on."""
    _, module = next(experts_of(on_turnout(make_model("mixtral"))))
    x, weights = torch.randn(3, HIDDEN), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [2, EXPERTS], [EXPERTS, EXPERTS]])
    module._is_expert_parallel = True
    y = module(x, ids, weights)
    assert torch.equal(y[2], torch.zeros(HIDDEN))
    assert close(y[1].detach(), module(x[1:2], ids[1:2, :1], weights[1:2, :1])[0].detach())


def test_switch_applies_the_dropout_of_its_experts() -> None:
    _, module = next(experts_of(turnout.hf.patch(make_model("switch_transformers"))))
    x, chosen = torch.randn(4, HIDDEN), torch.eye(EXPERTS, dtype=torch.int64)[[0, 3, 3, 1]].unsqueeze(1)
    plain = module(x, chosen, torch.ones(4, 1))
    for expert in module.values():
        expert.dropout.p = 1.0
    assert torch.equal(module(x, chosen, torch.ones(4, 1)), plain)
    assert not module.train()(x, chosen, torch.ones(4, 1)).any()
    with pytest.raises(TypeError, match="expected both matrices of one type, .* no dropout"):
        turnout.hf.prepack(module)


def test_switch_with_a_float32_second_matrix() -> None:
    eager = make_model("switch_transformers", torch.bfloat16)
    _, module = next(experts_of(eager))
    for expert in module.values():
        expert.wo.float()
    x, chosen = torch.randn(4, HIDDEN, dtype=torch.bfloat16), torch.eye(EXPERTS, dtype=torch.int64)[[0, 3, 3, 1]]
    arguments = (x, chosen.unsqueeze(1), torch.ones(4, 1, dtype=torch.bfloat16))
    expected = module(*arguments)
    turnout.hf.patch(module)
    assert torch.equal(module(*arguments), expected)


def config_of(**changes):
    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=4, num_local_experts=2, **changes)
    config._experts_implementation = "turnout"
    return config


def run_experts(module: nn.Module):
    return module(torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


def mixtral_experts(**changes):
    return transformers.models.mixtral.modeling_mixtral.MixtralExperts(config_of(**changes))


def quantised(dtype):
    module = mixtral_experts()
    module.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 8).to(dtype), requires_grad=False)
    return module


class OwnGate(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 2, nn.SiLU()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 8, 8)), nn.Parameter(torch.ones(2, 8, 4))

    def _apply_gate(self, gate_up):
        return gate_up.chunk(2, -1)[0]


def with_flags(**flags):
    base = type("Base", (OwnGate,), {"forward": lambda self, *_: None})
    return use_experts_implementation(base, **flags)(config_of())


def with_post_expert_norm():
    module = mixtral_experts()
    module.has_post_expert_norm = True  # a flag of the decorator in newer transformers
    return module


REFUSALS = [
    (lambda: mixtral_experts(hidden_act="tanh"), ValueError, "MixtralExperts has the activation Tanh in its gate, expected SiLU"),
    (lambda: mixtral_experts(hidden_act="gelu_pytorch_tanh"), ValueError, "activation GELUTanh in its gate"),
    (lambda: quantised(torch.uint8), TypeError, "gate_up_proj is torch.uint8, .* Turnout reads no quantised weights"),
    (lambda: quantised(torch.float8_e4m3fn), TypeError, "gate_up_proj is torch.float8_e4m3fn, expected float32"),
    (lambda: with_flags(), TypeError, r"has a gate of its own, OwnGate._apply_gate"),
    (lambda: with_flags(has_gate=False), TypeError, "Base.up_proj is a NoneType, expected a tensor"),
    (lambda: with_post_expert_norm(), TypeError, "normalises the output of each expert"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSALS)
def test_experts_that_turnout_does_not_compute(make, error, message) -> None:
    module = make()
    with pytest.raises(error, match=message):
        run_experts(module)
    for call in (turnout.hf.patch, turnout.hf.prepack):  # before anything is changed
        with pytest.raises(error, match=message):
            call(nn.Sequential(module))


def test_exact_gelu_in_the_gate_is_geglu() -> None:
    module = mixtral_experts(hidden_act="gelu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    arguments = (torch.randn(3, 8), torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    mine = module(*arguments).detach()
    module.config._experts_implementation = "eager"
    assert close(mine, module(*arguments).detach())


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no experts that Turnout knows"):
        turnout.hf.patch(nn.Linear(2, 2))


def test_what_is_no_whole_model_is_refused() -> None:
    for call in (turnout.hf.patch, turnout.hf.unpatch, turnout.hf.prepack, turnout.hf.unpack):
        with pytest.raises(TypeError, match="turnout.hf: model is a str, expected a torch.nn.Module"):
            call("mixtral")
    with pytest.raises(TypeError, match="MixtralSparseMoeBlock has no set_experts_implementation; expected a model"):
        turnout.hf.patch(make_model("mixtral").model.layers[0].mlp)


def test_quantised_models_are_refused() -> None:
    model = make_model("mixtral")
    model.is_quantized = True
    with pytest.raises(TypeError, match="MixtralForCausalLM is quantised, and Turnout reads no quantised weights"):
        turnout.hf.patch(model)
    assert model.config._experts_implementation == "eager"


def test_fp8_experts_are_refused() -> None:
    """transformers gives them an interface of their own, in which the name is known too."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    module = use_experts_implementation(fp8.FP8Experts, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS)(config_of())
    with pytest.raises(TypeError, match="FP8Experts.gate_up_proj is torch.float8_e4m3fn, expected float32"):
        run_experts(module)


@pytest.mark.parametrize("installed", ["4.57.6", "5.6.2", None])
def test_transformers_that_does_not_fit_is_refused(installed, monkeypatch) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    words = "is not installed" if installed is None else f"is {installed}, which takes no experts of others"
    with pytest.raises(ImportError, match=f"turnout.hf: transformers {words}.*pip install 'transformers>=5.7'"):
        check_transformers()


def test_turnout_alone_does_not_import_transformers() -> None:
    code = "import sys, turnout; assert 'transformers' not in sys.modules"
    python = Path(turnout.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(python)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
