"""fused_experts, feed_forward and prepack against the loop over tokens; layouts, types, empty cases, NaN, repeats."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import turnout
from naive import ACTIVATIONS, activate, assert_close, bank, mixture, of_bank, perceptron

TOKENS, TOP_K, EXPERTS, HIDDEN, FFN = 24, 3, 5, 8, 12
TERMS = HIDDEN + FFN + TOP_K


def routing(tokens=TOKENS, top_k=TOP_K, experts=EXPERTS, dtype=torch.float64):
    """Distinct experts a token, one expert without tokens, some choices not sent."""
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k].contiguous()
    if experts > 1:
        ids[ids == 1] = -1
    return ids, torch.rand(tokens, top_k, dtype=dtype)


def run(x, ids, weights, w, activation, **more):
    biases = {name: w[name] for name in ("up_bias", "down_bias")}
    return turnout.fused_experts(x, ids, weights, w["up"], w["down"], activation, **biases, **more)


def as_lists(w):
    return {name: None if tensor is None else list(tensor.unbind()) for name, tensor in w.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_loop(dtype, activation, bias) -> None:
    w = bank(EXPERTS, HIDDEN, FFN, activation, dtype, bias)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    ids, weights = routing(dtype=dtype)
    expected = mixture(x, ids, weights, of_bank(w, activation))
    y = run(x, ids, weights, w, activation)
    assert_close(y, expected, TERMS)
    assert torch.equal(run(x, ids.int(), weights, w, activation), y)
    assert torch.equal(run(x, ids, weights, as_lists(w), activation), y)
    assert torch.equal(run(x, ids, weights, w, activation, recompute=True), y)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, activation) -> None:
    """Against the loop in float64 on the same rounded numbers; the rounding is that of the low type."""
    w = bank(EXPERTS, HIDDEN, FFN, activation, dtype)
    x = torch.randn(TOKENS, HIDDEN).to(dtype)
    ids, weights = routing(dtype=torch.float32)
    wide = {name: t.double() for name, t in w.items()}
    expected = mixture(x.double(), ids, weights.double(), of_bank(wide, activation))
    y = run(x, ids, weights, w, activation)
    assert y.dtype == dtype
    # four roundings to the low type a row (pre-activation, activation, row, sum), each of a value near the result
    assert float((y.double() - expected).abs().amax()) <= 8 * torch.finfo(dtype).eps * float(expected.abs().amax())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clamped_swiglu_is_that_of_gpt_oss(dtype, recompute) -> None:
    """Against transformers' own experts, weights interleaved and transposed as theirs, with values beyond the clamps."""
    module = gpt_oss_experts().to(dtype)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    ids = torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K].contiguous()
    weights = torch.rand(TOKENS, TOP_K, dtype=dtype, requires_grad=True)
    expected = module(x, ids, weights)
    leaves = [x, weights, *module.parameters()]
    up = torch.cat([module.gate_up_proj[..., i::2].transpose(1, 2) for i in (0, 1)], 1)
    up_bias = torch.cat([module.gate_up_proj_bias[..., i::2] for i in (0, 1)], 1)
    w = {"up": up, "down": module.down_proj.transpose(1, 2), "up_bias": up_bias, "down_bias": module.down_proj_bias}
    assert float(F.linear(x, up[0], up_bias[0]).detach().abs().amax()) > 14
    y = run(x, ids, weights, w, "swiglu_clamped", recompute=recompute)
    assert_close(y, expected, TERMS)
    probe = torch.randn_like(x)
    wanted = gradients((expected * probe).sum(), leaves)
    for a, e in zip(gradients((y * probe).sum(), leaves), wanted, strict=True):
        assert_close(a, e, TERMS + TOKENS * TOP_K)


