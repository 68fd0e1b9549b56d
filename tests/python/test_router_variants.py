"""Routers beside route(): each against its source's formula or code, written out here."""

from __future__ import annotations

import math

import pytest
import torch
import turnout
from naive import assert_close

EXPERTS, TOP_K = 6, 2


def normal_cdf(value: float) -> float:
    return (1 + math.erf(value / math.sqrt(2))) / 2


class TestNoisyTopK:
    """Shazeer et al., arXiv:1701.06538, equations 3 to 5 and 8 to 11, token by token."""

    tokens = 20

    def setup_method(self) -> None:
        self.clean, self.raw, self.noise = torch.randn(3, self.tokens, EXPERTS, dtype=torch.float64)
        self.deviation = (1 + self.raw.exp()).log()
        self.noisy = self.clean + self.noise * self.deviation

    def test_logits_and_weights(self) -> None:
        ours = turnout.noisy_logits(self.clean, self.raw, noise=self.noise)
        assert_close(ours.logits, self.noisy, terms=4)
        assert_close(ours.deviation, self.deviation, terms=4)
        gates = torch.zeros_like(self.noisy)
        for t in range(self.tokens):
            kept = sorted(range(EXPERTS), key=lambda e: -float(self.noisy[t, e]))[:TOP_K]
            total = sum(math.exp(self.noisy[t, e]) for e in kept)
            for e in kept:
                gates[t, e] = math.exp(self.noisy[t, e]) / total
        routing = turnout.route(ours.logits, TOP_K, **turnout.router_preset("noisy_topk"))
        assert_close(torch.zeros_like(gates).scatter(1, routing.topk_ids, routing.topk_weights), gates, terms=4)
        importance = turnout.expert_importance(routing.topk_ids, routing.topk_weights, EXPERTS)
        assert_close(importance, gates.sum(0), terms=self.tokens)
        mean = sum(importance.tolist()) / EXPERTS
        variance = sum((i - mean) ** 2 for i in importance.tolist()) / EXPERTS
        assert float(turnout.cv_squared(importance)) == pytest.approx(variance / mean**2, rel=1e-12)

    def test_load(self) -> None:
        expected = torch.zeros(EXPERTS, dtype=torch.float64)
        for t in range(self.tokens):
            for e in range(EXPERTS):
                others = sorted((float(self.noisy[t, o]) for o in range(EXPERTS) if o != e), reverse=True)
                threshold = others[TOP_K - 1]  # the k-th largest without e
                expected[e] += normal_cdf((float(self.clean[t, e]) - threshold) / float(self.deviation[t, e]))
        noisy = turnout.noisy_logits(self.clean, self.raw, noise=self.noise)
        assert_close(turnout.noisy_load(self.clean, noisy, TOP_K), expected, terms=self.tokens)
        assert turnout.noisy_load(self.clean, noisy, EXPERTS).tolist() == [self.tokens] * EXPERTS

    def test_minimum_and_drawing(self) -> None:
        torch.manual_seed(3)
        drawn = turnout.noisy_logits(self.clean, self.raw, 0.5)
        torch.manual_seed(3)
        noise = torch.randn_like(self.clean)
        assert torch.equal(drawn.deviation, turnout.noisy_logits(self.clean, self.raw).deviation + 0.5)
        assert torch.equal(drawn.logits, self.clean + noise * drawn.deviation)

    def test_gradients(self) -> None:
        def losses(clean, raw):
            noisy = turnout.noisy_logits(clean, raw, noise=self.noise[:4])
            routing = turnout.route(noisy.logits, TOP_K, **turnout.router_preset("noisy_topk"))
            importance = turnout.expert_importance(routing.topk_ids, routing.topk_weights, EXPERTS)
            return turnout.cv_squared(importance) + turnout.cv_squared(turnout.noisy_load(clean, noisy, TOP_K))

        leaves = [t[:4].clone().requires_grad_() for t in (self.clean, self.raw)]
        assert torch.autograd.gradcheck(losses, leaves)


def test_cv_squared_of_nothing_is_zero() -> None:
    values = torch.zeros(4, requires_grad=True)
    loss = turnout.cv_squared(values)
    loss.backward()
    assert float(loss.detach()) == 0 and values.grad.tolist() == [0] * 4
    assert float(turnout.cv_squared(torch.full((5,), 3.0))) == 0


def test_jitter_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=8, intermediate_size=4, num_local_experts=4, router_jitter_noise=0.3, num_experts_per_tok=2
    )
    block, seen = MixtralSparseMoeBlock(config).train(), []
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    block.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    x = torch.randn(2, 3, 8)
    torch.manual_seed(1)
    block(x.clone())
    torch.manual_seed(1)
    assert torch.equal(turnout.jitter(x, 0.3).view(6, 8), seen[0])
    assert torch.equal(turnout.jitter(x, 0.0), x)
    middle = turnout.jitter(x, 0.5, uniform=torch.full_like(x, 0.25))
    assert torch.equal(middle, x * 0.75)


