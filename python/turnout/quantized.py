"""Quantised weights as published checkpoints store them, decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ops = torch.ops.turnout


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decodes MXFP4 (GPT-OSS): numbers of 4 bits, of which 32 share one power of two.

    blocks: [..., groups, 16] uint8, the low nibble of a byte first; scales: [..., groups] uint8 or float8_e8m0fnu
    dtype: bfloat16 or float32; every value is exact in both, beyond their range infinite; a scale of 255 gives NaN

    Returns [..., groups · 32]. Gradient: none. Raises ValueError or TypeError that names the argument.
    Source: OCP Microscaling Formats 1.0.
    """
    return _ops.decode_mxfp4(blocks, scales, dtype=dtype)


def decode_fp8_blocks(
    weight: Tensor, scale_inv: Tensor, block: Sequence[int] = (128, 128), dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Decodes float8 weights with one scale a block (DeepSeek-V3, `weight_scale_inv`).

    weight: [..., rows, columns] float8_e4m3fn or float8_e5m2
    scale_inv: [..., ⌈rows / block[0]⌉, ⌈columns / block[1]⌉] float32, bfloat16 or float8_e8m0fnu
    dtype: bfloat16 or float32; the product is taken in float32 and rounded once

    Gradient: none. Raises ValueError or TypeError that names the argument.
    """
    return _ops.decode_fp8_blocks(weight, scale_inv, block, dtype=dtype)
