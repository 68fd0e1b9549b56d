"""Losses against transformers and the papers' formulas; masks, ranks, the selection bias, statistics."""

from __future__ import annotations

import math

import pytest
import torch
import turnout
from naive import assert_close

TOKENS, EXPERTS, TOP_K = 40, 6, 2


def route(logits: torch.Tensor, top_k: int = TOP_K) -> turnout.Routing:
    return turnout.route(logits, top_k)


class TestHuggingFace:
    @pytest.mark.parametrize("masked", [False, True])
    def test_pooled_over_layers(self, masked) -> None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        layers = [torch.randn(TOKENS, EXPERTS, requires_grad=True) for _ in range(3)]
        mask = torch.rand(4, TOKENS // 4) > 0.3 if masked else None
        theirs = load_balancing_loss_func(tuple(layers), EXPERTS, TOP_K, None if mask is None else mask.int())
        flat = mask if mask is None else mask.flatten()
        routings = [route(logits) for logits in layers]
        sums = [turnout.balance_sums(r.scores, r.topk_ids, "per_token", token_mask=flat) for r in routings]
        ours = turnout.balance_loss_of_sums(sum(sums))
        assert_close(ours, theirs, terms=TOKENS)
        for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
            assert_close(a, b, terms=TOKENS)

    def test_switch(self) -> None:
        from transformers.models.switch_transformers import modeling_switch_transformers as switch

        logits = torch.randn(4, TOKENS // 4, EXPERTS)
        scores = logits.softmax(-1)
        theirs = switch.load_balancing_loss_func(scores, scores.argmax(-1))
        routing = route(logits.view(-1, EXPERTS), 1)
        ours = turnout.balance_loss(routing.scores, routing.topk_ids, "first_choice", TOKENS // 4)
        assert_close(ours, theirs, terms=TOKENS)
        assert_close(turnout.z_loss(logits.view(-1, EXPERTS)), switch.router_z_loss_func(logits), terms=TOKENS)


def test_sequence_wise_loss_of_deepseek() -> None:
    """arXiv:2412.19437, equations 17 to 20, with sigmoid scores normalised by their sum."""
    length, sequences = 10, 4
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64)
    routing = turnout.route(logits, TOP_K, score="sigmoid")
    losses = []
    for s in range(sequences):
        rows = range(s * length, (s + 1) * length)
        total = 0.0
        for e in range(EXPERTS):
            f = EXPERTS / (TOP_K * length) * sum(int((routing.topk_ids[t] == e).any()) for t in rows)
            total += f * sum(float(logits[t].sigmoid()[e] / logits[t].sigmoid().sum()) for t in rows) / length
        losses.append(total)
    ours = turnout.balance_loss(routing.scores, routing.topk_ids, group_size=length)
    assert float(ours) == pytest.approx(sum(losses) / sequences, rel=1e-12)


class TestMask:
    def test_padding_counts_nowhere(self) -> None:
        logits = torch.randn(TOKENS, EXPERTS)
        logits[5:9] = float("nan")
        mask = torch.ones(TOKENS, dtype=torch.bool)
        mask[5:9] = False
        logits.requires_grad_()
        kept = logits[mask]
        for count in ("per_assignment", "per_token", "first_choice"):
            ours = turnout.balance_loss(route(logits).scores, route(logits).topk_ids, count, token_mask=mask)
            assert_close(ours, turnout.balance_loss(route(kept).scores, route(kept).topk_ids, count), terms=TOKENS)
        assert_close(turnout.z_loss(logits, token_mask=mask), turnout.z_loss(kept), terms=TOKENS)

    def test_gradient_does_not_reach_padding(self) -> None:
        scores = torch.rand(TOKENS, EXPERTS, requires_grad=True)
        mask = torch.arange(TOKENS) % 3 > 0
        turnout.balance_loss(scores, route(scores).topk_ids, token_mask=mask).backward()
        assert not scores.grad[~mask].any() and scores.grad[mask].any()

    def test_groups_of_padding_alone_are_left_out(self) -> None:
        routing = route(torch.randn(TOKENS, EXPERTS))
        mask = torch.arange(TOKENS) < 20  # of four sequences two are padding
        whole = turnout.balance_loss(routing.scores, routing.topk_ids, "first_choice", 10, token_mask=mask)
        real = turnout.balance_loss(routing.scores[:20], routing.topk_ids[:20], "first_choice", 10)
        assert_close(whole, real, terms=TOKENS)
        nothing = torch.zeros(TOKENS, dtype=torch.bool)
        assert float(turnout.balance_loss(routing.scores, routing.topk_ids, token_mask=nothing)) == 0
        assert float(turnout.z_loss(routing.scores, token_mask=nothing)) == 0

    def test_routing_sends_padding_nowhere(self) -> None:
        logits = torch.randn(TOKENS, EXPERTS)
        mask = torch.arange(TOKENS) % 2 > 0
        masked, free = turnout.route(logits, 2, token_mask=mask), turnout.route(logits, 2)
        assert torch.equal(masked.topk_ids[mask], free.topk_ids[mask]) and (masked.topk_ids[~mask] == -1).all()
        assert torch.equal(masked.topk_weights[mask], free.topk_weights[mask]) and not masked.topk_weights[~mask].any()
        assert torch.equal(masked.scores, free.scores)


class Ranks:
    """Ranks of a job, played in turn: each one's sum is that of all, known beforehand."""

    def __init__(self, parts) -> None:
        self.total = sum(turnout.balance_sums(*part, "per_token").detach() for part in parts)

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        assert not own.requires_grad
        return self.total


@pytest.mark.parametrize("sizes", [[20, 20], [8, 24, 8]])
def test_loss_of_all_ranks_does_not_depend_on_their_number(sizes) -> None:
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    parts = [tuple(route(part)[i] for i in (2, 0)) for part in logits.split(sizes)]
    reduce = Ranks(parts)
    losses = [turnout.balance_loss(*part, "per_token", sum_over_ranks=reduce) for part in parts]
    whole = turnout.balance_loss(route(logits).scores, route(logits).topk_ids, "per_token")
    for loss in losses:
        assert_close(loss, whole, terms=TOKENS)
    # data-parallel training takes the mean of the ranks' gradients
    [mean] = torch.autograd.grad(sum(losses) / len(sizes), logits)
    [expected] = torch.autograd.grad(whole, logits)
    assert_close(mean, expected, terms=TOKENS)
    with pytest.raises(ValueError, match="group_size is 10, expected 0 with a sum over ranks"):
        turnout.balance_loss(*parts[0], group_size=10, sum_over_ranks=reduce)


@pytest.mark.parametrize("sizes", [[20, 20], [8, 24, 8]])
def test_z_loss_of_all_ranks(sizes) -> None:
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(TOKENS) % 5 > 0
    parts = list(zip(logits.split(sizes), mask.split(sizes), strict=True))
    total = sum(turnout.z_sums(part, token_mask=kept).detach() for part, kept in parts)
    losses = [turnout.z_loss(part, token_mask=kept, sum_over_ranks=lambda _: total) for part, kept in parts]
    whole = turnout.z_loss(logits, token_mask=mask)
    for loss in losses:
        assert_close(loss, whole, terms=TOKENS)
    [mean] = torch.autograd.grad(sum(losses) / len(sizes), logits)
    [expected] = torch.autograd.grad(whole, logits)
    assert_close(mean, expected, terms=TOKENS)
    steps = [turnout.z_sums(part, token_mask=kept) for part, kept in parts]
    assert_close(turnout.z_loss_of_sums(sum(steps)), whole, terms=TOKENS)  # accumulation pools


@pytest.mark.parametrize("loss", ["balance_loss", "z_loss"])
def test_a_sum_over_ranks_that_returns_nothing_is_named(loss) -> None:
    """As torch.distributed.all_reduce, which works in place, does."""
    logits = torch.randn(4, 3)
    arguments = (logits,) if loss == "z_loss" else (logits.softmax(-1), logits.argsort()[:, :2])
    with pytest.raises(TypeError, match=f"turnout.{loss}: sum_over_ranks returned a NoneType, expected the sum"):
        getattr(turnout, loss)(*arguments, sum_over_ranks=lambda own: None)
    with pytest.raises(TypeError, match=f"turnout.{loss}: sum_over_ranks is 2, expected a function"):
        getattr(turnout, loss)(*arguments, sum_over_ranks=2)


def test_accumulation_steps_pool() -> None:
    routing = route(torch.randn(TOKENS, EXPERTS, dtype=torch.float64))
    halves = [turnout.balance_sums(routing.scores[i : i + 20], routing.topk_ids[i : i + 20]) for i in (0, 20)]
    expected = turnout.balance_loss(routing.scores, routing.topk_ids)
    assert_close(turnout.balance_loss_of_sums(halves[0] + halves[1]), expected, terms=TOKENS)


class TestSelectionBias:
    def test_step(self) -> None:
        bias = torch.tensor([0.5, 0.0, -0.5, 0.0], requires_grad=True)
        counts = torch.tensor([1, 4, 9, 2])  # mean 4
        new = turnout.update_selection_bias(bias, counts, 0.125)
        assert new.tolist() == [0.625, 0.0, -0.625, 0.125] and not new.requires_grad
        centred = turnout.update_selection_bias(bias, counts, 0.125, center=True)
        assert centred.tolist() == [0.59375, -0.03125, -0.65625, 0.09375]

    def test_evens_the_load(self) -> None:
        logits = torch.randn(512, 8) + torch.linspace(-1, 1, 8)  # a router that prefers the last experts
        bias = torch.zeros(8)
        before = turnout.expert_counts(turnout.route(logits, 2, score="sigmoid").topk_ids, 8)
        for _ in range(400):
            ids = turnout.route(logits, 2, score="sigmoid", selection_bias=bias).topk_ids
            counts = turnout.expert_counts(ids, 8)
            bias = turnout.update_selection_bias(bias, counts, 1e-3)
        assert int(before.max()) > 2 * 128
        assert int(counts.max()) < 1.1 * 128 and int(counts.sum()) == 1024


def test_counts_and_importance() -> None:
    ids = torch.tensor([[0, 2], [2, -1], [2, 3]])
    assert turnout.expert_counts(ids, 5).tolist() == [1, 0, 3, 1, 0]
    assert turnout.expert_counts(ids[:0], 3).tolist() == [0, 0, 0]
    weights = torch.tensor([[0.5, 0.25], [1.0, 7.0], [0.5, 0.5]])
    assert turnout.expert_importance(ids, weights, 5).tolist() == [0.5, 0.0, 1.75, 0.5, 0.0]


class TestStatistics:
    def test_by_hand(self) -> None:
        scores = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
        ids = torch.tensor([[0, 1], [0, 1], [0, 1]])
        capped = turnout.limit_capacity(ids, torch.ones(3, 2), 4, 2, 3)
        plan = turnout.plan(capped.topk_ids, 4)
        routing = turnout.Routing(ids, torch.ones(3, 2), scores)
        stats = turnout.routing_statistics(routing, plan, capped.dropped)
        assert stats.tokens_per_expert.tolist() == [2, 2, 0, 0]
        assert float(stats.dropped_share) == pytest.approx(2 / 6)
        assert float(stats.max_over_mean) == 2 and int(stats.dead_experts) == 2
        assert float(stats.entropy) == pytest.approx((math.log(2) + 0 + math.log(4)) / 3, rel=1e-6)
        masked = turnout.routing_statistics(routing, plan, token_mask=torch.tensor([True, True, False]))
        assert float(masked.entropy) == pytest.approx(math.log(2) / 2, rel=1e-6) and float(masked.dropped_share) == 0

    def test_no_tokens(self) -> None:
        routing = route(torch.zeros(0, 4))
        stats = turnout.routing_statistics(routing, turnout.plan(routing.topk_ids, 4))
        assert [float(s) for s in stats[1:]] == [0, 0, 0, 4]


class TestCapacity:
    def test_tutel_makes_the_share_whole_first(self) -> None:
        def capacity(tokens, top_k, experts, factor):
            return turnout.expert_capacity(tokens, top_k, experts, factor=factor, rounding="share")

        assert capacity(10, 2, 4, 1.25) == 2 * int(1.25 * 3)
        assert capacity(8, 2, 4, 1.0) == 4
        assert capacity(9, 3, 4, 0.5) == 3 * int(0.5 * 3)
        assert capacity(4, 1, 8, 0.5) == 1  # never below one place
        assert capacity(4, 2, 1, 4.0) == 4  # never above the tokens

    def test_seeded_random_drops_repeat(self) -> None:
        ids, weights = torch.zeros(50, 1, dtype=torch.int64), torch.ones(50, 1)

        def kept(seed):
            numbers = torch.rand(50, 1, generator=torch.Generator().manual_seed(seed))
            return turnout.limit_capacity(ids, weights, 1, 10, 50, "random", priority=numbers).topk_ids

        assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))
        assert int((kept(1) == 0).sum()) == 10
        with pytest.raises(ValueError, match="order 'choice' takes no priority"):
            turnout.limit_capacity(ids, weights, 1, 10, 50, priority=weights)

    def test_renormalise_before_or_after_drops(self) -> None:
        ids = torch.tensor([[0, 1], [0, 1], [1, 0]])
        weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]])
        before = turnout.limit_capacity(ids, weights, 2, 2, 3, "position").topk_weights
        after = turnout.limit_capacity(ids, weights, 2, 2, 3, "position", renormalize=True).topk_weights
        assert before.tolist() == [[0.75, 0.25], [0.5, 0.5], [0.0, 0.0]]
        assert after.tolist() == before.tolist()
        one = turnout.limit_capacity(ids[:, :], weights, 2, 1, 3, "choice", renormalize=True)
        assert one.topk_weights.tolist() == [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]


def test_a_sum_made_in_place_gives_the_same_gradient() -> None:
    """As dist.all_reduce makes it: of two ranks with the same tokens."""

    def gradient(reduce) -> torch.Tensor:
        logits = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(6, 4).requires_grad_()
        routing = turnout.route(logits, 2)
        balance = turnout.balance_loss(routing.scores, routing.topk_ids, sum_over_ranks=reduce)
        (balance + turnout.z_loss(logits, sum_over_ranks=reduce)).backward()
        return logits.grad

    assert torch.equal(gradient(lambda own: own.mul_(2)), gradient(lambda own: own * 2))
