"""st-moe-pytorch as the oracle: top-n gating, capacity of each sequence, places, both losses."""

import pytest
import torch
import turnout
from naive import assert_close

EXPERTS, DIM, LENGTH, SEQUENCES = 5, 8, 16, 3

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecations inside the package


def both(top_n: int, factor: float):
    """Their gating, every choice routed, and ours on the same logits."""
    from st_moe_pytorch.st_moe_pytorch import TopNGating

    gate = TopNGating(dim=DIM, num_gates=EXPERTS, top_n=top_n, threshold_train=0.0, capacity_factor_train=factor)
    x = torch.randn(SEQUENCES, LENGTH, DIM)
    logits = gate.to_gates(x).reshape(-1, EXPERTS)
    places = turnout.expert_capacity(
        LENGTH, top_n, EXPERTS, factor=factor, rounding="floor", count_choices=False, minimum=4
    )
    return gate(x), turnout.route(logits, top_n), logits, places


@pytest.mark.parametrize("factor", [1.0, 1.25, 5.0])
@pytest.mark.parametrize("top_n", [2, 3])
def test_places_and_weights(top_n, factor) -> None:
    (_, combine, _, _), routing, _, places = both(top_n, factor)
    ours = turnout.dispatch_tensors(routing.topk_ids, routing.topk_weights, EXPERTS, places, LENGTH).combine
    assert_close(ours.view(SEQUENCES, LENGTH, EXPERTS, places), combine, terms=2)
    capped = turnout.limit_capacity(routing.topk_ids, routing.topk_weights, EXPERTS, places, LENGTH)
    assert int(capped.dropped) == routing.topk_ids.numel() - int((combine > 0).sum())
    assert (int(capped.dropped) > 0) == (factor < 5)


def test_losses() -> None:
    (_, _, balance, z), routing, logits, _ = both(2, 5.0)  # their balance loss counts what capacity left
    assert_close(turnout.balance_loss(routing.scores, routing.topk_ids, "first_choice", LENGTH), balance, terms=LENGTH)
    assert_close(turnout.z_loss(logits), z, terms=LENGTH)
