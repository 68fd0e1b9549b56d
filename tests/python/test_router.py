"""topk, route and route_top2: hand-worked cases, the naive formula, ties, NaN."""

import math

import pytest
import torch
import turnout
from naive import assert_close

NAN = float("nan")


def test_topk_takes_the_lower_id_of_equals() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
    assert turnout.topk(scores, 2).tolist() == [[0, 1], [1, 3]]
    assert turnout.topk(scores, 5).tolist() == [[0, 1, 2, 3, 4], [1, 3, 5, 2, 4]]


def test_topk_of_nan_and_inf_stays_in_range() -> None:
    scores = torch.tensor([[NAN, NAN, NAN], [math.inf, -math.inf, 0.0], [0.0, NAN, 1.0]])
    assert turnout.topk(scores, 3).tolist() == [[0, 1, 2], [0, 2, 1], [1, 2, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_equals_sorting(dtype) -> None:
    scores = torch.randn(3, 50, 9).to(dtype)
    order = scores.double().sort(stable=True, descending=True).indices
    for k in (1, 4, 9):
        assert torch.equal(turnout.topk(scores, k), order[..., :k])


def test_route_by_hand() -> None:
    """Probabilities 1/8, 1/2, 1/4, 1/8."""
    logits = torch.tensor([[1.0, 4.0, 2.0, 1.0]], dtype=torch.float64).log()
    ids, weights, scores = turnout.route(logits, 2)
    assert ids.tolist() == [[1, 2]]
    assert_close(scores, torch.tensor([[0.125, 0.5, 0.25, 0.125]], dtype=torch.float64), terms=4)
    assert_close(weights, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64), terms=4)
    assert_close(turnout.route(logits, 2, "probability").topk_weights, weights * 0.75, terms=4)
    assert_close(turnout.route(logits, 2, "softmax_of_topk").topk_weights, weights, terms=4)
    assert_close(turnout.route(logits, 2, epsilon=0.25).topk_weights, weights * 0.75, terms=4)


@pytest.mark.parametrize("weights", ["normalized", "probability", "softmax_of_topk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_route_is_softmax_in_float32(dtype, weights) -> None:
    logits = torch.randn(40, 8).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids, got, scores = turnout.route(logits, 3, weights)
    assert_close(scores, logits.to(wide).softmax(-1), terms=8)
    chosen = logits.to(wide).gather(1, ids)
    sums = scores.gather(1, ids).sum(-1, keepdim=True)
    expected = chosen.softmax(-1) * (sums if weights == "probability" else 1)
    assert_close(got, expected, terms=16)


def test_one_choice_has_the_constant_weight_one_or_the_probability() -> None:
    logits = torch.randn(5, 4, requires_grad=True)
    assert torch.equal(turnout.route(logits, 1).topk_weights, torch.ones(5, 1))
    assert torch.equal(turnout.route(logits, 1, "softmax_of_topk").topk_weights, torch.ones(5, 1))
    routing = turnout.route(logits, 1, "probability")
    assert torch.equal(routing.topk_weights[:, 0], routing.scores.amax(-1))


def test_nan_token_harms_only_itself() -> None:
    logits = torch.randn(6, 5)
    broken = logits.clone()
    broken[2] = NAN
    others = [0, 1, 3, 4, 5]
    for expected, actual in zip(turnout.route(logits, 2), turnout.route(broken, 2), strict=True):
        assert torch.equal(expected[others], actual[others])
    assert turnout.route(broken, 2).topk_ids[2].tolist() == [0, 1]


def test_no_tokens_and_all_experts() -> None:
    assert [tuple(t.shape) for t in turnout.route(torch.randn(0, 4), 2)] == [(0, 2), (0, 2), (0, 4)]
    routing = turnout.route(torch.randn(3, 4), 4)
    assert torch.equal(routing.topk_ids.sort(-1).values, torch.arange(4).expand(3, 4))
    assert turnout.route(torch.randn(3, 1), 1).topk_ids.tolist() == [[0]] * 3


class TestTop2:
    gates = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]], dtype=torch.float64)

    def route(self, policy="all", **more):
        return turnout.route_top2(self.gates.log(), policy, **more)

    def test_weights_and_loss(self) -> None:
        routing = self.route()
        assert routing.topk_ids.tolist() == [[[0, 1], [1, 2]]]
        expected = torch.tensor([[[0.5 / 0.8, 0.3 / 0.8], [0.6 / 0.9, 0.3 / 0.9]]], dtype=torch.float64)
        torch.testing.assert_close(routing.topk_weights, expected, rtol=0, atol=3e-9)  # eps = 1e-9 in the sum
        # density 1/2, 1/2, 0; proxy 0.3, 0.45, 0.25: mean of 3 products times 9
        assert float(routing.balance_loss) == pytest.approx((0.5 * 0.3 + 0.5 * 0.45) / 3 * 9, rel=1e-14)

    def test_policies(self) -> None:
        assert self.route("none").topk_ids.tolist() == [[[0, -1], [1, -1]]]
        assert self.route("none").topk_weights[0, 0].tolist() == [pytest.approx(0.625, rel=1e-8), 0.0]
        assert self.route("threshold", threshold=0.35).topk_ids.tolist() == [[[0, 1], [1, -1]]]
        # kept where u < gate_2 / threshold: 0.375 / 0.5 = 0.75 and 0.333 / 0.5 = 0.667
        uniform = torch.tensor([[0.7, 0.7]], dtype=torch.float64)
        assert self.route("random", threshold=0.5, uniform=uniform).topk_ids.tolist() == [[[0, 1], [1, -1]]]

    def test_random_draws_from_the_generator(self) -> None:
        logits = torch.randn(4, 64, 8)
        torch.manual_seed(1)
        drawn = turnout.route_top2(logits, "random", 0.9)
        torch.manual_seed(1)
        given = turnout.route_top2(logits, "random", 0.9, uniform=torch.zeros(4, 64).uniform_(0.0, 1.0))
        assert torch.equal(drawn.topk_ids, given.topk_ids)
        assert 0 < int((drawn.topk_ids[..., 1] < 0).sum()) < 256

    def test_importance(self) -> None:
        gates = self.gates.log().expand(1, 2, 3)[:, [0, 0, 0]]
        routing = turnout.route_top2(gates, "all", importance=torch.tensor([[1.0, 0.5, 0.0]]))
        assert routing.topk_ids.tolist() == [[[0, 1], [-1, 0], [-1, -1]]]
        assert routing.topk_weights[0, 1].tolist() == [0.0, pytest.approx(1.0, abs=1e-8)]
        assert routing.topk_weights[0, 2].tolist() == [0.0, 0.0]
        # the mean runs over all three slots: density 1/3, proxy 0.5 / 3
        assert float(routing.balance_loss) == pytest.approx(1 / 3 * 0.5 / 3 / 3 * 9, rel=1e-14)

    def test_no_tokens(self) -> None:
        routing = turnout.route_top2(torch.randn(2, 0, 4), "all")
        assert routing.topk_ids.shape == (2, 0, 2)
        assert float(routing.balance_loss) == 0
