"""One layer in two languages: parameters move between C++ and Python through a file, and give the same bits."""

import pathlib
import subprocess

import pytest
import torch
import turnout
from safetensors.torch import load_file, save_file

PROGRAM = pathlib.Path(__file__).resolve().parents[2] / "build" / "bin" / "interchange"

MOE = {
    "plain": {"activation": "gelu", "bias": True},
    "gated, with a gate bias": {"activation": "swiglu", "bias": False, "gate_bias": True},
    "shared": {"activation": "swiglu", "bias": False, "shared_ffn": 7, "shared_gated": True, "top_k": 1,
               "router": "switch"},
    "selection bias": {"activation": "silu", "bias": False, "num_experts": 16, "router": "deepseek_v3", "selection_bias": True},
    "experts that pick": {"activation": "gelu", "bias": True, "selection": "expert_choice", "capacity": 5},
    "Sinkhorn": {"activation": "gelu", "bias": False, "selection": "sinkhorn"},
    "shared without a gate, capacity": {"activation": "relu", "bias": True, "shared_ffn": 3, "capacity": 2,
                                        "router": "gpt_oss"},
}  # fmt: skip


def in_cpp(folder: pathlib.Path, kind: str, options: dict[str, object], tensors: dict[str, torch.Tensor]):
    words = {name: str(int(value) if isinstance(value, bool) else value) for name, value in options.items()}
    save_file(tensors, folder / "in.safetensors", metadata={"kind": kind, **words})
    result = subprocess.run(
        [PROGRAM, folder / "in.safetensors", folder / "out.safetensors"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    made = load_file(folder / "out.safetensors")
    state = {name.removeprefix("layer."): made.pop(name) for name in list(made) if name.startswith("layer.")}
    return made, state


def state_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}


def agree(layer, folder, kind, options, x) -> None:
    made, state = in_cpp(folder, kind, options, {"x": x, **state_of(layer)})
    with torch.no_grad():
        mine = layer(x)
    assert torch.equal(mine.output, made["output"])
    assert torch.equal(mine.aux_loss, made["aux_loss"])
    assert state.keys() == layer.state_dict().keys()

    drawn, state = in_cpp(folder, kind, options, {"x": x})  # what C++ draws, taken over by name
    layer.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(layer(x).output, drawn["output"])
    assert not torch.equal(drawn["output"], made["output"])


@pytest.mark.parametrize("case", MOE)
def test_moe(case, tmp_path) -> None:
    options = {"hidden": 6, "ffn": 5, "num_experts": 4, "top_k": 2, "router": "mixtral", **MOE[case]}
    python = dict(options)
    if "selection" in python:
        del python["router"]
    capacity = turnout.CapacityOptions(fixed=python.pop("capacity", 0))
    layer = turnout.MoE(**python, capacity=capacity, z_coefficient=1e-3)
    if layer.selection_bias is not None:
        layer.selection_bias.normal_()
    agree(layer, tmp_path, "MoE", options, torch.randn(3, 4, 6))


def test_hierarchical_moe(tmp_path) -> None:
    layer = turnout.HierarchicalMoE(6, 5, (2, 3), gating={"policy_train": "all"})
    options = {"hidden": 6, "ffn": 5, "outer": 2, "inner": 3}
    agree(layer, tmp_path, "HierarchicalMoE", options, torch.randn(2, 12, 6))


@pytest.mark.parametrize("kind", ["MoE", "HierarchicalMoE"])
def test_one_seed_draws_the_same_parameters(kind, tmp_path) -> None:
    if kind == "MoE":
        options = {"hidden": 6, "ffn": 5, "num_experts": 4, "top_k": 2, "router": "mixtral",
                   "activation": "swiglu", "bias": True, "gate_bias": True, "shared_ffn": 7, "shared_gated": True}  # fmt: skip
    else:
        options = {"hidden": 6, "ffn": 5, "outer": 2, "inner": 3}
    _, state = in_cpp(tmp_path, kind, options, {"x": torch.randn(2, 8, 6)})
    torch.manual_seed(0)
    layer = turnout.MoE(**options) if kind == "MoE" else turnout.HierarchicalMoE(6, 5, (2, 3))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_state_that_does_not_fit_is_one_error(tmp_path) -> None:
    options = {"hidden": 6, "ffn": 5, "num_experts": 4, "top_k": 2, "router": "mixtral", **MOE["plain"]}
    state = state_of(turnout.MoE(6, 4, 4))
    state["layer.other"] = state.pop("layer.gate.weight")
    with pytest.raises(AssertionError, match="'gate.weight' is missing.*'other' is unused"):
        in_cpp(tmp_path, "MoE", options, {"x": torch.randn(2, 6), **state})
