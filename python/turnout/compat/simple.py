"""SimpleMoELayer: the layer of an introductory course, with its load-balancing loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import _checks as check
from .. import losses, ops
from ..nn import Perceptron, run_experts

_NAME = "turnout.compat.SimpleMoELayer"
_LOAD_COUNTS = ("per_assignment", "per_token", "first_choice")


class SimpleMoELayer(nn.Module):
    """Stands in for the feed-forward network of a transformer block.

    embedding_dim, num_experts, top_k: as in the description
    hidden_dim: width of an expert; 4 · embedding_dim by default
    alpha: scale of the load-balancing loss; 0: it is not computed
    load_count: f_i of the loss: assignments / (tokens · top_k) (per_assignment; the balanced loss is alpha),
      assignments / tokens (per_token; alpha · top_k), or first choices / tokens (first_choice; alpha)

    Attributes: gating_network (nn.Linear with bias), experts (nn.ModuleList of two-layer perceptrons with GELU and
    biases; `expert.weight` is the first matrix), load_balancing_loss (alpha · N · Σ f_i · P_i of the last forward, to
    be added to the training loss; None before the first). An expert without tokens gets gradients of zeros. The
    weights of a token are its top-k probabilities divided by their sum; with top_k = 1 that is the constant 1, and
    the gate learns from the loss alone.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_experts: int,
        top_k: int,
        hidden_dim: int | None = None,
        alpha: float = 1e-2,
        load_count: losses.LoadCount = "per_assignment",
    ) -> None:
        super().__init__()
        hidden_dim = 4 * embedding_dim if hidden_dim is None else hidden_dim
        check.positive_int(_NAME, embedding_dim=embedding_dim, num_experts=num_experts, hidden_dim=hidden_dim)
        check.top_k(_NAME, top_k, num_experts)
        check.non_negative_number(_NAME, alpha=alpha)
        check.one_of(_NAME, _LOAD_COUNTS, load_count=load_count)
        self.embedding_dim = embedding_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.alpha = alpha
        self.load_count = load_count
        self.gating_network = nn.Linear(embedding_dim, num_experts)
        self.experts = nn.ModuleList(Perceptron(embedding_dim, hidden_dim) for _ in range(num_experts))
        self.load_balancing_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [batch_size, seq_len, embedding_dim], or any leading axes → the same shape; sets load_balancing_loss."""
        check.shaped(_NAME, "x", x, "[..., embedding_dim]", self.embedding_dim)
        tokens = x.reshape(-1, self.embedding_dim)
        routing = ops.route(self.gating_network(tokens), self.top_k)
        if self.alpha > 0:
            balance = losses.balance_loss(routing.scores, routing.topk_ids, self.load_count)
            self.load_balancing_loss = self.alpha * balance
        else:
            self.load_balancing_loss = routing.scores.new_zeros(())
        plan = ops.plan(routing.topk_ids, self.num_experts)
        return run_experts(self.experts, tokens, routing.topk_weights, plan).view(x.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the last loss: it belongs to a graph, which can be neither."""
        return {**self.__dict__, "load_balancing_loss": None}