def test_route_chosen_repeats_route_and_leaves_out() -> None:
    logits = torch.randn(9, EXPERTS, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"weights": "softmax_of_topk", "scale": 2.0}, {"score": "sigmoid", "epsilon": 0.1}):
        routed = turnout.route(logits, 3, **options)
        again = turnout.route_chosen(logits, routed.topk_ids, **options)
        assert all(torch.equal(a, b) for a, b in zip(routed, again, strict=True))
        ids = routed.topk_ids.clone()
        ids[:, 2] = -1
        ids[4] = -1
        fewer = turnout.route_chosen(logits, ids, **options)
        two = turnout.route_chosen(logits, ids[:, :2].clamp_min(0), **options).topk_weights
        sent = torch.arange(9) != 4
        assert_close(fewer.topk_weights[sent, :2], two[sent], terms=4)
        assert not fewer.topk_weights[:, 2].any() and not fewer.topk_weights[4].any()
        [grad] = torch.autograd.grad(fewer.topk_weights.square().sum(), logits)
        assert grad.isfinite().all() and not grad[4].any()


class TestExpertChoice:
    def test_each_expert_picks_its_best_tokens(self) -> None:
        logits = torch.randn(12, 3)
        scores = logits.softmax(-1)
        for group, capacity in ((12, 4), (6, 2), (12, 12), (12, 1)):
            (ids, weights, _), plan = turnout.route_expert_choice(logits, capacity, group)
            for first in range(0, 12, group):
                for e in range(3):
                    column = scores[first : first + group, e]
                    best = set(column.argsort(descending=True)[:capacity].tolist())
                    assert {t for t in range(group) if ids[first + t, e] == e} == best
            assert torch.equal(weights, torch.where(ids >= 0, scores, 0))
            assert plan.tokens_per_expert.tolist() == [capacity * 12 // group] * 3
            assert plan.token_of_row.shape == (3 * capacity * 12 // group,) and int(plan.token_of_row.min()) >= 0

    def test_ties_nan_and_padding(self) -> None:
        ids = turnout.route_expert_choice(torch.zeros(5, 2), 2).routing.topk_ids
        assert ids[:, 1].tolist() == [1, 1, -1, -1, -1]
        broken = torch.zeros(5, 2)
        broken[0] = float("nan")
        mask = torch.tensor([True, False, True, True, True])
        ids = turnout.route_expert_choice(broken, 2, token_mask=mask).routing.topk_ids
        assert ids[:, 0].tolist() == [-1, -1, 0, 0, -1]
        routing, plan = turnout.route_expert_choice(broken, 5, token_mask=mask)
        assert routing.topk_ids[:, 0].tolist() == [0, -1, 0, 0, 0]
        assert plan.token_of_row.tolist() == [0, 2, 3, 4, 0, 2, 3, 4, -1, -1]

    def test_many_tokens(self) -> None:
        logits = torch.randn(1000, 4)
        ids = turnout.route_expert_choice(logits, 300).routing.topk_ids
        picked = logits.softmax(-1).topk(300, dim=0).indices
        assert all(set((ids[:, e] == e).nonzero()[:, 0].tolist()) == set(picked[:, e].tolist()) for e in range(4))

    def test_experts_run_on_its_plan(self) -> None:
        x = torch.randn(8, 3, dtype=torch.float64)
        logits = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
        up, down = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
        (ids, weights, scores), plan = turnout.route_expert_choice(logits, 3)
        rows = turnout.dispatch(x, plan)
        made = torch.cat(
            [(part @ u.T).clamp_min(0) @ d.T for part, u, d in zip(rows.split([3, 3]), up, down, strict=True)]
        )
        y = turnout.combine(made, weights, plan)
        expected = sum(
            (scores[:, e] * (ids[:, e] == e)).unsqueeze(1) * ((x @ up[e].T).clamp_min(0) @ down[e].T) for e in range(2)
        )
        assert_close(y, expected, terms=16)
        assert torch.autograd.gradcheck(lambda s: turnout.route_expert_choice(s, 3).routing.topk_weights, [logits])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fused_experts_take_its_plan(self, dtype) -> None:
        x, up, down = torch.randn(8, 4).to(dtype), torch.randn(3, 6, 4).to(dtype), torch.randn(3, 4, 6).to(dtype)
        (ids, weights, _), plan = turnout.route_expert_choice(torch.randn(8, 3), 4)
        tensors = [t.requires_grad_() for t in (x, weights.clone(), up, down)]
        short = torch.ops.turnout.experts(*tensors[:2], *plan, [up], [down], [], [], "gelu")
        whole = turnout.fused_experts(tensors[0], ids, tensors[1], up, down, "gelu")
        assert torch.equal(short, whole)
        for a, b in zip(
            torch.autograd.grad(short.sum(), tensors), torch.autograd.grad(whole.sum(), tensors), strict=True
        ):
            assert torch.equal(a, b)

    def test_no_tokens(self) -> None:
        routing, plan = turnout.route_expert_choice(torch.zeros(0, 3), 2)
        assert routing.topk_ids.shape == (0, 3) and plan.tokens_per_expert.tolist() == [0, 0, 0]


class TestSinkhorn:
    @staticmethod
    def megatron(logits: torch.Tensor, tolerance: float = 1e-4) -> torch.Tensor:
        """The algorithm of Megatron-LM's moe_utils: alternate scaling of rows and columns, small epsilon in both."""
        cost = torch.exp(logits.float())
        rows, columns = torch.ones(cost.shape[0]), torch.ones(cost.shape[1])
        before, error = columns, 1e9
        while error > tolerance:
            rows = (1 / rows.shape[0]) * 1 / (torch.sum(columns * cost, 1) + 1e-8)
            columns = (1 / columns.shape[0]) * 1 / (torch.sum(rows.unsqueeze(1) * cost, 0) + 1e-8)
            error = torch.mean(torch.abs(before - columns))
            before = columns
        return columns * cost * rows.unsqueeze(1)

    @pytest.mark.parametrize("scale", [1.0, 4.0])
    def test_against_the_algorithm(self, scale) -> None:
        logits = torch.randn(64, EXPERTS) * scale
        ours = turnout.sinkhorn(logits)
        assert_close(ours, self.megatron(logits), terms=64)
        assert torch.allclose(ours.sum(0), torch.full((EXPERTS,), 1 / EXPERTS), rtol=1e-3)

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_routes(self, top_k) -> None:
        logits = torch.randn(64, EXPERTS, requires_grad=True)
        ids, weights, scores = turnout.route_sinkhorn(logits, top_k)
        assert torch.equal(ids, self.megatron(logits.detach()).topk(top_k).indices)
        activated = logits.sigmoid() if top_k == 1 else logits.softmax(-1)
        assert_close(weights, activated.gather(1, ids), terms=2)
        assert torch.equal(turnout.route_sinkhorn(logits, top_k, balanced=False).topk_ids, logits.topk(top_k).indices)

    def test_extremes(self) -> None:
        logits = torch.randn(8, 4) + 1000
        logits[2] = float("nan")
        ours = turnout.sinkhorn(logits)
        assert ours.isfinite().all() and not ours[2].any()
        assert torch.allclose(ours.sum(0), torch.full((4,), 1 / 4), rtol=1e-3)
        assert torch.equal(turnout.sinkhorn(torch.zeros(0, 4)), torch.zeros(0, 4))
        assert turnout.route_sinkhorn(logits, 2).topk_ids[2].tolist() == [0, 1]


class TestHash:
    def test_is_a_fixed_table(self) -> None:
        tokens = torch.arange(1000).view(10, 100)
        ids = turnout.hash_ids(tokens, 8, 2, seed=5)
        assert ids.shape == (1000, 2) and int(ids.min()) == 0 and int(ids.max()) == 7
        assert (ids[:, 0] != ids[:, 1]).all()
        assert torch.equal(turnout.hash_ids(tokens.flatten()[::3].int(), 8, 2, seed=5), ids[::3])
        assert not torch.equal(turnout.hash_ids(tokens, 8, 2, seed=6), ids)

    def test_loads_evenly(self) -> None:
        counts = turnout.expert_counts(turnout.hash_ids(torch.arange(32000), 8, 2), 8)
        # a binomial count deviates by √(32000 · 1/4 · 3/4) = 77; five times that is seen once in a million
        assert (counts - 8000).abs().max() < 5 * 78

    def test_stays_as_published(self) -> None:
        assert turnout.hash_ids(torch.tensor([0, 1, 2, 50256, -1]), 64, 2).tolist() == PUBLISHED


PUBLISHED = [[59, 37], [29, 12], [40, 47], [1, 57], [46, 34]]


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_compile_whole(dynamic) -> None:
    def call(logits, raw, noise, words):
        noisy = turnout.noisy_logits(logits, raw, noise=noise)
        routing, plan = turnout.route_expert_choice(noisy.logits, 3)
        chosen = turnout.route_chosen(logits, turnout.hash_ids(words, EXPERTS, 2))
        even = turnout.route_sinkhorn(logits, 2)
        stats = turnout.routing_statistics(routing, plan, torch.ones((), dtype=torch.int64))
        load = turnout.cv_squared(turnout.noisy_load(logits, noisy, 2))
        loss = turnout.balance_loss_of_sums(turnout.balance_sums(even.scores, even.topk_ids), None)
        counts = turnout.expert_counts(chosen.topk_ids, EXPERTS)
        step = turnout.update_selection_bias(torch.zeros(EXPERTS), counts, 0.1)
        return (*routing, *plan, *chosen, *even, *stats, load + loss, step)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 20):
        inputs = (*torch.randn(3, tokens, EXPERTS), torch.arange(tokens))
        for actual, expected in zip(compiled(*inputs), call(*inputs), strict=True):
            assert torch.equal(actual, expected)
