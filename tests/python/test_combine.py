"""dispatch and combine: the round trip, exact sums, types, NaN, strides."""

import pytest
import torch
import turnout
from naive import mixture

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def case(tokens=20, top_k=3, experts=5):
    ids = torch.randint(-1, experts, (tokens, top_k))
    return ids, turnout.plan(ids, experts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact_for_small_integers(dtype) -> None:
    """Weights and values are small integers, so that every type gives the exact sum."""
    ids, plan = case()
    x = torch.randint(-4, 5, (20, 6)).to(dtype)
    weights = torch.randint(0, 4, (20, 3)).to(dtype)
    rows = turnout.dispatch(x, plan)
    assert rows.dtype == dtype
    live = int(plan.expert_offsets[-1])
    assert torch.equal(rows[:live], x[plan.token_of_row[:live]]) and not rows[live:].any()
    expected = mixture(x.double(), ids, weights.double(), [lambda r: r] * 5).to(dtype)
    assert torch.equal(turnout.combine(rows, weights, plan), expected)
    assert torch.equal(turnout.combine(rows, weights.float(), plan), expected)


def test_bfloat16_accumulates_in_float32() -> None:
    """256 + 1 - 256 is 0 in bfloat16 (8 bits), 1 in float32."""
    plan = turnout.plan(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[256.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    assert turnout.combine(rows, torch.ones(1, 3), plan).tolist() == [[1.0]]


def test_nan_token_harms_only_itself() -> None:
    ids = torch.tensor([[0, 1], [1, -1], [0, 1]])
    plan = turnout.plan(ids, 2)
    x = torch.ones(3, 2)
    x[0] = float("nan")
    y = turnout.combine(turnout.dispatch(x, plan), torch.ones(3, 2), plan)
    assert y[0].isnan().all() and y[1].tolist() == [1, 1] and y[2].tolist() == [2, 2]
    x.requires_grad_()
    turnout.combine(turnout.dispatch(x, plan), torch.ones(3, 2), plan)[1:].sum().backward()
    assert x.grad.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_strides() -> None:
    _, plan = case()
    x = torch.randn(6, 20).t()
    assert torch.equal(turnout.dispatch(x, plan), turnout.dispatch(x.contiguous(), plan))
    rows, weights = torch.randn(6, 60).t(), torch.randn(3, 20).t()
    assert torch.equal(
        turnout.combine(rows, weights, plan), turnout.combine(rows.contiguous(), weights.contiguous(), plan)
    )


def test_no_tokens() -> None:
    plan = turnout.plan(torch.zeros(0, 2, dtype=torch.int64), 3)
    x = torch.zeros(0, 4, requires_grad=True)
    y = turnout.combine(turnout.dispatch(x, plan), torch.zeros(0, 2), plan)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 4)
