"""MoEConfig, TopKRouter and MixtureOfExperts: top-k routing with a capacity for each expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import _checks as check
from .. import ops
from ..nn import Perceptron, run_experts


@dataclass
class MoEConfig:
    """Routing parameters. Raises ValueError or TypeError, when made and when a layer is made of it, for values that
    are impossible or do not fit together."""

    num_experts: int = 8
    """expert networks"""
    top_k: int = 2
    """experts of a token, 1 to num_experts"""
    capacity_factor: float = 1.25
    """places of an expert = ceil(capacity_factor · tokens · top_k / num_experts), over the tokens of a call"""
    expert_capacity: int | None = None
    """a fixed number of places; wins over capacity_factor"""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        name = "turnout.compat.MoEConfig"
        check.positive_int(name, num_experts=self.num_experts)
        check.top_k(name, self.top_k, self.num_experts)
        check.positive_number(name, capacity_factor=self.capacity_factor)
        if self.expert_capacity is not None:
            check.positive_int(name, expert_capacity=self.expert_capacity)


def _check(owner: str, dim: int, config: MoEConfig) -> None:
    check.positive_int(owner, dim=dim)
    if not isinstance(config, MoEConfig):
        raise TypeError(f"{owner}: config is a {type(config).__name__}, expected a MoEConfig")
    config.validate()


class TopKRouter(nn.Module):
    """Top-k gating: softmax over all experts, the top-k of it divided by their sum.

    Attributes: dim, config, gate (nn.Linear dim → num_experts without bias). With top_k = 1 the score is the constant
    1 and the gate gets a gradient of zeros. Source: Shazeer et al., arXiv:1701.06538.
    """

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        _check("turnout.compat.TopKRouter", dim, config)
        self.dim = dim
        self.config = config
        self.gate = nn.Linear(dim, config.num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, seq_len, dim] → scores [batch, seq_len, top_k] float32 (float64 for float64) that sum to 1, best
        first, and indices [batch, seq_len, top_k] int64; ties go to the lower index."""
        check.shaped("turnout.compat.TopKRouter", "x", x, "[batch, seq_len, dim]", self.dim)
        routing = ops.route(self.gate(x.reshape(-1, self.dim)), self.config.top_k)
        shape = (*x.shape[:-1], self.config.top_k)
        return routing.topk_weights.view(shape), routing.topk_ids.view(shape)


class MixtureOfExperts(nn.Module):
    """Sparse mixture of two-layer perceptrons with a capacity for each expert.

    Attributes: dim, config, router (TopKRouter), experts (nn.ModuleList of dim → 4 · dim → dim with GELU and biases).
    First choices queue for a place before second ones, by position; what finds none adds nothing, and its weight is
    not given to the token's other choices. `dropped` holds the number of such choices of the last forward.
    Source: Fedus et al., arXiv:2101.03961.
    """

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        _check("turnout.compat.MixtureOfExperts", dim, config)
        self.dim = dim
        self.config = config
        self.router = TopKRouter(dim, config)
        self.experts = nn.ModuleList(Perceptron(dim, 4 * dim) for _ in range(config.num_experts))
        self.dropped: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, seq_len, dim] → the same shape."""
        check.shaped("turnout.compat.MixtureOfExperts", "x", x, "[batch, seq_len, dim]", self.dim)
        scores, indices = self.router(x)
        top_k, num_experts = self.config.top_k, self.config.num_experts
        tokens = x.shape[0] * x.shape[1]
        capacity = ops.expert_capacity(
            tokens, top_k, num_experts, factor=self.config.capacity_factor, fixed=self.config.expert_capacity or 0
        )
        capped = ops.limit_capacity(
            indices.reshape(-1, top_k), scores.reshape(-1, top_k), num_experts, capacity, max(tokens, 1)
        )
        self.dropped = capped.dropped
        y = run_experts(
            self.experts, x.reshape(-1, self.dim), capped.topk_weights, ops.plan(capped.topk_ids, num_experts)
        )
        return y.view(x.shape)
