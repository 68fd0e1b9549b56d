"""route() in float32 and bfloat16, where a kernel runs, against float64, where it is composed of torch's calls."""

from __future__ import annotations

import itertools

import pytest
import torch
import turnout
from naive import assert_close

TOKENS, EXPERTS, TOP_K = 60, 24, 4
GROUPS = {"none": {}, "groups": {"groups": 6, "kept_groups": 3, "group_top": 2}}
CASES = list(
    itertools.product(("softmax", "sigmoid"), ("normalized", "probability", "softmax_of_topk"), GROUPS, (False, True))
)


def both(dtype, score, weights, groups, biased, **more):
    """Routings and gradients by the kernel and by the composition, from logits of equal value."""
    logits = torch.randn(TOKENS, EXPERTS).to(dtype)
    bias = torch.randn(EXPERTS) if biased else None
    options = dict(GROUPS[groups], score=score, scale=1.5, epsilon=1e-3, selection_bias=bias, **more)
    factors = torch.randn(TOKENS, TOP_K), torch.randn(TOKENS, EXPERTS)
    results = []
    for x in (logits, logits.double()):
        x.requires_grad_()
        routing = turnout.route(x, TOP_K, weights, **options)
        loss = (routing.topk_weights * factors[0]).sum() + (routing.scores * factors[1]).sum()
        [grad] = torch.autograd.grad(loss, x)
        results.append((*(t.detach() for t in routing), grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("score", "weights", "groups", "biased"), CASES)
def test_against_float64(dtype, score, weights, groups, biased) -> None:
    (ids, w, s, grad), (ids64, w64, s64, grad64) = both(dtype, score, weights, groups, biased)
    # float32 scores can tie or cross where float64 ones do not; bfloat16 logits tie outright, alike in both
    same = (ids == ids64).all(-1)
    assert same.float().mean() > 0.95
    assert w.dtype == s.dtype == torch.float32 and grad.dtype == dtype
    assert_close(w[same], w64[same].float(), terms=TOP_K)
    assert_close(s, s64.float(), terms=2)
    assert_close(grad[same], grad64[same].to(dtype), terms=EXPERTS if dtype == torch.float32 else 1)


def test_second_derivative() -> None:
    """Recorded gradients go through the composition."""
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(2)
        x = torch.randn(8, 6).to(dtype).requires_grad_()
        routing = turnout.route(x, 2, score="sigmoid")
        [grad] = torch.autograd.grad(routing.topk_weights.square().sum() + routing.scores.square().sum(), x, create_graph=True)
        [second] = torch.autograd.grad(grad.square().sum(), x)
        if dtype == torch.float32:
            single = (grad.detach(), second)
    assert_close(single[0], grad.detach().float(), terms=6)
    assert_close(single[1], second.float(), terms=36)


def test_only_scores_or_only_weights_are_used() -> None:
    x = torch.randn(8, 6, requires_grad=True)
    for pick in (1, 2):
        [grad] = torch.autograd.grad(turnout.route(x, 2)[pick].square().sum(), x)
        wide = x.detach().double().requires_grad_()
        [expected] = torch.autograd.grad(turnout.route(wide, 2)[pick].square().sum(), wide)
        assert_close(grad, expected.float(), terms=6)
    assert not turnout.route(x, 2).topk_ids.requires_grad


@pytest.mark.parametrize("tokens", [1, 3, 2000])
def test_same_bits_at_any_thread_count(tokens) -> None:
    x = torch.randn(tokens, 40, requires_grad=True)
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            routing = turnout.route(x, 3, score="sigmoid")
            [grad] = torch.autograd.grad(routing.topk_weights.sum() + routing.scores.square().sum(), x)
            made.append((*routing, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


def test_strides_and_sizes_beyond_the_kernel() -> None:
    for logits in (torch.randn(30, 50)[:, 3:23], torch.randn(20, 30).T, torch.randn(1, 20).expand(4, 20)):
        for a, b in zip(turnout.route(logits, 3), turnout.route(logits.contiguous(), 3), strict=True):
            assert torch.equal(a, b)
    wide = torch.randn(2, 1500)
    assert torch.equal(turnout.route(wide, 70).topk_ids, wide.topk(70).indices)
    assert torch.equal(turnout.route(wide[:, :1024], 64).topk_ids, wide[:, :1024].topk(64).indices)


def test_masked_logits_have_probability_zero() -> None:
    logits = torch.randn(5, 20)
    logits[:, 7:] = float("-inf")
    routing = turnout.route(logits, 3)
    assert not routing.scores[:, 7:].any() and int(routing.topk_ids.max()) < 7
    sigmoid = turnout.route(logits, 3, score="sigmoid")
    assert not sigmoid.scores[:, 7:].any()


def test_compiles_whole() -> None:
    x = torch.randn(16, 12)

    def step(x):
        routing = turnout.route(x, 2, score="sigmoid", groups=3, kept_groups=2, selection_bias=torch.zeros(12))
        return routing.topk_weights.square().sum() + routing.scores.square().sum()

    grads = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        call(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