def gpt_oss_experts() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = transformers.GptOssConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS)
    module = transformers.GptOssExperts(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=4 if parameter is module.gate_up_proj else 1)
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_before_down(dtype, activation, bias) -> None:
    """Megatron's order, as it stands there: act(…) times its weight in the low type, the bias of down times it too."""
    w = bank(EXPERTS, HIDDEN, FFN, activation, dtype, bias)
    x = torch.randn(TOKENS, HIDDEN).to(dtype)
    ids, weights = routing(dtype=torch.float32)
    wide = {name: None if t is None else t.double() for name, t in w.items()}
    expected = []
    for t in range(TOKENS):
        y = torch.zeros(HIDDEN, dtype=torch.float64)
        for k, e in enumerate(ids[t].tolist()):
            if e < 0:
                continue
            up_bias, down_bias = (None if wide[name] is None else wide[name][e] for name in ("up_bias", "down_bias"))
            h = activate(F.linear(x[t].double(), wide["up"][e], up_bias), activation)
            h = (h * weights[t, k]).to(dtype).double()
            y = y + F.linear(h, wide["down"][e]) + (0 if down_bias is None else down_bias * weights[t, k])
        expected.append(y)
    expected = torch.stack(expected)
    y = run(x, ids, weights, w, activation, weight_before_down=True)
    packed = turnout.prepack(w["up"], w["down"], activation, up_bias=w["up_bias"], down_bias=w["down_bias"])
    for actual in (y, turnout.fused_experts(x, ids, weights, packed, weight_before_down=True)):
        # the sums' rounding, and in bfloat16 that of the output and of a tie of act(…) gone the other way
        assert float((actual.double() - expected).abs().amax()) <= (
            (4 * TERMS if dtype != torch.bfloat16 else 2) * torch.finfo(dtype).eps * float(expected.abs().amax())
        )


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("layout", ["bank", "list"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_those_of_the_loop(dtype, recompute, layout) -> None:
    w = {name: t.requires_grad_() for name, t in bank(EXPERTS, HIDDEN, FFN, "swiglu", dtype).items()}
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    ids, weights = routing(dtype=dtype)
    weights.requires_grad_()
    leaves = [x, weights, *w.values()]
    probe = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    expected = gradients((mixture(x, ids, weights, of_bank(w, "swiglu")) * probe).sum(), leaves)
    given = w if layout == "bank" else as_lists(w)
    actual = gradients((run(x, ids, weights, given, "swiglu", recompute=recompute) * probe).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, TERMS + TOKENS * TOP_K)
    assert not actual[2][1].any() and not actual[4][1].any()  # the expert without tokens: zeros
    assert not actual[1][ids < 0].any()


def test_experts_as_modules_keep_their_gradients() -> None:
    """A list of parameters: each gets its own .grad, also the one whose expert saw nothing."""
    ups = [torch.nn.Parameter(torch.randn(FFN, HIDDEN)) for _ in range(3)]
    downs = [torch.nn.Parameter(torch.randn(HIDDEN, FFN)) for _ in range(3)]
    ids = torch.tensor([[0], [2], [0], [-1]])
    y = turnout.fused_experts(torch.randn(4, HIDDEN), ids, torch.ones(4, 1), ups, downs, "relu")
    y.sum().backward()
    assert all(p.grad is not None for p in ups + downs)
    assert not ups[1].grad.any() and ups[0].grad.any() and ups[2].grad.any()


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (1, 4, 4), (6, 1, 1), (5, 5, 5), (3, 2, 64)]
)
def test_sizes_at_the_edge(tokens, top_k, experts) -> None:
    w = {name: t.requires_grad_() for name, t in bank(experts, HIDDEN, FFN, "gelu").items()}
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    ids, weights = routing(tokens, top_k, experts)
    y = run(x, ids, weights, w, "gelu")
    assert_close(y, mixture(x, ids, weights, of_bank(w, "gelu")), TERMS)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (x, *w.values()))


def test_all_to_one_and_nothing_sent() -> None:
    w = bank(EXPERTS, HIDDEN, FFN, "silu")
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    ones = torch.ones(TOKENS, 1, dtype=torch.float64)
    all_to_one = run(x, torch.full((TOKENS, 1), 3), ones, w, "silu")
    assert_close(all_to_one, of_bank(w, "silu")[3](x), TERMS)
    nothing = run(x, torch.full((TOKENS, 1), -1), ones, w, "silu")
    assert not nothing.any()


