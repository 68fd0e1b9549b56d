"""Decoding of MXFP4 and of float8 blocks against transformers' own code and against formulas, to the bit."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import turnout

TYPES = (torch.bfloat16, torch.float32)
types = pytest.mark.parametrize("dtype", TYPES)


def mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randint(0, 256, (*shape, 16), dtype=torch.uint8),
            torch.randint(0, 255, shape, dtype=torch.uint8))  # fmt: skip


@types
def test_mxfp4_is_what_transformers_decodes(dtype) -> None:
    blocks, scales = mxfp4(3, 70, 5)
    scales[0, 0] = torch.tensor([0, 1, 126, 127, 254])
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    finite = (scales < 253).repeat_interleave(32, -1)  # there 2^(scale − 127) · 6 is a number
    y = turnout.decode_mxfp4(blocks, scales, dtype)
    assert y.dtype == dtype and y.shape == (3, 70, 160)
    assert torch.equal(y[finite], expected[finite])
    assert torch.equal(turnout.decode_mxfp4(blocks, scales.view(torch.float8_e8m0fnu), dtype), y)


@types
def test_mxfp4_by_hand(dtype) -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8)
    expected = torch.cat([values, -values] * 2).to(dtype)
    for scale, factor in ((127, 1.0), (128, 2.0), (120, 2.0**-7), (0, 2.0**-127)):
        y = turnout.decode_mxfp4(blocks, torch.tensor([scale], dtype=torch.uint8), dtype)
        assert torch.equal(y, (expected.double() * factor).to(dtype))
        assert torch.equal(y.signbit(), expected.signbit())
    nan = turnout.decode_mxfp4(blocks, torch.tensor([255], dtype=torch.uint8), dtype)
    assert nan.isnan().all()
    top = turnout.decode_mxfp4(blocks, torch.tensor([254], dtype=torch.uint8), dtype)
    assert torch.equal(top[:4].double(), values[:4].double() * 2.0**127) and top[4:8].isinf().all()


@types
@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_blocks_are_what_transformers_decodes(dtype, float8) -> None:
    weight = torch.randn(3, 256, 384).to(float8)
    scale = torch.rand(3, 2, 3) + 0.5
    expected = torch.stack([
        Fp8Dequantize._dequantize_one(None, w, s, output_dtype=dtype) for w, s in zip(weight, scale, strict=True)
    ])  # fmt: skip
    assert torch.equal(turnout.decode_fp8_blocks(weight, scale, dtype=dtype), expected)


@types
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_with_ragged_edges(dtype, scale_dtype) -> None:
    for shape, block in (((130, 257), (128, 128)), ((2, 5, 7), (2, 3)), ((1, 1), (128, 128)), ((4, 4), (1, 2**62))):
        weight = (torch.randn(shape) * 8).to(torch.float8_e4m3fn)
        grid = [-(-shape[-2] // block[0]), -(-shape[-1] // block[1])]
        scale = (torch.rand(*shape[:-2], *grid) + 0.1).to(scale_dtype)
        rows, columns = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
        factors = scale.float()[..., rows[:, None], columns[None]]
        y = turnout.decode_fp8_blocks(weight, scale, block, dtype)
        assert torch.equal(y, (weight.float() * factors).to(dtype))


def test_every_float8_decodes_to_itself() -> None:
    for float8 in (torch.float8_e4m3fn, torch.float8_e5m2):
        weight = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(float8).view(16, 16)
        y = turnout.decode_fp8_blocks(weight, torch.ones(1, 1), dtype=torch.float32)
        assert torch.equal(y.nan_to_num(7e7), weight.float().nan_to_num(7e7))


def test_empty_and_strided() -> None:
    assert turnout.decode_mxfp4(*mxfp4(0, 4)).shape == (0, 128)
    assert turnout.decode_mxfp4(*mxfp4(3, 0)).shape == (3, 0)
    empty = torch.zeros(2, 0, 3).to(torch.float8_e5m2)
    assert turnout.decode_fp8_blocks(empty, torch.zeros(2, 0, 1)).shape == (2, 0, 3)
    blocks, scales = mxfp4(4, 6)
    assert torch.equal(
        turnout.decode_mxfp4(blocks.transpose(0, 1), scales.t()),
        turnout.decode_mxfp4(blocks.transpose(0, 1).contiguous(), scales.t().contiguous()),
    )
    weight, scale = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.rand(3, 2)
    assert torch.equal(
        turnout.decode_fp8_blocks(weight.t(), scale.t(), (2, 2)), turnout.decode_fp8_blocks(weight, scale, (2, 2)).t()
    )


def test_what_does_not_fit_is_named() -> None:
    blocks, scales = mxfp4(2, 3)
    weight = torch.zeros(5, 4).to(torch.float8_e4m3fn)
    for call, error, words in (
        (lambda: turnout.decode_mxfp4(blocks.int(), scales), TypeError, "blocks is Int, expected uint8"),
        (lambda: turnout.decode_mxfp4(blocks, scales.int()), TypeError, "scales is Int, expected uint8 or"),
        (lambda: turnout.decode_mxfp4(blocks[..., :8], scales), ValueError, r"expected \[..., groups, 16\]"),
        (lambda: turnout.decode_mxfp4(blocks[0, 0], scales), ValueError, r"blocks has shape \[16\]"),
        (lambda: turnout.decode_mxfp4(blocks, scales[:1]), ValueError, r"scales has shape \[1, 3\], expected \[2, 3\]"),
        (lambda: turnout.decode_mxfp4(blocks, scales, torch.float16), TypeError, "to decode to is Half"),
        (lambda: turnout.decode_fp8_blocks(weight.float(), scales), TypeError, "weight is Float, expected float8"),
        (lambda: turnout.decode_fp8_blocks(weight, torch.ones(1, 1).int()), TypeError, "scale_inv is Int"),
        (lambda: turnout.decode_fp8_blocks(weight, torch.ones(2, 1)), ValueError, r"has shape \[2, 1\], expected \[1, 1\]"),
        (lambda: turnout.decode_fp8_blocks(weight[0], torch.ones(1, 1)), ValueError, r"weight has shape \[4\]"),
        (lambda: turnout.decode_fp8_blocks(weight, torch.ones(1, 1), (0, 4)), ValueError, r"block is \[0, 4\]"),
        (lambda: turnout.decode_fp8_blocks(weight, torch.ones(1, 1), dtype=torch.int8), TypeError, "decode to is Char"),
    ):
        with pytest.raises(error, match=words):
            call()


@types
def test_the_path_of_other_devices_gives_the_same_bits(dtype) -> None:
    """The kernel registered for any device, which the CPU's own passes over."""
    blocks, scales = mxfp4(3, 4, 5)
    scales[0, 0, :3] = torch.tensor([0, 254, 255])
    weight, scale = torch.randn(2, 7, 5).to(torch.float8_e5m2), torch.rand(2, 4, 2)
    any_device = torch._C.DispatchKey.CompositeExplicitAutograd
    for op, given in (("decode_mxfp4", (blocks, scales)), ("decode_fp8_blocks", (weight, scale, [2, 3]))):
        op = getattr(torch.ops.turnout, op).default
        y, other = op(*given, dtype=dtype), op._op_dk(any_device, *given, dtype=dtype)
        assert torch.equal(y.nan_to_num(7.0), other.nan_to_num(7.0))
