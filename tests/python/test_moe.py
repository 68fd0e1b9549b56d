"""turnout.MoE and turnout.HierarchicalMoE: against loops and a published package, capacity by hand, errors in words."""

import copy

import mixture_of_experts
import pytest
import torch
import turnout
from naive import ACTIVATIONS, assert_close, mixture, of_bank
from torch import nn

HIDDEN, FFN, EXPERTS = 6, 5, 4
TERMS = HIDDEN + FFN + 2


def weights_of(bank) -> dict[str, torch.Tensor | None]:
    return {name: getattr(bank, name) for name in ("up", "down", "up_bias", "down_bias")}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_a_loop_over_tokens(activation, bias) -> None:
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, activation=activation, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 4, HIDDEN, dtype=torch.float64)
    made = layer(x)
    tokens = x.reshape(-1, HIDDEN)
    scores = (tokens @ layer.gate.weight.T).softmax(-1)
    best, ids = scores.topk(2)
    expected = mixture(tokens, ids, best / best.sum(-1, keepdim=True), of_bank(weights_of(layer.experts), activation))
    assert_close(made.output, expected.view(x.shape), TERMS)
    assert torch.equal(made.routing.topk_ids, ids)
    assert made.plan.tokens_per_expert.tolist() == ids.flatten().bincount(minlength=EXPERTS).tolist()
    assert int(made.dropped) == 0
    load = ids.flatten().bincount(minlength=EXPERTS).double() / ids.numel()
    assert_close(made.aux_loss, 1e-2 * EXPERTS * (load * scores.mean(0)).sum(), EXPERTS * 24)


def test_shared_experts() -> None:
    options = {"activation": "swiglu", "bias": False, "dtype": torch.float64}
    for gated in (False, True):
        layer = turnout.MoE(HIDDEN, FFN, EXPERTS, shared_ffn=7, shared_gated=gated, **options)
        x = torch.randn(9, HIDDEN, dtype=torch.float64)
        plain = copy.deepcopy(layer)
        plain.shared = None
        gate, up = (x @ layer.shared.up.T).chunk(2, -1)
        shared = (nn.functional.silu(gate) * up) @ layer.shared.down.T
        if gated:
            shared = torch.sigmoid(x @ layer.shared_gate.weight.T) * shared
        assert_close(layer(x).output, plain(x).output + shared, TERMS + 7)


def test_every_parameter_gets_a_gradient() -> None:
    layer = turnout.MoE(
        HIDDEN, FFN, EXPERTS, shared_ffn=3, shared_gated=True, gate_bias=True, z_coefficient=1e-3
    )
    made = layer(torch.randn(20, HIDDEN))
    (made.output.square().sum() + made.aux_loss).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def tied_layer(**options) -> turnout.MoE:
    """All tokens choose expert 0, then 1: the gate reads the first feature, which is 1."""
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, gate=nn.Linear(HIDDEN, EXPERTS, bias=False), **options)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    return layer


def test_capacity_by_hand() -> None:
    x = torch.randn(2, 3, HIDDEN)
    x[..., 0] = 1
    made = tied_layer(capacity=turnout.CapacityOptions(fixed=2))(x)
    assert int(made.dropped) == 2 * 6 - 2 * 2  # two places of each of two experts
    assert made.routing.topk_ids.tolist() == [[0, 1], [0, 1]] + [[-1, -1]] * 4
    assert not made.output.view(-1, HIDDEN)[2:].any()

    made = tied_layer(capacity=turnout.CapacityOptions(fixed=2, per_sequence=True))(x)
    assert made.routing.topk_ids.tolist() == [[0, 1], [0, 1], [-1, -1]] * 2
    # 6 tokens · 2 choices / 4 experts · 1.1 = 3.3 places: 4, or 3 rounded down, or 1 without the choices
    for expected, how in ((4, {}), (3, {"rounding": "floor"}), (1, {"rounding": "floor", "count_choices": False})):
        made = tied_layer(capacity=turnout.CapacityOptions(factor=1.1, **how))(x)
        assert made.plan.tokens_per_expert.tolist() == [expected, expected, 0, 0]


