"""MoeLayer, MixtureOfExperts, SimpleMoELayer and MoELayer against loops written here, and on hand-worked cases."""

import copy
import io
import math

import pytest
import torch
import turnout
from naive import assert_close, mixture
from torch import nn

from turnout.compat import MixtureOfExperts, MoEConfig, MoELayer, MoeLayer, SimpleMoELayer, TopKRouter

DIM, EXPERTS = 8, 4
TERMS = 5 * DIM + EXPERTS
WIDE = torch.float64


def perceptrons(count=EXPERTS, **kinds):
    act = kinds.get("act", nn.ReLU)
    return [nn.Sequential(nn.Linear(DIM, 12), act(), nn.Linear(12, DIM)) for _ in range(count)]


def llmbook(experts, gate, k, inputs):
    """The published forward: a loop over experts with torch.where."""
    weights, selected = torch.topk(gate(inputs), k)
    weights = nn.functional.softmax(weights, dim=1)
    results = torch.zeros_like(inputs)
    for i, expert in enumerate(experts):
        batch, nth = torch.where(selected == i)
        results[batch] += weights[batch, nth, None] * expert(inputs[batch])
    return results


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(DIM))

    def forward(self, rows):
        return rows * self.scale


EXPERT_LISTS = {
    "perceptrons": perceptrons,
    "silu": lambda: perceptrons(act=nn.SiLU),
    "gelu_tanh": lambda: perceptrons(act=lambda: nn.GELU("tanh")),
    "tanh": lambda: perceptrons(act=nn.Tanh),
    "linear": lambda: [nn.Linear(DIM, DIM) for _ in range(EXPERTS)],
    "own": lambda: [Scaled() for _ in range(EXPERTS)],
    "mixed": lambda: [*perceptrons(2), Scaled(), nn.Linear(DIM, DIM)],
    "widths": lambda: [nn.Sequential(nn.Linear(DIM, 6), nn.ReLU(), nn.Linear(6, DIM)), *perceptrons(3)],
}


