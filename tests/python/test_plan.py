"""plan, queue_positions, limit_capacity, expert_capacity and slots: hand-worked cases and loops."""

import pytest
import torch
import turnout

T = torch.tensor


def test_plan_by_hand() -> None:
    """Expert 1 gets nothing, a choice is not sent, rows keep the order of tokens."""
    for dtype in (torch.int64, torch.int32):
        plan = turnout.plan(T([[2, 0], [0, -1], [2, 0]], dtype=dtype), 3)
        assert plan.num_experts == 3
        assert plan.expert_offsets.tolist() == [0, 3, 3, 5]
        assert plan.tokens_per_expert.tolist() == [3, 0, 2]
        assert plan.token_of_row.tolist() == [0, 1, 2, 0, 2, -1]
        assert plan.row_of_choice.tolist() == [[3, 0], [1, -1], [4, 2]]


def test_plan_of_little() -> None:
    assert turnout.plan(T([[0]]), 1).token_of_row.tolist() == [0]
    assert turnout.plan(T([[-1, -1]]), 2).expert_offsets.tolist() == [0, 0, 0]
    empty = turnout.plan(torch.zeros(0, 2, dtype=torch.int64), 4)
    assert empty.expert_offsets.tolist() == [0] * 5 and empty.token_of_row.shape == (0,)
    assert turnout.plan(T([[3], [3], [3]]), 4).expert_offsets.tolist() == [0, 0, 0, 0, 3]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (7, 3, 5), (100, 2, 64), (1000, 8, 8)])
def test_plan_is_a_permutation_grouped_and_stable(tokens, top_k, experts) -> None:
    ids = torch.randint(-1, experts, (tokens, top_k))
    plan = turnout.plan(ids, experts)
    rows = [(e, t, k) for t in range(tokens) for k, e in enumerate(ids[t].tolist()) if e >= 0]
    rows.sort(key=lambda row: row[0])  # stable: by expert, then token, then choice
    assert plan.token_of_row.tolist() == [t for _, t, _ in rows] + [-1] * (tokens * top_k - len(rows))
    expected = torch.full((tokens, top_k), -1)
    for row, (_, t, k) in enumerate(rows):
        expected[t, k] = row
    assert torch.equal(plan.row_of_choice, expected)
    counts = torch.bincount(ids[ids >= 0], minlength=experts)
    assert torch.equal(plan.tokens_per_expert, counts)


