"""MoE layers of published models: out of their checkpoints into turnout.MoE, and back under published names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks as check
from .nn import CapacityOptions, MoE

_ops = torch.ops.turnout

KeyLayout = Literal["per_expert", "fused"]


@dataclass(frozen=True)
class PretrainedMoE:
    """What config.json says of a model's MoE layers."""

    family: str
    """model_type: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss or switch_transformers"""
    layers: list[int]
    """those that hold experts; of Switch the encoder's, then the decoder's, counted on"""
    options: dict[str, Any]
    """arguments of turnout.MoE for each of them; coefficients of losses are 0"""


def pretrained_moe(folder: str | os.PathLike[str]) -> PretrainedMoE:
    """Reads FOLDER/config.json. Raises RuntimeError naming the file, the field, what it holds and what was expected."""
    description = json.loads(_ops.pretrained_moe(os.fspath(folder)))
    options = description["options"]
    options["capacity"] = CapacityOptions(**options["capacity"])
    shared = options.pop("shared")
    options |= {"shared_ffn": shared["ffn"], "shared_gated": shared["gated"]}
    return PretrainedMoE(description["family"], description["layers"], options)


def load_moe_layer(folder: str | os.PathLike[str], layer: int, dtype: torch.dtype | None = None) -> MoE:
    """Loads one MoE layer of a published model, ready to run.

    folder: with config.json and model.safetensors or an index of shards; either layout of keys; MXFP4 and float8 blocks
      are decoded. Banks that lie in the file as MoE holds them are mapped, not read
    layer: one of pretrained_moe(folder).layers
    dtype: of the parameters; by default that of the file, bfloat16 where it is decoded

    Raises RuntimeError whose message lists every tensor that is missing, unused or of a wrong shape or type; ValueError
    for a layer without experts.
    """
    with check.types_of("turnout.load_moe_layer"):
        names, tensors = _ops.load_moe_layer(os.fspath(folder), layer, dtype)
    moe = MoE(**pretrained_moe(folder).options, device="meta")
    moe.load_state_dict(dict(zip(names, tensors, strict=True)), assign=True)
    return moe


def published_tensors(
    moe: MoE, folder: str | os.PathLike[str], layer: int, layout: KeyLayout
) -> dict[str, Tensor]:
    """The tensors of a layer under the names that files of its family have for them, detached.

    folder: its config.json says which model it is. Raises ValueError for a layer without experts, a layout that the
    family does not have, or a module that is no layer of it.
    """
    check.module("turnout.published_tensors", moe=moe)
    state = {name: tensor.detach() for name, tensor in moe.state_dict().items()}
    made = _ops.published_tensors(os.fspath(folder), layer, layout, list(state), list(state.values()))
    return dict(zip(*made, strict=True))


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], layout: KeyLayout) -> None:
    """Writes a whole checkpoint anew with its experts in another layout; all other tensors stay as they are.

    target: a folder without a checkpoint, made where it does not exist
    What is quantised is decoded to bfloat16. Written are config.json, a shard for each MoE layer, one for all the rest,
    and the index; other files are not copied. Memory: that of one layer. Raises RuntimeError or ValueError.
    """
    _ops.convert_checkpoint(os.fspath(source), os.fspath(target), layout)
