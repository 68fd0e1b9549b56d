"""gate_logits and the gate of MoE against torch's linear map; the same bits at any number of threads."""

import pytest
import torch
import torch.nn.functional as F
import turnout
from naive import assert_close
from torch.autograd import gradcheck, gradgradcheck
from turnout.nn.gate import Gate

SIZES = [(1, 1, 1), (5, 7, 3), (130, 40, 8), (300, 96, 65)]


def given(tokens, hidden, experts, dtype):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return leaf(tokens, hidden), leaf(experts, hidden), leaf(experts)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_linear_map_forward_and_backward(dtype, size) -> None:
    leaves = given(*size, dtype)
    probe = torch.randn(size[0], size[2], dtype=dtype)
    expected, actual = F.linear(*leaves), turnout.gate_logits(*leaves)
    assert_close(actual, expected, size[1])
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    for a, e in zip(torch.autograd.grad((actual * probe).sum(), leaves), wanted, strict=True):
        assert_close(a, e, size[0] + size[2])


def test_bfloat16_rounds_the_exact_sums_once() -> None:
    x, weight, bias = given(64, 48, 8, torch.bfloat16)
    y = turnout.gate_logits(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    sizes = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())  # Σ|a||b|: 49 roundings to float32
    assert y.dtype == torch.bfloat16 and bool(((y.double() - exact).abs() <= exact.abs() / 256 + sizes * 49 / 2**24).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_number_of_threads(dtype) -> None:
    leaves = given(700, 130, 65, dtype)

    def once():
        y = turnout.gate_logits(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    first, threads = once(), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True)), count
    finally:
        torch.set_num_threads(threads)


def test_gradients_and_second_derivatives() -> None:
    assert gradcheck(turnout.gate_logits, given(4, 3, 2, torch.float64))
    assert gradgradcheck(turnout.gate_logits, given(4, 3, 2, torch.float64))
    x, weight, bias = given(4, 3, 2, torch.float32)
    (grad,) = torch.autograd.grad(turnout.gate_logits(x, weight, bias).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    assert second.abs().sum() > 0


def test_no_tokens_strides_and_autocast() -> None:
    x, weight, bias = given(6, 5, 4, torch.float32)
    empty = turnout.gate_logits(x[:0], weight, bias)
    empty.sum().backward()
    assert empty.shape == (0, 4) and not weight.grad.any() and not bias.grad.any()
    turned = x.detach().t().contiguous().t()
    assert torch.equal(turnout.gate_logits(turned, weight, bias), turnout.gate_logits(x, weight, bias))
    turnout.gate_logits(x, weight).sum().backward()  # the gradient of a sum is one number, expanded
    assert_close(x.grad, weight.detach().sum(0).expand(6, 5), 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = turnout.gate_logits(x, weight, bias)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, turnout.gate_logits(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_nan_token_harms_only_itself() -> None:
    x, weight, _ = given(20, 9, 4, torch.float32)
    broken = x.detach().clone()
    broken[3] = float("nan")
    y, clean = turnout.gate_logits(broken, weight), turnout.gate_logits(x, weight)
    others = [t for t in range(20) if t != 3]
    assert y[3].isnan().all() and torch.equal(y[others], clean[others])


def test_the_gate_of_moe_is_a_linear_module() -> None:
    gate = turnout.MoE(6, 5, 3).gate
    assert type(gate) is Gate and isinstance(gate, torch.nn.Linear) and set(gate.state_dict()) == {"weight"}
    x = torch.randn(2, 4, 6)
    assert_close(gate(x), F.linear(x, gate.weight), 6)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), gate(x))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w, b: turnout.gate_logits(x[0], w, b), ValueError, r"x has shape \[5\], expected \[tokens, hidden\]"),
        (lambda x, w, b: turnout.gate_logits(x, w[:, 1:], b), ValueError, r"weight has shape \[4, 4\], expected size 5"),
        (lambda x, w, b: turnout.gate_logits(x, w, b[1:]), ValueError, r"bias has shape \[3\], expected size 4"),
        (lambda x, w, b: turnout.gate_logits(x, w.double(), b), TypeError, "weight is Double, expected Float as x is"),
    ],
)
def test_errors_name_the_argument(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call(*given(6, 5, 4, torch.float32))
