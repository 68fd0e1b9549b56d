"""Balancing losses: by hand, balanced values, groups, and that dropped choices count nowhere."""

import pytest
import torch
import turnout
from naive import assert_close

COUNTS = ("per_assignment", "per_token", "first_choice")


def naive(scores: torch.Tensor, ids: torch.Tensor, count: str, group: int) -> torch.Tensor:
    losses = []
    for first in range(0, scores.shape[0], group):
        p, chosen = scores[first : first + group], ids[first : first + group]
        total = scores.new_zeros(())
        for e in range(scores.shape[1]):
            hits = (chosen[:, :1] if count == "first_choice" else chosen) == e
            load = hits.double().sum() / (group if count != "per_assignment" else group * ids.shape[1])
            total = total + load * p[:, e].mean()
        losses.append(total * scores.shape[1])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("group", [0, 3, 12])
@pytest.mark.parametrize("count", COUNTS)
def test_formula(count, group) -> None:
    scores = torch.randn(12, 5, dtype=torch.float64).softmax(-1)
    ids = turnout.topk(scores, 2)
    ids[4, 1] = ids[7, 0] = -1
    expected = naive(scores, ids, count, group or 12)
    assert_close(turnout.balance_loss(scores, ids, count, group), expected, terms=60)
    assert_close(turnout.balance_loss(scores, ids.int(), count, group), expected, terms=60)


@pytest.mark.parametrize(("count", "value"), [("per_assignment", 1.0), ("per_token", 2.0), ("first_choice", 1.0)])
def test_balanced_value(count, value) -> None:
    scores = torch.full((4, 4), 0.25)
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    assert float(turnout.balance_loss(scores, ids, count)) == value


def test_all_to_one_is_the_number_of_experts() -> None:
    scores = torch.eye(4)[[2, 2, 2]]
    assert float(turnout.balance_loss(scores, torch.full((3, 1), 2))) == 4.0


def test_no_tokens_is_zero_with_gradient() -> None:
    scores = torch.zeros(0, 4, requires_grad=True)
    loss = turnout.balance_loss(scores, torch.zeros(0, 2, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0 and scores.grad.shape == (0, 4)
    assert float(turnout.z_loss(torch.zeros(0, 4))) == 0


def test_z_loss() -> None:
    assert float(turnout.z_loss(torch.zeros(3, 4, dtype=torch.float64))) == pytest.approx(
        torch.tensor(4.0, dtype=torch.float64).log().square().item(), rel=1e-14
    )
    logits = torch.randn(7, 5, dtype=torch.float64)
    assert_close(turnout.z_loss(logits), logits.exp().sum(-1).log().square().mean(), terms=12)
