"""Routers beside route(): noise and jitter, experts that pick tokens, Sinkhorn, hashing, ids chosen elsewhere.

Shapes: T tokens, K choices of a token (top_k), E experts. Each function is one call of an op.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .ops import DispatchPlan, RouterPrecision, RouterWeights, Routing, ScoreFunction

Selection = Literal["topk", "expert_choice", "sinkhorn", "hash"]
"""Who is paired with whom in a layer: route(), route_expert_choice(), route_sinkhorn() or hash_ids()."""

_ops = torch.ops.turnout


class NoisyLogits(NamedTuple):
    """Logits with trainable noise."""

    logits: Tensor
    """[T, E] logits + noise · deviation"""
    deviation: Tensor
    """[T, E] softplus(noise_logits) + minimum"""


class ExpertChoice(NamedTuple):
    """What experts picked."""

    routing: Routing
    """topk_ids [T, E]: e in column e where expert e picked the token, else -1; topk_weights likewise"""
    plan: DispatchPlan
    """rows = E · groups · capacity"""


def route_chosen(
    logits: Tensor,
    topk_ids: Tensor,
    weights: RouterWeights = "normalized",
    epsilon: float = 0.0,
    *,
    score: ScoreFunction = "softmax",
    scale: float = 1.0,
    precision: RouterPrecision = "float32",
    cast_weights: bool = False,
    token_mask: Tensor | None = None,
) -> Routing:
    """The scores and weights of route() for experts chosen elsewhere. topk_ids: [T, K]; -1 = not sent: weight 0, and no
    share in a sum. token_mask: [T] bool; False: padding, sent nowhere. Gradient: to logits [T, E]."""
    return Routing(
        *_ops.route_chosen(
            logits,
            topk_ids,
            weights,
            epsilon,
            score=score,
            scale=scale,
            precision=precision,
            cast_weights=cast_weights,
            token_mask=token_mask,
        )
    )


def jitter(x: Tensor, amount: float, *, uniform: Tensor | None = None) -> Tensor:
    """x · uniform(1 − amount, 1 + amount). In Switch the gate alone sees the result; transformers' Mixtral hands it to
    the experts too. uniform: x's shape, numbers in [0, 1); by default drawn from torch's generator."""
    return _ops.jitter(x, amount, uniform)


def noisy_logits(
    logits: Tensor, noise_logits: Tensor, minimum: float = 0.0, *, noise: Tensor | None = None
) -> NoisyLogits:
    """Trainable noise: logits + noise · (softplus(noise_logits) + minimum), all [T, E]; noise_logits = x · W_noise.

    Route the result with router_preset("noisy_topk"). noise: standard normal numbers, by default drawn from torch's
    generator. Gradient: to logits and noise_logits. Source: arXiv:1701.06538; tensor2tensor has a minimum of 1e-2.
    """
    return NoisyLogits(*_ops.noisy_logits(logits, noise_logits, minimum, noise))


def noisy_load(clean: Tensor, noisy: NoisyLogits, top_k: int) -> Tensor:
    """[E] Σ_t P(the expert is among the top_k, were its noise drawn anew): a load that is smooth in the logits.

    clean: [T, E], the logits before noise. Use: cv_squared. Gradient: to all. Source: arXiv:1701.06538.
    """
    return _ops.noisy_load(clean, noisy.logits, noisy.deviation, top_k)


def route_expert_choice(
    logits: Tensor, capacity: int, group_size: int = 0, *, token_mask: Tensor | None = None
) -> ExpertChoice:
    """Experts pick their `capacity` best tokens of each group; a token may get any number of experts, also none.

    **Not causal**: whether a token is picked depends on later tokens of its group, so a language model trained so does
    not generate as it was trained.
    logits: [T, E]; capacity: at least 1, all tokens where a group has fewer; group_size: tokens that compete, 0 = all;
    token_mask: [T] bool, False = padding, picked by none
    Weights are the softmax over experts in float32. Ties: the lower token. Source: arXiv:2202.09368.
    """
    ids, weights, scores, *plan = _ops.route_expert_choice(logits, capacity, group_size, token_mask)
    return ExpertChoice(Routing(ids, weights, scores), DispatchPlan(*plan))


def sinkhorn(logits: Tensor, tolerance: float = 1e-4) -> Tensor:
    """exp(logits) [T, E] scaled so that rows sum to 1/T and columns to 1/E, in float32. Gradient: none.

    Iterates until the mean change of the column factors is at most `tolerance`, as Megatron-LM does, at most 1000
    times. Rows with NaN or Inf take no part (0).
    """
    return _ops.sinkhorn(logits, tolerance)


def route_sinkhorn(logits: Tensor, top_k: int, balanced: bool = True, *, token_mask: Tensor | None = None) -> Routing:
    """Chooses by sinkhorn(logits), so that the batch loads experts evenly; weights are the sigmoid (top_k = 1) or the
    softmax of the logits themselves. Not causal; in evaluation Megatron-LM chooses by the logits (balanced=False).
    token_mask: [T] bool; False: padding, sent nowhere, no part of the balance."""
    return Routing(*_ops.route_sinkhorn(logits, top_k, balanced, token_mask))


def hash_ids(token_ids: Tensor, num_experts: int, top_k: int = 1, seed: int = 0) -> Tensor:
    """Experts by token id alone: [tokens, top_k] distinct ids from a fixed pseudo-random table.

    The same for a token id, seed and number of experts everywhere. Source: arXiv:2106.04426.
    """
    return _ops.hash_ids(token_ids, num_experts, top_k, seed)