def test_nan_token_harms_only_itself() -> None:
    w = {name: t.requires_grad_() for name, t in bank(EXPERTS, HIDDEN, FFN, "swiglu").items()}
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    ids, weights = routing()
    ids[0] = -1  # the row that index -1 could be mistaken for
    broken = x.clone()
    broken[[0, 5]] = float("nan")
    others = [t for t in range(TOKENS) if t != 5]
    clean, harmed = run(x, ids, weights, w, "swiglu"), run(broken, ids, weights, w, "swiglu")
    assert torch.equal(clean[others], harmed[others]) and harmed[5].isnan().any()


def test_strides() -> None:
    w = bank(EXPERTS, HIDDEN, FFN, "geglu")
    turned = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in w.items()}
    assert not turned["up"].is_contiguous()
    x = torch.randn(HIDDEN, TOKENS, dtype=torch.float64).t()
    ids, weights = routing()
    ids_t, weights_t = ids.t().contiguous().t(), weights.t().contiguous().t()
    expected = run(x.contiguous(), ids, weights, w, "geglu")
    assert_close(run(x, ids_t, weights_t, turned, "geglu"), expected, TERMS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bit_identical_repeats(dtype) -> None:
    """From run to run; in the types of the CPU kernels also at any number of threads."""
    w = {name: t.requires_grad_() for name, t in bank(EXPERTS, 96, 200, "gelu", dtype).items()}
    x = torch.randn(300, 96, dtype=dtype, requires_grad=True)
    ids, weights = routing(300, dtype=torch.float32)
    weights.requires_grad_()
    leaves = [x, weights, *w.values()]

    def once():
        y = run(x, ids, weights, w, "gelu")
        return [y, *gradients(y.square().sum(), leaves)]

    first, threads = once(), torch.get_num_threads()
    try:
        for count in (threads, *(() if dtype == torch.float64 else (1, 2, 3))):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_double_backward_is_refused_in_words() -> None:
    w = {name: t.requires_grad_() for name, t in bank(2, 3, 4, "gelu").items()}
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = run(x, torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.float64), w, "gelu")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="no second derivative; use turnout::dispatch"):
        grad.sum().backward()


def test_autocast_runs_in_bfloat16_and_gives_float32_gradients() -> None:
    w = {name: t.requires_grad_() for name, t in bank(EXPERTS, HIDDEN, FFN, "swiglu", torch.float32).items()}
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    ids, weights = routing(dtype=torch.float32)
    weights.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x, ids, weights, w, "swiglu")
    low = {name: t.detach().bfloat16() for name, t in w.items()}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(x.detach().bfloat16(), ids, weights.detach(), low, "swiglu"))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in (x, weights, *w.values()))