class TestMoeLayer:
    @pytest.mark.parametrize("k", [1, 2, EXPERTS])
    @pytest.mark.parametrize("kind", EXPERT_LISTS)
    def test_equals_the_published_loop(self, kind, k) -> None:
        experts = [e.double() for e in EXPERT_LISTS[kind]()]
        gate = nn.Linear(DIM, EXPERTS).double()
        moe = MoeLayer(experts, gate, k)
        x = torch.randn(20, DIM, dtype=WIDE, requires_grad=True)
        leaves = [x, *moe.parameters()]
        expected = llmbook(experts, gate, k, x)
        assert_close(moe(x), expected, TERMS)
        probe = torch.randn(20, DIM, dtype=WIDE)
        expected_grads = torch.autograd.grad((expected * probe).sum(), leaves)
        for a, e in zip(torch.autograd.grad((moe(x) * probe).sum(), leaves), expected_grads, strict=True):
            assert_close_or_tiny(a, e, 20 * TERMS)

    def test_attributes(self) -> None:
        experts, gate = perceptrons(), nn.Linear(DIM, EXPERTS)
        moe = MoeLayer(experts=experts, gate=gate, num_experts_per_tok=2)
        assert isinstance(moe.experts, nn.ModuleList) and list(moe.experts) == experts
        assert moe.gate is gate and moe.num_experts_per_tok == 2

    def test_unused_experts_get_zeros(self) -> None:
        """All tokens go to expert 2: the others are called on no row."""
        for experts in (perceptrons(), [Scaled() for _ in range(EXPERTS)]):
            gate = nn.Linear(DIM, EXPERTS)
            gate.weight.data.zero_()
            gate.bias.data.copy_(torch.tensor([0.0, 1.0, 9.0, 2.0]))
            moe = MoeLayer(experts, gate, 1)
            moe(torch.randn(6, DIM)).sum().backward()
            for index, expert in enumerate(moe.experts):
                assert all(p.grad is not None for p in expert.parameters())
                assert any(bool(p.grad.any()) for p in expert.parameters()) == (index == 2)

    def test_hooks_are_not_passed_over(self) -> None:
        experts, seen = perceptrons(), []
        experts[1][0].register_forward_hook(lambda *_: seen.append(1))
        moe = MoeLayer(experts, nn.Linear(DIM, EXPERTS), 2)
        plain = MoeLayer(copy.deepcopy(perceptrons()), moe.gate, 2)
        plain.load_state_dict(moe.state_dict())
        x = torch.randn(9, DIM)
        assert_close(moe(x), plain(x), TERMS)
        assert seen

    def test_one_expert_one_token_no_token_leading_axes(self) -> None:
        moe = MoeLayer(perceptrons(1), nn.Linear(DIM, 1), 1)
        x = torch.randn(2, 3, DIM)
        assert_close(moe(x), moe.experts[0](x), TERMS)
        assert_close(moe(x[0, :1]), moe.experts[0](x[0, :1]), TERMS)
        for experts in (perceptrons(), [Scaled() for _ in range(EXPERTS)]):
            moe = MoeLayer(experts, nn.Linear(DIM, EXPERTS), 2)
            y = moe(torch.zeros(0, DIM))
            y.sum().backward()
            assert y.shape == (0, DIM)
            assert all(p.grad is not None and not p.grad.any() for p in moe.experts.parameters())

    def test_nan_token_harms_only_itself(self) -> None:
        for experts in (perceptrons(), [Scaled() for _ in range(EXPERTS)]):
            moe = MoeLayer(experts, nn.Linear(DIM, EXPERTS), 2)
            x = torch.randn(6, DIM)
            broken = x.clone()
            broken[3] = math.nan
            rest = [0, 1, 2, 4, 5]
            assert_close(moe(broken)[rest], moe(x)[rest], TERMS)
            assert moe(broken)[3].isnan().all()

    @pytest.mark.parametrize("experts", [perceptrons, lambda: [Scaled() for _ in range(EXPERTS)]])
    def test_bfloat16_and_autocast(self, experts) -> None:
        moe = MoeLayer(experts(), nn.Linear(DIM, EXPERTS), 2)
        x = torch.randn(6, DIM)
        with torch.autocast("cpu", torch.bfloat16):
            moe(x).float().sum().backward()
        assert all(p.grad is not None for p in moe.parameters())
        assert moe.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def assert_close_or_tiny(actual: torch.Tensor, expected: torch.Tensor | None, terms: int) -> None:
    """Where the exact gradient is zero (the gate at k = 1, an expert without tokens), both may differ by what sums of
    order 1 leave when they cancel."""
    if expected is None or float(expected.abs().max()) < 1e-12:
        assert float(actual.abs().max()) < 1e-12
    else:
        assert_close(actual, expected, terms)


