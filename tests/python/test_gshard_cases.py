"""Top2Gating, MoE and HeirarchicalMoE on hand-worked cases, and where they must be better than their source."""

import math

import pytest
import torch
from naive import assert_close
from torch import nn

from turnout.compat import Experts, HierarchicalMoE, MoE, Top2Gating

DIM = 4


def gate_of(gates: torch.Tensor, **how) -> tuple[Top2Gating, torch.Tensor]:
    """A gate and tokens with the given probabilities [n, e]: the tokens are the unit vectors."""
    gate = Top2Gating(gates.shape[0], gates.shape[1], **how)
    gate.w_gating.data.copy_(gates.log())
    return gate, torch.eye(gates.shape[0])[None]


def test_capacity_full_first_choices_before_second() -> None:
    """Six tokens prefer expert 0 to expert 1, two the reverse; max(4, ⌊8 · 1 / 4⌋) = 4 places."""
    gates = torch.tensor([[0.6, 0.3, 0.05, 0.05]] * 6 + [[0.3, 0.6, 0.05, 0.05]] * 2)
    gate, x = gate_of(gates, second_policy_train="all", capacity_factor_train=1.0)
    dispatch, combine, _ = gate(x)
    assert combine.shape == (1, 8, 4, 4)
    # expert 0: first choices of tokens 0..3; 4 and 5 find no place, nor do the second choices of 6 and 7
    assert dispatch[0, :, 0].argmax(-1)[:4].tolist() == [0, 1, 2, 3]
    assert dispatch[0, :, 0].sum(-1).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    # expert 1: first choices of 6 and 7, then the second choices of 0 and 1
    assert dispatch[0, :, 1].sum(-1).tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert dispatch[0, [6, 7, 0, 1], 1].argmax(-1).tolist() == [0, 1, 2, 3]
    assert int(gate.route(x).dropped) == 2 + 2 + 4
    # weights are g / (g1 + g2), not given to the other choice when one is dropped
    assert combine[0, 2].sum().item() == pytest.approx(2 / 3, abs=1e-6)
    assert combine[0, 4].sum().item() == 0


def test_threshold_keeps_strong_second_choices() -> None:
    gates = torch.tensor([[0.5, 0.4, 0.1], [0.8, 0.1, 0.1]])
    gate, x = gate_of(gates, second_policy_train="threshold", second_threshold_train=0.3)
    assert gate(x)[0].sum((-1, -2)).tolist() == [[2.0, 1.0]]


def test_each_sequence_has_its_own_places_and_loss() -> None:
    gate = Top2Gating(DIM, 2, second_policy_train="all")
    x = torch.randn(3, 8, DIM)
    alone = [gate(x[i : i + 1]) for i in range(3)]
    dispatch, combine, loss = gate(x)
    assert torch.equal(dispatch, torch.cat([a[0] for a in alone]))
    assert torch.equal(combine, torch.cat([a[1] for a in alone]))
    assert_close(loss, torch.stack([a[2] for a in alone]).mean(), 48)


def test_policies_can_be_changed_after_construction() -> None:
    moe = MoE(DIM, 2, second_policy_train="none")
    moe.gate.second_policy_train = "all"
    assert int((moe.gate.route(torch.randn(1, 4, DIM)).topk_ids[:, 1] >= 0).sum()) == 4
    moe.gate.second_policy_train = "some"
    with pytest.raises(ValueError, match="policy is 'some', expected one of all, none, threshold, random"):
        moe(torch.randn(1, 4, DIM))


LAYERS = {
    "MoE": lambda **how: MoE(DIM, 4, **how),
    "MoE on slots": lambda **how: MoE(DIM, 4, experts=nn.Linear(DIM, DIM, bias=False), **how),
    "HierarchicalMoE": lambda **how: HierarchicalMoE(DIM, (2, 2), **how),
    "HierarchicalMoE on slots": lambda **how: HierarchicalMoE(DIM, (2, 2), experts=nn.Linear(DIM, DIM), **how),
}


@pytest.mark.parametrize("name", LAYERS)
def test_nan_token_harms_only_itself(name) -> None:
    """The source's einsums spread it over its sequence, and so over the batch's experts."""
    layer = LAYERS[name](second_policy_train="all", capacity_factor_train=8.0)
    x = torch.randn(2, 8, DIM)
    x[:, -1] = 3.0  # the last in each queue: what happens to it moves nobody else
    broken = x.clone()
    broken[1, -1] = math.nan
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, -1] = False
    clean, harmed = layer(x)[0], layer(broken)[0]
    assert_close(harmed[keep], clean[keep], 32)
    assert harmed[1, -1].isnan().any()
    assert layer(broken)[1].isnan()  # the loss shows it


@pytest.mark.parametrize("shape", [(0, 8, DIM), (2, 0, DIM)])
@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens(name, shape) -> None:
    layer = LAYERS[name]()
    y, loss = layer(torch.zeros(shape))
    (y.sum() + loss).backward()
    assert y.shape == shape and float(loss.detach()) == 0


@pytest.mark.parametrize("name", LAYERS)
def test_one_token(name) -> None:
    layer = LAYERS[name](second_policy_train="all")
    y, loss = layer(torch.randn(1, 1, DIM))
    assert y.shape == (1, 1, DIM) and y.isfinite().all() and loss.isfinite()


@pytest.mark.parametrize("name", ["MoE", "HierarchicalMoE"])
def test_bfloat16_and_autocast(name) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 8, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        y, loss = layer(x)
    (y.float().sum() + loss).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    y, loss = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_bit_identical_repeats() -> None:
    layer, x = LAYERS["HierarchicalMoE"](), torch.randn(2, 64, DIM)
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        layer.zero_grad()
        y, loss = layer(x)
        (y.square().sum() + loss).backward()
        results.append([y, loss, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_hooks_on_the_bank_are_called() -> None:
    layer, seen = LAYERS["MoE"](), []
    layer.experts.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(1, 4, DIM))
    assert seen == [1]


def test_a_bank_given_as_experts_is_the_default_one() -> None:
    moe = MoE(DIM, 4, experts=Experts(DIM, 4, activation=nn.ReLU), second_policy_train="all")
    other = MoE(DIM, 4, second_policy_train="all")
    other.load_state_dict(moe.state_dict())
    x = torch.randn(2, 8, DIM)
    assert torch.equal(moe(x)[0], other(x)[0])


def test_keyword_arguments_of_forward_are_ignored() -> None:
    layer, x = LAYERS["MoE"](second_policy_train="all"), torch.randn(1, 4, DIM)
    assert torch.equal(layer(x, mask=None)[0], layer(x)[0])