@pytest.mark.parametrize("shape", [(HIDDEN,), (0, HIDDEN), (3, 4, HIDDEN)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward(activation, shape) -> None:
    w = {name: t[0] for name, t in bank(1, HIDDEN, FFN, activation).items()}
    x = torch.randn(shape, dtype=torch.float64)
    expected = perceptron(x, w["up"], w["down"], activation, w["up_bias"], w["down_bias"])
    biases = {name: w[name] for name in ("up_bias", "down_bias")}
    assert_close(turnout.feed_forward(x, w["up"], w["down"], activation, **biases), expected, TERMS)


class TestPrepack:
    def given(self, activation="swiglu"):
        x = torch.randn(TOKENS, HIDDEN)
        return x, *routing(dtype=torch.float32), bank(EXPERTS, HIDDEN, FFN, activation, torch.float32)

    def pack(self, w, activation):
        return turnout.prepack(w["up"], w["down"], activation, up_bias=w["up_bias"], down_bias=w["down_bias"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
    @pytest.mark.parametrize("activation", ["swiglu", "relu"])
    def test_stands_in_for_the_weights(self, activation, dtype) -> None:
        x, ids, weights, w = self.given(activation)
        x, w = x.to(dtype), {name: t.to(dtype) for name, t in w.items()}
        expected = run(x, ids, weights, w, activation)
        of_bank = self.pack(w, activation)
        y = turnout.fused_experts(x, ids, weights, of_bank)
        # few rows on plain weights are read in place: the same sums in another order
        assert_close(y, expected, TERMS)
        of_lists = self.pack(as_lists(w), activation)
        assert torch.equal(turnout.fused_experts(x, ids, weights, of_lists), y)
        if of_bank.data is not None:
            assert torch.equal(of_bank.data, of_lists.data)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_one_tensor_of_bytes(self, dtype) -> None:
        _, _, _, w = self.given()
        packed = self.pack({name: t.to(dtype) for name, t in w.items()}, "swiglu")
        active = next(choice.name for choice in turnout.kernel_choices() if choice.active)
        kind = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        assert packed.layout == f"{active} {kind} gated {EXPERTS}x{HIDDEN}x{FFN} v2"
        assert packed.data.dtype == torch.uint8 and packed.data.dim() == 1 and packed.data.data_ptr() % 64 == 0
        assert packed.up == packed.down == () and (packed.num_experts, packed.ffn) == (EXPERTS, FFN)

    def test_pickles_and_copies(self) -> None:
        x, ids, weights, w = self.given()
        packed = self.pack(w, "swiglu")
        expected = turnout.fused_experts(x, ids, weights, packed)
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for again in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), loaded):
            assert again.data.data_ptr() != packed.data.data_ptr()
            assert torch.equal(turnout.fused_experts(x, ids, weights, again), expected)

    def test_refuses_what_does_not_fit(self) -> None:
        x, ids, weights, w = self.given()
        packed = self.pack(w, "swiglu")

        def call(x=x, **changes):
            return turnout.fused_experts(x, ids, weights, dataclasses.replace(packed, **changes))

        foreign = packed.layout.replace(packed.layout.split()[0], "neon")
        padded = torch.cat([packed.data.new_zeros(4), packed.data])
        both = f"packed has the layout '{foreign}', expected '{packed.layout}'"
        for error, words, run_it in [
            (ValueError, both, lambda: call(layout=foreign)),
            (ValueError, "expected '.* bf16 gated", lambda: call(x.bfloat16(), up_bias=(), down_bias=())),
            (ValueError, "gated 5x8x11 v2'", lambda: call(ffn=11, up_bias=(), down_bias=())),
            (ValueError, "plain 5x8x12 v2'", lambda: call(activation="relu", up_bias=(), down_bias=())),
            (ValueError, r"packed has \d+ bytes, expected \d+", lambda: call(data=packed.data[:-64])),
            (ValueError, "packed is not aligned to 64 bytes", lambda: call(data=padded[4:])),
            (ValueError, "packed is not contiguous", lambda: call(data=torch.cat([packed.data] * 2)[::2])),
            (TypeError, "packed is Float, expected uint8", lambda: call(data=packed.data.float())),
            (TypeError, "x is Half, expected float32 or bfloat16", lambda: call(x.half(), up_bias=(), down_bias=())),
        ]:
            with pytest.raises(error, match=words):
                run_it()

    def test_under_autocast_x_takes_the_packed_type(self) -> None:
        x, ids, weights, w = self.given()
        low = self.pack({name: t.bfloat16() for name, t in w.items()}, "swiglu")
        with torch.no_grad():
            expected = turnout.fused_experts(x.bfloat16(), ids, weights, low)
            full = turnout.fused_experts(x, ids, weights, self.pack(w, "swiglu"))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(turnout.fused_experts(x, ids, weights, low), expected)
                assert torch.equal(turnout.fused_experts(x, ids, weights, self.pack(w, "swiglu")), full)

    def test_is_a_snapshot(self) -> None:
        x, ids, weights, w = self.given()
        packed = self.pack(w, "swiglu")
        before = turnout.fused_experts(x, ids, weights, packed)
        for tensor in w.values():
            tensor.data.zero_()
        assert torch.equal(turnout.fused_experts(x, ids, weights, packed), before)

    def test_of_parameters_is_for_inference(self) -> None:
        x, ids, weights, w = self.given()
        packed = self.pack({name: torch.nn.Parameter(t) for name, t in w.items()}, "swiglu")
        assert not turnout.fused_experts(x, ids, weights, packed).requires_grad
        x.requires_grad_()
        with pytest.raises(RuntimeError, match="x requires a gradient, but packed weights are for inference"):
            turnout.fused_experts(x, ids, weights, packed)
        with pytest.raises(RuntimeError, match="topk_weights requires a gradient"):
            turnout.fused_experts(x.detach(), ids, weights.requires_grad_(), packed)
        with torch.no_grad():
            turnout.fused_experts(x, ids, weights, packed)