def test_losses() -> None:
    x = torch.randn(12, HIDDEN)
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, balance_coefficient=0.5, z_coefficient=0.25, load_count="first_choice")
    made = layer(x)
    logits = x @ layer.gate.weight.T
    load = made.routing.topk_ids[:, 0].bincount(minlength=EXPERTS) / 12
    expected = 0.5 * EXPERTS * (load * logits.softmax(-1).mean(0)).sum() + 0.25 * logits.logsumexp(-1).square().mean()
    assert_close(made.aux_loss, expected, 32)
    without = turnout.MoE(HIDDEN, FFN, EXPERTS, balance_coefficient=0)(x)
    assert float(without.aux_loss) == 0
    assert not without.aux_loss.requires_grad


def test_padding_takes_no_place_and_counts_in_no_loss() -> None:
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, z_coefficient=1, capacity=turnout.CapacityOptions(fixed=2))
    x, mask = torch.randn(2, 4, HIDDEN), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    padded, real = layer(x, mask), layer(x[mask])
    assert_close(padded.output[mask], real.output, TERMS)
    assert not padded.output[~mask].any()
    assert_close(padded.aux_loss, real.aux_loss, 32)
    assert torch.equal(padded.dropped, real.dropped)
    with pytest.raises(ValueError, match=r"token_mask has shape \[4\], expected \[2, 4\] \(x without hidden\)"):
        layer(x, mask[0])


def test_noise_and_jitter_act_in_training_alone() -> None:
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, noisy=True, jitter=0.5)
    x = torch.randn(9, HIDDEN)
    assert torch.equal(layer.eval()(x).routing.scores, turnout.route(layer.gate(x), 2).scores)
    torch.manual_seed(6)
    seen = layer.train()(x).routing.scores
    torch.manual_seed(6)
    noisy = turnout.noisy_logits(layer.gate(turnout.jitter(x, 0.5)), torch.zeros(9, EXPERTS))
    assert torch.equal(seen, turnout.route(noisy.logits, 2).scores)
    assert layer.noise_gate.weight.shape == (EXPERTS, HIDDEN) and not layer.noise_gate.weight.any()


@pytest.mark.parametrize("capacity", [{}, {"factor": 1.0}, {"fixed": 3, "per_sequence": True}])
def test_no_tokens(capacity) -> None:
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, shared_ffn=3, z_coefficient=1, capacity=turnout.CapacityOptions(**capacity))
    made = layer(torch.randn(0, 3, HIDDEN))
    assert made.output.shape == (0, 3, HIDDEN)
    assert float(made.aux_loss.detach()) == 0
    (made.output.sum() + made.aux_loss).backward()
    assert all(not p.grad.any() for p in layer.parameters())


def test_jitter_in_place_of_the_input() -> None:
    """The experts see what the gate sees: as the layer without jitter on the jittered input."""
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, jitter=0.3, jitter_experts=True)
    x = torch.randn(20, HIDDEN)
    torch.manual_seed(1)
    made = layer(x).output
    torch.manual_seed(1)
    assert torch.equal(made, layer.eval()(turnout.jitter(x, 0.3)).output)


def test_noise_reaches_its_gate() -> None:
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, router="noisy_topk", noisy=True)
    layer(torch.randn(50, HIDDEN)).output.square().sum().backward()
    assert layer.noise_gate.weight.grad.any()


def test_selection_bias_evens_the_load() -> None:
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, 1, gate_bias=True, selection_bias=True, balance_coefficient=0)
    with torch.no_grad():
        layer.gate.bias[0] += 2
    x = torch.randn(400, HIDDEN)

    def counts() -> torch.Tensor:
        return turnout.expert_counts(layer(x).routing.topk_ids, EXPERTS)

    assert int(counts()[0]) > 300
    for _ in range(200):
        layer.selection_bias.copy_(turnout.update_selection_bias(layer.selection_bias, counts(), 1e-2))
    assert int(counts().max()) < 150  # the mean is 100


