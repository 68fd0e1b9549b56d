"""Gradients against finite differences in float64, for every op that has one."""

import pytest
import torch
import turnout
from naive import ACTIVATIONS, bank
from torch.autograd import gradcheck, gradgradcheck

IDS = torch.tensor([[0, 2], [2, -1], [0, 2], [-1, -1]])  # expert 1 stays empty


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("layout", ["bank", "list"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_experts(activation, bias, layout) -> None:
    w = bank(3, 3, 2, activation, bias=bias)
    names = [name for name, t in w.items() if t is not None]
    sizes = [1 if layout == "bank" else 3] * len(names)
    flat = [part.clone() for name in names for part in ([w[name]] if layout == "bank" else w[name].unbind())]

    def call(x, weights, *tensors):
        lists = dict(zip(names, _split(tensors, sizes), strict=True))
        up, down = lists.pop("up"), lists.pop("down")
        return turnout.fused_experts(x, IDS, weights, up, down, activation, **lists)

    assert gradcheck(call, [leaf(4, 3), leaf(4, 2), *(t.requires_grad_() for t in flat)])


def _split(tensors, sizes):
    """One bank tensor or a list of tensors for each name."""
    parts, at = [], 0
    for size in sizes:
        parts.append(tensors[at] if size == 1 else list(tensors[at : at + size]))
        at += size
    return parts


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute(recompute) -> None:
    w = bank(3, 3, 2, "swiglu")
    leaves = [leaf(4, 3), w["up"].requires_grad_(), w["down"].requires_grad_()]
    weights = torch.rand(4, 2, dtype=torch.float64)
    assert gradcheck(lambda x, up, down: turnout.fused_experts(x, IDS, weights, up, down, recompute=recompute), leaves)


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_feed_forward(activation) -> None:
    w = bank(1, 3, 2, activation)
    leaves = [leaf(2, 2, 3), *(t[0].clone().requires_grad_() for t in w.values())]
    assert gradcheck(
        lambda x, up, down, b, c: turnout.feed_forward(x, up, down, activation, up_bias=b, down_bias=c), leaves
    )


PLANS = {"plan": lambda: turnout.plan(IDS, 3), "slots": lambda: turnout.slot_plan(IDS, 3, 3, 2)}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_dispatch(check, kind) -> None:
    plan = PLANS[kind]()
    assert check(lambda x: turnout.dispatch(x, plan), [leaf(4, 3)])


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_combine(check, kind) -> None:
    plan = PLANS[kind]()
    assert check(lambda rows, w: turnout.combine(rows, w, plan), [leaf(len(plan.token_of_row), 3), leaf(4, 2)])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("weights", ["normalized", "probability", "softmax_of_topk"])
def test_route(weights, top_k) -> None:
    assert gradcheck(lambda logits: turnout.route(logits, top_k, weights)[1:], [leaf(5, 4)])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", ["normalized", "probability", "softmax_of_topk"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_route_with_every_option(check, weights, score) -> None:
    bias = torch.randn(6)
    mask = torch.tensor([True, True, False, True])

    def call(logits):
        return turnout.route(
            logits, 2, weights, 1e-3, score=score, scale=1.5, groups=3, kept_groups=2, group_top=2,
            selection_bias=bias, token_mask=mask,
        )[1:]

    assert check(call, [leaf(4, 6)])


@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random"])
def test_route_top2(policy, with_importance) -> None:
    importance = torch.randint(0, 3, (2, 4)).double() / 2 if with_importance else None
    uniform = torch.rand(2, 4, dtype=torch.float64)

    def call(logits):
        return turnout.route_top2(logits, policy, 0.4, importance=importance, uniform=uniform)[1:]

    assert gradcheck(call, [leaf(2, 4, 3)])


MASKS = {"all": None, "masked": torch.tensor([True, False, True, True])}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("group_size", [0, 2])
@pytest.mark.parametrize("count", ["per_assignment", "per_token", "first_choice"])
def test_balance_loss(count, group_size, mask) -> None:
    def call(scores):
        return turnout.balance_loss(scores, IDS, count, group_size, token_mask=MASKS[mask])

    assert gradcheck(call, [leaf(4, 3)])


@pytest.mark.parametrize("mask", MASKS)
def test_z_loss(mask) -> None:
    assert gradcheck(lambda logits: turnout.z_loss(logits, token_mask=MASKS[mask]), [leaf(4, 3)])
    assert gradcheck(lambda logits: turnout.z_sums(logits, token_mask=MASKS[mask]), [leaf(4, 3)])


def test_jitter() -> None:
    uniform = torch.rand(4, 3, dtype=torch.float64)
    assert gradcheck(lambda x: turnout.jitter(x, 0.3, uniform=uniform), [leaf(4, 3)])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", ["normalized", "probability", "softmax_of_topk"])
def test_route_chosen(weights, score) -> None:
    assert gradcheck(lambda logits: turnout.route_chosen(logits, IDS, weights, score=score)[1:], [leaf(4, 3)])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("order", ["choice", "position", "score"])
def test_limit_capacity(order, renormalize) -> None:
    weights = torch.rand(4, 2, dtype=torch.float64).add_(0.1).requires_grad_()
    assert gradcheck(lambda w: turnout.limit_capacity(IDS, w, 3, 2, 4, order, renormalize).topk_weights, [weights])


def test_dispatch_tensors() -> None:
    assert gradcheck(lambda w: turnout.dispatch_tensors(IDS, w, 3, 2, 2).combine, [leaf(4, 2)])
