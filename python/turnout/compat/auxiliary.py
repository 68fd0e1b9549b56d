"""MoELayer: returns its auxiliary loss beside its output, and blends with a dense block on request."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from .. import losses, ops
from ..nn import Perceptron, run_experts

_NAME = "turnout.compat.MoELayer"


class MoELayer(nn.Module):
    """Drop-in for the feed-forward part of a transformer block, in every layer or in alternating ones.

    hidden_dim, num_experts, top_k: as in the description
    ffn_dim: width of an expert and of the dense block; 4 · hidden_dim by default
    activation: relu, gelu, gelu_tanh or silu
    raw_probabilities: weigh experts by their probabilities (Switch) instead of the softmax over the selected logits;
      with top_k = 1 only this lets the output train the gate
    alpha: None, or the share of a dense block in y = alpha · Dense(x) + (1 − alpha) · MoE(x)

    Attributes: gate (nn.Linear without bias), experts (nn.ModuleList of two-layer perceptrons with biases), dense
    (such a perceptron, or None). Sources: arXiv:1701.06538, arXiv:2006.16668, arXiv:2101.03961.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        ffn_dim: int | None = None,
        activation: str = "gelu",
        raw_probabilities: bool = False,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        ffn_dim = 4 * hidden_dim if ffn_dim is None else ffn_dim
        check.positive_int(_NAME, hidden_dim=hidden_dim, num_experts=num_experts, ffn_dim=ffn_dim)
        check.top_k(_NAME, top_k, num_experts)
        if alpha is not None:
            check.non_negative_number(_NAME, alpha=alpha)
            if alpha > 1:
                raise ValueError(f"{_NAME}: alpha is {alpha}, expected None or 0 to 1")
        self.hidden_dim = hidden_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.raw_probabilities = raw_probabilities
        self.alpha = alpha
        self.gate = nn.Linear(hidden_dim, num_experts, bias=False)
        self.experts = nn.ModuleList(Perceptron(hidden_dim, ffn_dim, activation) for _ in range(num_experts))
        self.dense = None if alpha is None else Perceptron(hidden_dim, ffn_dim, activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., hidden_dim] → output of the same shape, and aux_loss.

        aux_loss = E · Σ importance · load, a scalar without coefficient: importance is the average probability of an
        expert, load the fraction of tokens whose first choice it is; 1 when balanced.
        """
        check.shaped(_NAME, "x", x, "[..., hidden_dim]", self.hidden_dim)
        tokens = x.reshape(-1, self.hidden_dim)
        weights = "probability" if self.raw_probabilities else "softmax_of_topk"
        routing = ops.route(self.gate(tokens), self.top_k, weights)
        aux_loss = losses.balance_loss(routing.scores, routing.topk_ids, "first_choice")
        plan = ops.plan(routing.topk_ids, self.num_experts)
        y = run_experts(self.experts, tokens, routing.topk_weights, plan).view(x.shape)
        if self.dense is not None:
            y = self.alpha * self.dense(x) + (1 - self.alpha) * y
        return y, aux_loss