class Scale(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, rows):
        return rows * self.by


def test_any_gate_and_any_experts() -> None:
    gate = nn.Sequential(nn.Linear(HIDDEN, 3), nn.Tanh(), nn.Linear(3, EXPERTS))
    layer = turnout.MoE(HIDDEN, 0, EXPERTS, gate=gate, experts=[Scale(float(e)) for e in range(EXPERTS)])
    x = torch.randn(10, HIDDEN)
    made = layer(x)
    factor = (made.routing.topk_ids * made.routing.topk_weights).sum(-1, keepdim=True)
    assert_close(made.output, x * factor, 8)
    made.output.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert list(layer.experts.state_dict()) == ["0.by", "1.by", "2.by", "3.by"]

    perceptrons = [turnout.nn.Perceptron(HIDDEN, FFN, "relu") for _ in range(EXPERTS)]
    fused = turnout.MoE(HIDDEN, 0, EXPERTS, experts=nn.ModuleList(perceptrons))
    made = fused(x)
    expected = mixture(x, made.routing.topk_ids, made.routing.topk_weights, perceptrons)
    assert_close(made.output, expected, TERMS)


@pytest.mark.parametrize("policy", ["all", "none", "threshold"])
def test_hierarchical_as_the_published_package(policy) -> None:
    """The package's own threshold policy raises; there the compat layer, tested elsewhere, is the oracle."""
    if policy == "threshold":
        package = turnout.compat.HeirarchicalMoE(HIDDEN, (2, 3), FFN, second_policy_train=policy)
    else:
        package = mixture_of_experts.HeirarchicalMoE(HIDDEN, (2, 3), FFN, second_policy_train=policy)
    layer = turnout.HierarchicalMoE(HIDDEN, FFN, (2, 3), gating={"policy_train": policy})
    with torch.no_grad():
        layer.gate_outer.w_gating.copy_(package.gate_outer.w_gating)
        layer.gate_inner.w_gating.copy_(package.gate_inner.w_gating)
        layer.experts.up.copy_(package.experts.w1.flatten(0, 1).transpose(1, 2))
        layer.experts.down.copy_(package.experts.w2.flatten(0, 1).transpose(1, 2))
    x = torch.randn(3, 16, HIDDEN)
    made = layer(x)
    output, loss = package(x)
    assert_close(made.output, output, 2 * TERMS)
    assert_close(made.aux_loss, loss, 64)
    (made.output.square().sum() + made.aux_loss).backward()
    (output.square().sum() + loss).backward()
    assert_close(layer.gate_outer.w_gating.grad, package.gate_outer.w_gating.grad, 256)
    assert_close(layer.gate_inner.w_gating.grad, package.gate_inner.w_gating.grad, 256)
    assert_close(layer.experts.up.grad, package.experts.w1.grad.flatten(0, 1).transpose(1, 2), 256)
    assert made.tokens_per_expert.shape == (6,)


def test_hierarchical_without_tokens_and_with_modules() -> None:
    layer = turnout.HierarchicalMoE(HIDDEN, num_experts=(2, 2), experts=[Scale(1.0) for _ in range(4)])
    made = layer(torch.randn(2, 0, HIDDEN))
    assert made.output.shape == (2, 0, HIDDEN)
    assert float(made.aux_loss.detach()) == 0
    made = layer(torch.randn(2, 8, HIDDEN))
    assert made.output.shape == (2, 8, HIDDEN)
    assert turnout.HierarchicalMoE(HIDDEN).experts.ffn == 4 * HIDDEN


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x)[:2]


