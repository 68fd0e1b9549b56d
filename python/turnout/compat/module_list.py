"""MoeLayer of LLMBook-zh: any list of modules, any gate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import _checks as check
from .. import ops
from ..nn import run_experts

_NAME = "turnout.compat.MoeLayer"


class MoeLayer(nn.Module):
    """Mixture of any expert modules under any gate.

    experts: modules that make [rows, hidden] of [rows, hidden]; each is called once on its rows, also on none
      (two-layer perceptrons of one size run as one fused op instead)
    gate: module that makes logits [tokens, experts] of [tokens, hidden]
    num_experts_per_tok: experts of a token (top-k of the logits, ties to the lower id)

    The weights are the softmax over the chosen logits, in float32. With num_experts_per_tok = 1 the weight is the
    constant 1 and the gate gets a gradient of zeros.
    Source: LLMBook-zh, code 5.4.
    """

    def __init__(self, experts: Sequence[nn.Module], gate: nn.Module, num_experts_per_tok: int) -> None:
        super().__init__()
        modules = list(experts)
        for index, module in enumerate(modules):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{_NAME}: experts[{index}] is a {type(module).__name__}, expected a torch.nn.Module")
        if not modules:
            raise ValueError(f"{_NAME}: experts is empty, expected at least one module")
        if not isinstance(gate, nn.Module):
            raise TypeError(f"{_NAME}: gate is a {type(gate).__name__}, expected a torch.nn.Module")
        check.top_k(_NAME, num_experts_per_tok, len(modules), name="num_experts_per_tok", counted="experts")
        self.experts = nn.ModuleList(modules)
        self.gate = gate
        self.num_experts_per_tok = num_experts_per_tok

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [batch · seq_len, hidden], or any leading axes → the same shape.

        Raises ValueError when the gate's logits or an expert's output have another shape than expected.
        """
        check.shaped(_NAME, "inputs", inputs, "[..., hidden]")
        x = inputs.reshape(-1, inputs.shape[-1])
        logits = self.gate(x)
        if not isinstance(logits, Tensor) or logits.shape != (x.shape[0], len(self.experts)):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{_NAME}: gate returned {got}, expected logits of shape {[x.shape[0], len(self.experts)]} "
                "(tokens, experts)"
            )
        routing = ops.route(logits, self.num_experts_per_tok, "softmax_of_topk")
        plan = ops.plan(routing.topk_ids, len(self.experts))
        return run_experts(self.experts, x, routing.topk_weights, plan).view(inputs.shape)