class TestMixtureOfExperts:
    def loop(self, layer, x, capacity):
        """First choices of all tokens queue before second ones."""
        flat = x.reshape(-1, DIM)
        probabilities = layer.router.gate(flat).softmax(-1)
        top, ids = probabilities.topk(layer.config.top_k)
        weights = top / top.sum(-1, keepdim=True)
        taken, ids = [0] * EXPERTS, ids.clone()
        for k in range(ids.shape[1]):
            for t in range(ids.shape[0]):
                expert = int(ids[t, k])
                ids[t, k] = expert if taken[expert] < capacity else -1
                taken[expert] += 1
        return mixture(flat, ids, weights, list(layer.experts)).view(x.shape), int((ids < 0).sum())

    CONFIGS = (
        *(MoEConfig(EXPERTS, 2, factor) for factor in (0.5, 1.0, 1.25, 4.0)),
        MoEConfig(EXPERTS, 1, 1.0),
        MoEConfig(EXPERTS, EXPERTS, 0.7),
        MoEConfig(EXPERTS, 2, 9.0, expert_capacity=3),
    )

    @pytest.mark.parametrize("config", CONFIGS)
    def test_equals_the_loop(self, config) -> None:
        layer = MixtureOfExperts(DIM, config).double()
        x = torch.randn(3, 7, DIM, dtype=WIDE, requires_grad=True)
        capacity = config.expert_capacity or math.ceil(config.capacity_factor * 21 * config.top_k / EXPERTS)
        expected, dropped = self.loop(layer, x, capacity)
        y = layer(x)
        assert_close(y, expected, TERMS)
        assert int(layer.dropped) == dropped
        leaves = [x, *layer.experts.parameters(), layer.router.gate.weight]
        expected_grads = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
        for a, e in zip(torch.autograd.grad(y.square().sum(), leaves), expected_grads, strict=True):
            assert_close_or_tiny(a, e, 21 * TERMS)

    def test_capacity_by_hand(self) -> None:
        """All six tokens prefer expert 0, then 1; ceil(1.0 · 6 · 2 / 4) = 3 places each."""
        layer = MixtureOfExperts(DIM, MoEConfig(EXPERTS, 2, 1.0))
        layer.router.gate.weight.data.zero_()  # ties: the lower ids, half and half
        y = layer(torch.randn(2, 3, DIM))
        assert y[0].any(-1).all() and not y[1].any()
        assert int(layer.dropped) == 6

    def test_router(self) -> None:
        router = TopKRouter(DIM, MoEConfig(EXPERTS, 3)).double()
        x = torch.randn(2, 5, DIM, dtype=WIDE)
        scores, indices = router(x)
        top, ids = router.gate(x).softmax(-1).topk(3)
        assert torch.equal(indices, ids)
        assert_close(scores, top / top.sum(-1, keepdim=True), TERMS)

    def test_no_tokens(self) -> None:
        layer = MixtureOfExperts(DIM, MoEConfig(EXPERTS, 2))
        y = layer(torch.zeros(2, 0, DIM))
        y.sum().backward()
        assert y.shape == (2, 0, DIM) and all(p.grad is not None for p in layer.parameters())


class TestSimpleMoELayer:
    @pytest.mark.parametrize("load_count", ["per_assignment", "per_token", "first_choice"])
    def test_equals_the_loop(self, load_count) -> None:
        layer = SimpleMoELayer(DIM, EXPERTS, 2, alpha=0.1, load_count=load_count).double()
        x = torch.randn(3, 5, DIM, dtype=WIDE)
        flat = x.view(-1, DIM)
        p = layer.gating_network(flat).softmax(-1)
        top, ids = p.topk(2)
        expected = mixture(flat, ids, top / top.sum(-1, keepdim=True), list(layer.experts)).view(x.shape)
        y = layer(x)
        assert_close(y, expected, TERMS)
        hits = nn.functional.one_hot(ids, EXPERTS).double()
        f = {
            "per_assignment": hits.sum((0, 1)) / 30,
            "per_token": hits.sum((0, 1)) / 15,
            "first_choice": hits[:, 0].sum(0) / 15,
        }
        assert_close(layer.load_balancing_loss, 0.1 * EXPERTS * (f[load_count] * p.mean(0)).sum(), 60)

    def test_loss_trains_the_gate(self) -> None:
        layer = SimpleMoELayer(DIM, EXPERTS, 1)
        layer(torch.randn(4, 6, DIM))
        layer.load_balancing_loss.backward()
        assert layer.gating_network.weight.grad.any()
        assert all(e.weight.grad is None for e in layer.experts)

    def test_alpha_zero_costs_nothing(self) -> None:
        layer = SimpleMoELayer(DIM, EXPERTS, 2, alpha=0.0)
        layer(torch.randn(4, 6, DIM))
        assert float(layer.load_balancing_loss) == 0 and not layer.load_balancing_loss.requires_grad

    def test_copies_and_saves_after_a_forward(self) -> None:
        layer = SimpleMoELayer(DIM, EXPERTS, 2)
        x = torch.randn(1, 3, DIM)
        y = layer(x)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(x), y) and twin.load_balancing_loss is not None
        assert not any("loss" in name for name in layer.state_dict())


