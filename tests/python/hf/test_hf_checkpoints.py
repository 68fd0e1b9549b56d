"""Layers loaded from what save_pretrained writes compute what the model's own blocks compute, family by family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import turnout
from hf_families import CONFIGS, EXPERTS, HIDDEN, TOP_K, make_model
from hf_layers import SWITCH_DROPS, routed_by
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

families = pytest.mark.parametrize("family", CONFIGS)
layouts = pytest.mark.parametrize("layout", ["per_expert", "fused"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def save(model: Any, folder: Path, layout: str) -> None:
    model.save_pretrained(folder, save_original_format=layout == "per_expert")


def block_of(model: Any, layer: int) -> nn.Module:
    """The MoE block of a layer; of Switch, decoder layers are counted on from the encoder's."""
    if hasattr(model, "encoder"):
        count = len(model.encoder.block)
        side, at = (model.encoder, 1) if layer < count else (model.decoder, 2)
        return side.block[layer % count].layer[at].mlp
    return model.model.layers[layer].mlp


def run(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = block(x)
    return y[0] if isinstance(y, tuple) else y


def chosen(block: nn.Module, x: Tensor) -> Tensor:
    """The experts of each token in ascending order; -1 where Switch has no place."""
    return routed_by(block, x)[0].sort(-1).values


def assert_computes_what(block: nn.Module, moe: turnout.MoE, x: Tensor) -> None:
    """As near to float64 as transformers' own code is, on tokens whose experts rounding does not decide."""
    wide = block.double()
    truth, ids = run(wide, x.double()), chosen(wide, x.double())
    out = moe(x)
    got, mine = out.output.detach(), out.routing.topk_ids.reshape(-1, out.routing.topk_ids.shape[-1])
    same = ((mine.sort(-1).values == ids) | (mine == -1)).all(-1).reshape(x.shape[:-1])
    assert same.float().mean() >= 0.8
    eps = torch.finfo(x.dtype).eps
    error = (got.double() - truth)[same].abs().max()
    # h, each expert's output and their sum are rounded to the type; sums of up to 32 terms in float32 add less
    assert error <= 8 * eps * truth.abs().max() + 64 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("family", [name for name in CONFIGS if SWITCH_DROPS or name != "switch_transformers"])
@layouts
@dtypes
def test_every_layer_computes_what_transformers_does(family, layout, dtype, tmp_path: Path) -> None:
    model = make_model(family, dtype)
    save(model, tmp_path, layout)
    description = turnout.pretrained_moe(tmp_path)
    assert description.family == family and description.layers
    for layer in description.layers:
        moe = turnout.load_moe_layer(tmp_path, layer)
        assert moe.experts.up.dtype == dtype and moe.num_experts == EXPERTS
        x = torch.randn(2, 7, HIDDEN).to(dtype)
        block = block_of(model, layer)
        expected = run(block, x)
        same = chosen(block, x) == moe(x).routing.topk_ids.reshape(14, -1).sort(-1).values
        assert_computes_what(block, moe, x)
        assert same.all(-1).float().mean() >= 0.8 or family == "switch_transformers"
        assert expected.shape == x.shape


@families
@layouts
def test_what_is_written_back_is_what_transformers_wrote(family, layout, tmp_path: Path) -> None:
    model = make_model(family)
    save(model, tmp_path, layout)
    has_layout = {"gpt_oss": "fused", "switch_transformers": "per_expert"}.get(family, layout)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in turnout.pretrained_moe(tmp_path).layers:
        moe = turnout.load_moe_layer(tmp_path, layer)
        tensors = turnout.published_tensors(moe, tmp_path, layer, has_layout)
        root = next(iter(tensors)).split(".experts.")[0]
        assert set(tensors) == {name for name in stored if name.startswith(root + ".")}
        for name, tensor in tensors.items():
            assert torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in ("gpt_oss", "switch_transformers")])
def test_converted_checkpoints_are_those_that_transformers_writes(family, tmp_path: Path) -> None:
    model = make_model(family, torch.bfloat16)
    for layout in ("per_expert", "fused"):
        save(model, tmp_path / layout, layout)
    for source, target in (("per_expert", "fused"), ("fused", "per_expert")):
        there = tmp_path / f"to_{target}"
        turnout.convert_checkpoint(tmp_path / source, there, target)
        expected, got = load_file(tmp_path / target / "model.safetensors"), {}
        for shard in there.glob("*.safetensors"):
            got |= load_file(shard)
        assert set(got) == set(expected)
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
        _, report = type(model).from_pretrained(there, output_loading_info=True)
        assert not any(report.values()), report


def test_shards_are_read_and_converted_as_one_file_is(tmp_path: Path) -> None:
    model = make_model("qwen2_moe")
    save(model, tmp_path / "whole", "per_expert")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole = turnout.load_moe_layer(tmp_path / "whole", 1)
    assert_same(turnout.load_moe_layer(tmp_path / "shards", 1), whole)
    turnout.convert_checkpoint(tmp_path / "shards", tmp_path / "fused", "fused")
    assert_same(turnout.load_moe_layer(tmp_path / "fused", 1), whole)
    (tmp_path / "fused" / "model-00003-of-00003.safetensors").unlink()  # what is outside of the layers
    assert_same(turnout.load_moe_layer(tmp_path / "fused", 1), whole)