X = torch.randn(4, HIDDEN)
ERRORS = [
    (lambda: turnout.MoE(0, 4, 4), ValueError, "turnout.MoE: hidden is 0, expected at least 1"),
    (lambda: turnout.MoE(8, 0, 4), ValueError, "FeedForwardBank: ffn is 0, expected at least 1"),
    (lambda: turnout.MoE(8, 4, 4, top_k=5), ValueError, r"MoE: top_k is 5, expected 1 to 4 \(num_experts\)"),
    (lambda: turnout.MoE(8, 4, 4, activation="swish"), ValueError, "activation is 'swish', expected one of relu, gelu"),
    (lambda: turnout.MoE(8, 4, 4, router="raw"), ValueError, "router preset is 'raw', expected one of mixtral"),
    (lambda: turnout.MoE(8, 4, 4, router={"weights": "raw"}), ValueError, "router weights is 'raw', expected one of normalized"),
    (lambda: turnout.MoE(8, 4, 4, router={"groups": 3}), ValueError, "groups is 3, expected a divisor of 4 experts"),
    (lambda: turnout.MoE(8, 4, 4, router={"weight": "raw"}), TypeError, "router holds 'weight', expected switches of route.*: score, weights"),
    (lambda: turnout.MoE(8, 4, 4, router={"scale": "2"}), TypeError, "MoE: expected a value of type 'float' for argument 'scale'"),
    (lambda: turnout.MoE(8, 4, 4, jitter="0.1"), TypeError, "expected a value of type 'float' for argument 'amount'"),
    (lambda: turnout.MoE(8, 4, 4, capacity=turnout.CapacityOptions(factor="1")), TypeError, "for argument 'factor' but instead found type 'str'"),
    (lambda: turnout.MoE(8, 4, 4, bias="no"), TypeError, "MoE: bias is 'no', expected True or False"),
    (lambda: turnout.MoE(8, 4, 4, capacity=turnout.CapacityOptions(per_sequence="no")), TypeError, "per_sequence is 'no', expected True"),
    (lambda: turnout.MoE(8, 4, 4, hash_seed="a"), TypeError, "MoE: hash_seed is 'a', expected an integer"),
    (lambda: turnout.MoE(8, 4, 4, sum_over_ranks=3), TypeError, "MoE: sum_over_ranks is 3, expected a function"),
    (lambda: turnout.MoE(8, 4, 4, router=3), TypeError, "MoE: router is 3, expected switches of route"),
    (lambda: turnout.MoE(8, 4, 4, capacity=1.25), TypeError, "MoE: capacity is 1.25, expected a turnout.CapacityOptions"),
    (lambda: turnout.MoE(8, 4, 4, gate=3), TypeError, "MoE: gate is a int, expected a torch.nn.Module"),
    (lambda: turnout.MoE(8, 4, 4, experts=3), TypeError, "experts is a int, expected a list of modules"),
    (lambda: turnout.MoE(8, 4, 4, experts=nn.Linear(8, 8)), TypeError, "experts is a Linear without num_experts, expected a list"),
    (lambda: turnout.MoE(6, 4, 4, gate=Half(6, 4))(X), ValueError, r"gate's output has shape \[2, 4\], expected \[4, 4\] \(tokens"),
    (lambda: turnout.MoE(6, 4, 4)(X, [True]), TypeError, "MoE: token_mask is a list, expected a tensor"),
    (lambda: turnout.MoE(8, 4, 4, selection="best"), ValueError, "selection is 'best', expected one of topk, expert_choice"),
    (lambda: turnout.MoE(8, 4, 4, selection="sinkhorn", router="mixtral"), ValueError, "router is 'mixtral', expected None: selection='sinkhorn'"),
    (lambda: turnout.MoE(8, 4, 4, selection="hash", selection_bias=True), ValueError, "selection_bias is set, but selection is 'hash'"),
    (lambda: turnout.MoE(6, 4, 4, selection="hash")(X), ValueError, "token_ids is None, expected the words that selection='hash'"),
    (lambda: turnout.MoE(6, 4, 4, selection="hash")(X, token_ids=X[0].long()), ValueError, r"token_ids has shape \[6\], expected \[4\]"),
    (lambda: turnout.MoE(8, 4, 4, load_count="x"), ValueError, "load_count is 'x', expected one of per_assignment"),
    (lambda: turnout.MoE(8, 4, 4, z_coefficient=-1.0), ValueError, "z_coefficient is -1.0, expected a finite number"),
    (lambda: turnout.MoE(8, 4, 4, jitter=1.0), ValueError, "jitter: amount is 1, expected 0 to below 1"),
    (lambda: turnout.MoE(8, 4, 4, shared_gated=True), ValueError, "shared_ffn is 0, expected at least 1"),
    (lambda: turnout.MoE(8, 4, 4, capacity=turnout.CapacityOptions(factor=-1.0)), ValueError, "factor is -1"),
    (lambda: turnout.MoE(8, 4, 4, capacity=turnout.CapacityOptions(fixed=1, order="late")), ValueError,
     "drop order is 'late', expected one of choice"),
    (lambda: turnout.MoE(8, 4, 4, experts=[nn.Linear(8, 8)]), ValueError, "experts holds 1 experts, expected 4"),
    (lambda: turnout.MoE(8, 4, 1, 1, experts=["a"]), TypeError, r"experts\[0\] is a str, expected a torch.nn.Module"),
    (lambda: turnout.MoE(8, 4, 4, experts=[]), ValueError, "experts is empty, expected at least one module"),
    (lambda: turnout.MoE(8, 4, 4)(X), ValueError, r"MoE: x has shape \[4, 6\], expected \[..., hidden\] with 8"),
    (lambda: turnout.MoE(6, 4, 4)(X.long()), TypeError, "MoE: x is torch.int64, expected a floating-point tensor"),
    (lambda: turnout.MoE(6, 4, 4, capacity=turnout.CapacityOptions(fixed=1, per_sequence=True))(X[0]), ValueError,
     r"x has shape \[6\], expected \[..., sequence, hidden\]"),
    (lambda: turnout.MoE(6, 4, 4)(X, torch.ones(3, dtype=torch.bool)), ValueError, r"token_mask has shape \[3\], expected \[4\]"),
    (lambda: turnout.MoE(6, 4, 4, jitter=1.0), ValueError, "jitter: amount is 1"),
    (lambda: turnout.MoE(6, 4, 4, gate=nn.Linear(6, 3))(X), ValueError, r"gate's output has shape \[4, 3\], expected"),
    (lambda: turnout.HierarchicalMoE(8, num_experts=4), ValueError, r"num_experts is 4, expected a pair \(outer, inner\)"),
    (lambda: turnout.HierarchicalMoE(8, num_experts=(4, 1)), ValueError, "num_experts is 1, expected at least 2"),
    (lambda: turnout.HierarchicalMoE(8, num_experts=(0, 2)), ValueError, "num_experts of a level is 0, expected"),
    (lambda: turnout.HierarchicalMoE(8, gating={"policy_eval": "some"}), ValueError, "policy_eval is 'some', expected one of all"),
    (lambda: turnout.HierarchicalMoE(8, gating="all"), TypeError, "gating is 'all', expected keyword arguments of Top2Gating"),
    (lambda: turnout.HierarchicalMoE(8, gating={"policy": "all"}), TypeError, "gating holds 'policy', expected arguments of Top2Gating"),
    (lambda: turnout.HierarchicalMoE(6)(X[None].double()), TypeError, "x is torch.float64, expected torch.float32 as the weights are"),
    (lambda: turnout.nn.Top2Gating(6, 4, outer=2)(X[None, None]), ValueError, r"x has shape \[1, 1, 4, 6\], expected 2 \(outer\)"),
    (lambda: turnout.HierarchicalMoE(8)(X), ValueError, r"x has shape \[4, 6\], expected \[groups, tokens, hidden\]"),
    (lambda: turnout.add_shared(X, X[:2]), ValueError, "add_shared: shared has shape"),
    (lambda: turnout.add_shared(X, X, X), ValueError, "add_shared: gate_logits has shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_what_is_wrong(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
