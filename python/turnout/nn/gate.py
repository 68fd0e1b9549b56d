"""The gate of an MoE layer: nn.Linear with the same bits at any number of threads."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class Gate(nn.Linear):
    """A linear map from hidden to num_experts, computed by gate_logits(); parameters, hooks and drawing are those of
    nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., hidden] to logits [..., num_experts]"""
        logits = ops.gate_logits(input.reshape(-1, self.in_features), self.weight, self.bias)
        return logits.reshape(*input.shape[:-1], self.out_features)