class TestMoELayer:
    @pytest.mark.parametrize("raw", [False, True])
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_equals_the_loop(self, k, raw) -> None:
        layer = MoELayer(DIM, EXPERTS, k, raw_probabilities=raw, activation="relu").double()
        x = torch.randn(2, 9, DIM, dtype=WIDE)
        flat = x.view(-1, DIM)
        logits = layer.gate(flat)
        top, ids = logits.topk(k)
        p = logits.softmax(-1)
        weights = p.gather(1, ids) if raw else top.softmax(-1)
        y, aux = layer(x)
        assert_close(y, mixture(flat, ids, weights, list(layer.experts)).view(x.shape), TERMS)
        load = nn.functional.one_hot(ids[:, 0], EXPERTS).double().mean(0)
        assert_close(aux, EXPERTS * (p.mean(0) * load).sum(), 40)

    @pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
    def test_hybrid(self, alpha) -> None:
        layer = MoELayer(DIM, EXPERTS, 2, alpha=alpha).double()
        plain = MoELayer(DIM, EXPERTS, 2).double()
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("dense")})
        assert plain.dense is None
        x = torch.randn(4, 5, DIM, dtype=WIDE)
        (y, aux), (moe, plain_aux) = layer(x), plain(x)
        assert_close(y, alpha * layer.dense(x) + (1 - alpha) * moe, TERMS)
        assert torch.equal(aux, plain_aux)

    def test_balanced_and_collapsed_loss(self) -> None:
        layer = MoELayer(EXPERTS, EXPERTS, 1)
        layer.gate.weight.data.copy_(100 * torch.eye(EXPERTS))
        assert float(layer(torch.eye(EXPERTS))[1].detach()) == pytest.approx(1.0)
        assert float(layer(torch.eye(EXPERTS)[[2, 2, 2]])[1].detach()) == pytest.approx(EXPERTS)

    @pytest.mark.parametrize("sparse", ["every", "alternating"])
    def test_drops_into_a_transformer_block(self, sparse) -> None:
        """In the place of the dense block, in each layer or in every second one: the loss falls."""

        class Block(nn.Module):
            def __init__(self, feed_forward) -> None:
                super().__init__()
                self.norm_1, self.norm_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
                self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
                self.feed_forward = feed_forward

            def forward(self, x):
                n = self.norm_1(x)
                x = x + self.attention(n, n, n, need_weights=False)[0]
                made = self.feed_forward(self.norm_2(x))
                y, aux = made if isinstance(made, tuple) else (made, x.new_zeros(()))
                return x + y, aux

        def feed_forward(layer):
            if sparse == "every" or layer % 2 == 1:
                return MoELayer(hidden_dim=DIM, num_experts=EXPERTS, top_k=2)
            return turnout.nn.Perceptron(DIM, 4 * DIM)

        blocks = nn.ModuleList(Block(feed_forward(layer)) for layer in range(4))
        optimizer = torch.optim.Adam(blocks.parameters(), 1e-2)
        x = torch.randn(8, 6, DIM)
        target = x.roll(1, dims=1)
        losses = []
        for _ in range(15):
            y, total = x, 0.0
            for block in blocks:
                y, aux = block(y)
                total = total + aux
            loss = (y - target).square().mean()
            optimizer.zero_grad()
            (loss + 1e-2 * total).backward()
            assert all(p.grad is not None for p in blocks.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]


def test_python_and_fused_perceptron_agree() -> None:
    """Perceptron called alone is Linear, activation, Linear."""
    expert = turnout.nn.Perceptron(DIM, 12, "silu")
    x = torch.randn(5, DIM)
    biases = {"up_bias": expert[0].bias, "down_bias": expert[2].bias}
    fused = turnout.feed_forward(x, expert[0].weight, expert[2].weight, "silu", **biases)
    assert_close(fused, expert(x), TERMS)
    assert expert.weight is expert[0].weight