def test_queue_positions_by_hand() -> None:
    ids = T([[0, 1], [1, 0], [0, -1], [0, 1]])
    queue = turnout.queue_positions
    # expert 0: first choices of tokens 0, 2, 3, then the second of 1; expert 1: first of 1, then seconds of 0, 3
    assert queue(ids, 2, 4).tolist() == [[0, 1], [0, 3], [1, -1], [2, 2]]
    assert queue(ids, 2, 4, "position").tolist() == [[0, 0], [1, 1], [2, -1], [3, 2]]
    assert queue(ids, 2, 2).tolist() == [[0, 1], [0, 1], [0, -1], [1, 0]]
    priority = T([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    assert queue(ids, 2, 4, "score", priority).tolist() == [[3, 0], [2, 0], [2, -1], [1, 1]]
    assert queue(ids, 2, 4, "score", torch.ones(4, 2)).tolist() == queue(ids, 2, 4, "position").tolist()


def test_limit_capacity_by_hand() -> None:
    ids = T([[0, 1], [0, 1], [0, 1]])
    weights = T([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    capped = turnout.limit_capacity(ids, weights, 2, 2, 3)
    assert capped.topk_ids.tolist() == [[0, 1], [0, 1], [-1, -1]]
    assert capped.topk_weights.tolist() == [[0.75, 0.25], [0.5, 0.5], [0.0, 0.0]]
    assert int(capped.dropped) == 2
    by_score = turnout.limit_capacity(ids, weights, 2, 1, 3, "score", renormalize=True)
    assert by_score.topk_ids.tolist() == [[0, -1], [-1, -1], [-1, 1]]
    assert by_score.topk_weights.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    assert int(by_score.dropped) == 4


def test_first_choices_go_before_second_ones() -> None:
    ids, weights = T([[1, 0], [0, 1]]), torch.full((2, 2), 0.5)
    assert turnout.limit_capacity(ids, weights, 2, 1, 2, "choice").topk_ids.tolist() == [[1, -1], [0, -1]]
    assert turnout.limit_capacity(ids, weights, 2, 1, 2, "position").topk_ids.tolist() == [[1, 0], [-1, -1]]


def test_choices_not_sent_are_not_counted_as_dropped() -> None:
    capped = turnout.limit_capacity(T([[-1, 0], [-1, 0]]), torch.ones(2, 2), 2, 1, 2)
    assert int(capped.dropped) == 1
    assert capped.topk_weights.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_random_order_follows_the_generator() -> None:
    ids, weights = torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1)
    kept = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        kept.append(turnout.limit_capacity(ids, weights, 1, 8, 64, "random").topk_ids)
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert all(int((k >= 0).sum()) == 8 for k in kept)


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, 10),  # dropless: an expert may get every token
        ({"factor": 1.0}, 5),  # 10 · 2 / 4
        ({"factor": 1.1}, 6),  # ceil(5.5)
        ({"factor": 1.1, "rounding": "floor"}, 5),
        ({"factor": 1.1, "count_choices": False}, 3),  # ceil(2.75)
        ({"factor": 0.1, "minimum": 4}, 4),
        ({"factor": 100.0}, 10),
        ({"factor": 1.0, "fixed": 7}, 7),
        ({"factor": 1e-9, "rounding": "floor"}, 1),
    ],
)
def test_expert_capacity(options, places) -> None:
    assert turnout.expert_capacity(10, 2, 4, **options) == places


def test_slots_by_hand() -> None:
    """Two groups of two tokens, two places an expert; expert 1 is empty in the second group."""
    ids = T([[0, 1], [0, -1], [0, -1], [-1, 0]])
    plan = turnout.slot_plan(ids, 2, 2, 2)
    assert plan.expert_offsets.tolist() == [0, 4, 8]
    assert plan.token_of_row.tolist() == [0, 1, 2, 3, 0, -1, -1, -1]
    assert plan.row_of_choice.tolist() == [[0, 4], [1, -1], [2, -1], [-1, 3]]
    x = torch.arange(1.0, 5.0).view(4, 1)
    assert turnout.dispatch(x, plan).flatten().tolist() == [1, 2, 3, 4, 1, 0, 0, 0]
    weights = T([[0.75, 0.25], [0.5, 0.0], [0.25, 0.0], [0.0, 1.0]])
    assert turnout.slot_importance(weights, plan).tolist() == [1.0, 0.5, 0.5, 1.0, 0.5, 0, 0, 0]
    tensors = turnout.dispatch_tensors(ids, weights, 2, 2, 2)
    expected = torch.zeros(4, 2, 2)
    expected[0, 0, 0], expected[0, 1, 0], expected[1, 0, 1] = 0.75, 0.25, 0.5
    expected[2, 0, 0], expected[3, 0, 1] = 0.25, 1.0
    assert torch.equal(tensors.combine, expected) and torch.equal(tensors.dispatch, (expected > 0).float())


def test_slots_behind_the_capacity_get_no_place() -> None:
    plan = turnout.slot_plan(T([[0], [0], [0]]), 1, 2, 3)
    assert plan.row_of_choice.tolist() == [[0], [1], [-1]]
    assert plan.token_of_row.tolist() == [0, 1]


def test_nested_ids() -> None:
    assert turnout.nested_ids(T([[0, 2], [-1, 1], [2, -1], [0, 0]]), 2, 3).tolist() == [[0, 2], [-1, 1], [5, -1], [3, 3]]
