"""Switch Transformers: experts that are modules, which transformers' interface does not reach."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from ..nn import run_experts
from ..ops import plan
from .banks import Bank, activation_name, packed_of, run, run_packed


class TurnoutSwitchExperts(SwitchTransformersExperts):
    """What patch() makes of SwitchTransformersExperts: the same modules and parameters, run on routed rows.

    Experts in evaluation, or without dropout, run as one fused op over lists of their weights. With dropout between the
    two products, and where the second matrix is kept in float32, each expert module is called on its rows.
    """

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; selected_experts [tokens, 1, experts] one-hot, 0 where the expert is full;
        routing_weights [tokens, 1] → [tokens, hidden]"""
        chosen = selected_experts.squeeze(1)
        topk_ids = chosen.argmax(-1, keepdim=True).masked_fill(chosen.sum(-1, keepdim=True) == 0, -1)
        packed = packed_of(self)
        if packed is not None:
            return run_packed(self, hidden_states, topk_ids, routing_weights, packed)
        bank = switch_bank(self)
        if bank is None:
            experts = list(self.values())
            topk_weights = routing_weights.to(experts[0].wo.weight.dtype)
            y = run_experts(experts, hidden_states, topk_weights, plan(topk_ids, len(experts)))
            return y.to(hidden_states.dtype)
        return run(bank, hidden_states, topk_ids, routing_weights)


def switch_bank(module: nn.Module) -> Bank | None:
    """The weights of all experts as lists; None where the fused op does not compute what the modules do."""
    experts = list(module.values())
    if any(expert.wi.weight.dtype != expert.wo.weight.dtype for expert in experts):
        return None
    if any(expert.dropout.training and expert.dropout.p > 0 for expert in experts):
        return None
    activation = activation_name(experts[0].act)
    if activation is None:
        return None
    return Bank([expert.wi.weight for expert in experts], [expert.wo.weight for expert in experts], activation)