def test_loaded_layers_train_and_are_saved_again(tmp_path: Path) -> None:
    save(make_model("olmoe"), tmp_path, "fused")
    before = (tmp_path / "model.safetensors").read_bytes()
    moe = turnout.load_moe_layer(tmp_path, 0)
    x = torch.randn(9, HIDDEN)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    moe(x).output.square().sum().backward()
    optimizer.step()  # into mapped pages
    assert (tmp_path / "model.safetensors").read_bytes() == before
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= turnout.published_tensors(moe, tmp_path, 0, "fused")
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(turnout.load_moe_layer(tmp_path, 0), moe)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def quantise_fp8(folder: Path, root: str) -> None:
    """The float8 files of DeepSeek-V3: matrices of experts in blocks of 16 × 16, here."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if root in n and n.endswith("_proj.weight")]:
        matrix = tensors[name].float()
        rows, columns = (-(-size // 16) for size in matrix.shape)
        scale = torch.rand(rows, columns) * 0.01 + 0.001
        grid = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[: matrix.shape[0], : matrix.shape[1]]
        tensors[name] = (matrix / grid).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})


def assert_same(one: turnout.MoE, other: turnout.MoE) -> None:
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name


def test_float8_files_are_decoded(tmp_path: Path) -> None:
    model = make_model("deepseek_v3", torch.bfloat16)
    save(model, tmp_path, "per_expert")
    quantise_fp8(tmp_path, ".mlp.")
    stored = load_file(tmp_path / "model.safetensors")
    moe = turnout.load_moe_layer(tmp_path, 2)
    assert moe.experts.up.dtype == torch.bfloat16

    def decoded(name: str) -> Tensor:
        name = f"model.layers.2.mlp.{name}_proj.weight"
        return turnout.decode_fp8_blocks(stored[name], stored[name + "_scale_inv"], (16, 16))

    in_float32 = turnout.load_moe_layer(tmp_path, 2, torch.float32)
    assert torch.equal(in_float32.shared.down.to(torch.bfloat16), decoded("shared_experts.down"))
    assert not torch.equal(in_float32.shared.down, decoded("shared_experts.down").float())  # not rounded on the way

    for e in range(EXPERTS):
        up = torch.cat([decoded(f"experts.{e}.gate"), decoded(f"experts.{e}.up")])
        assert torch.equal(moe.experts.up[e], up)
        assert torch.equal(moe.experts.down[e], decoded(f"experts.{e}.down"))
    assert torch.equal(moe.shared.down, decoded("shared_experts.down"))

    turnout.convert_checkpoint(tmp_path, tmp_path / "plain", "fused")
    assert_same(turnout.load_moe_layer(tmp_path / "plain", 2), moe)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_mxfp4_files_are_decoded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers.integrations.mxfp4")
    model = make_model("gpt_oss", torch.bfloat16)
    save(model, tmp_path, "fused")
    change_config(tmp_path, intermediate_size=64, quantization_config={"quant_method": "mxfp4"})
    tensors, root = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.experts."
    packed = {}
    for name, rows, columns in (("gate_up_proj", 128, HIDDEN), ("down_proj", HIDDEN, 64)):
        del tensors[root + name]
        packed[name] = (torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8),
                        torch.randint(110, 128, (EXPERTS, rows, columns // 32), dtype=torch.uint8))  # fmt: skip
        tensors[f"{root}{name}_blocks"], tensors[f"{root}{name}_scales"] = packed[name]
    tensors[root + "gate_up_proj_bias"] = torch.randn(EXPERTS, 128).to(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    moe = turnout.load_moe_layer(tmp_path, 1)
    up = transformers.convert_moe_packed_tensors(*packed["gate_up_proj"])  # [experts, hidden, 2 · ffn], in turn
    down = transformers.convert_moe_packed_tensors(*packed["down_proj"])
    assert torch.equal(moe.experts.up, torch.cat([up[..., ::2], up[..., 1::2]], -1).transpose(1, 2))
    assert torch.equal(moe.experts.down, down.transpose(1, 2))
    bias = tensors[root + "gate_up_proj_bias"]
    assert torch.equal(moe.experts.up_bias, torch.cat([bias[:, ::2], bias[:, 1::2]], -1))
    assert moe(torch.randn(3, HIDDEN).to(torch.bfloat16)).routing.topk_ids.shape == (3, TOP_K)
    tensors = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})  # what is left of layer 0 has another width
    with pytest.raises(RuntimeError, match="holds no tensor whose name starts with 'model.layers.0.mlp.'"):
        turnout.convert_checkpoint(tmp_path, tmp_path / "plain", "fused")


def test_errors_arrive_in_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="config.json: cannot read"):
        turnout.load_moe_layer(tmp_path, 0)
    save(make_model("qwen3_moe"), tmp_path, "fused")
    with pytest.raises(ValueError, match="layer 9 of this qwen3_moe holds no experts, expected one of 0, 1"):
        turnout.load_moe_layer(tmp_path, 9)
    with pytest.raises(TypeError, match="load_moe_layer: expected a value of type 'int' for argument 'layer'"):
        turnout.load_moe_layer(tmp_path, "0")
    with pytest.raises(TypeError, match="published_tensors: moe is a dict, expected a torch.nn.Module"):
        turnout.published_tensors({}, tmp_path, 0, "fused")
    with pytest.raises(ValueError, match="layout of keys is 'new', expected one of per_expert, fused"):
        turnout.convert_checkpoint(tmp_path, tmp_path / "x", "new")
    with pytest.raises(ValueError, match="expected another folder than from"):
        turnout.convert_checkpoint(tmp_path, tmp_path, "fused")
    turnout.convert_checkpoint(tmp_path, tmp_path / "x", "per_expert")
    with pytest.raises(RuntimeError, match="x: holds a checkpoint already"):
        turnout.convert_checkpoint(tmp_path, tmp_path / "x", "fused")
