"""The MoE layer: gate → route → losses → capacity → plan → experts, + shared experts, each stage one op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import losses, ops, routers
from ..experts import Activation
from .feed_forward import FeedForward, FeedForwardBank, ModuleExperts

_NAME = "turnout.MoE"


@dataclass(frozen=True)
class CapacityOptions:
    """Places that an expert has; what finds none is dropped. Nothing is, by default."""

    factor: float = 0.0
    """above 0: factor · group tokens · top_k / experts places, rounded"""
    fixed: int = 0
    """above 0: this many places, whatever the factor"""
    minimum: int = 0
    """lower bound of what the factor gives (tensor2tensor: 4)"""
    rounding: ops.CapacityRounding = "ceil"
    """ceil (Megatron, DeepSpeed), floor (MegaBlocks, tensor2tensor) or share (Tutel), see expert_capacity()"""
    count_choices: bool = True
    """multiply by top_k (tensor2tensor: no)"""
    per_sequence: bool = False
    """places are counted in each sequence (last axis but one of x), not over the batch"""
    order: ops.DropOrder = "choice"
    """who stays: all first choices before any second one (choice), or by position, score, or at random"""
    renormalize: bool = False
    """divide the kept weights of a token by their sum (DeepSpeed: yes; GShard: no)"""

    @property
    def dropless(self) -> bool:
        return self.factor <= 0 and self.fixed <= 0

    def apply(self, routing: ops.Routing, num_experts: int, group_size: int) -> tuple[ops.Routing, Tensor]:
        """What is left of a routing, and how many choices were dropped (scalar int64). group_size: tokens of a group."""
        capped = ops.apply_capacity(
            routing.topk_ids,
            routing.topk_weights,
            num_experts,
            group_size,
            factor=self.factor,
            fixed=self.fixed,
            minimum=self.minimum,
            rounding=self.rounding,
            count_choices=self.count_choices,
            order=self.order,
            renormalize=self.renormalize,
        )
        return ops.Routing(capped.topk_ids, capped.topk_weights, routing.scores), capped.dropped


class MoEOutput(NamedTuple):
    """One forward of an MoE layer: the output, the loss to add, and everything that led there."""

    output: Tensor
    """x's shape and type"""
    aux_loss: Tensor
    """scalar: coefficient · balance_loss + coefficient · z_loss"""
    routing: ops.Routing
    """after capacity"""
    plan: ops.DispatchPlan
    dropped: Tensor
    """scalar int64: choices that found no place; their tokens get zero from that expert"""


class MoE(nn.Module):
    """A feed-forward block of num_experts experts, top_k of which each token passes.

    hidden, ffn: of x, and of one expert
    activation, bias: of the experts, shared ones included; swiglu and geglu are gated
    shared_ffn: width of a block that every token passes beside its experts, 0: there is none; shared_gated: its output is
      multiplied by σ(shared_gate(x)) (Qwen2-MoE) instead of added as it is (DeepSeek)
    gate_bias: of the gate, a linear map from hidden to num_experts
    router: how the experts of a token and their weights follow from the logits: switches of route() by name, or the name
      of a router_preset(); by default softmax, weights divided by their sum. With top_k = 1 only weights="probability"
      lets the output train the gate
    selection_bias: experts are chosen by score + a buffer selection_bias [num_experts] float32, zeros at first, which no
      gradient moves (DeepSeek-V3); update_selection_bias() makes its next value
    jitter: in training the router's input is x · uniform(1 ± jitter); jitter_experts: the experts see that input too
      (Mixtral in transformers)
    noisy: in training the logits are logits + noise · softplus(noise_gate(x)) (Shazeer)
    capacity: a CapacityOptions; by default nothing is dropped
    load_count, balance_coefficient, z_coefficient: the losses, see balance_loss() and z_loss(); with a coefficient of 0
      a loss is not computed
    gate: any module from [tokens, hidden] to logits [tokens, num_experts], in place of the linear map. It computes in the
      type of its own weights, under autocast too: `layer.gate.float()` keeps the router of a bfloat16 layer in float32
    experts: a list of modules from [rows, hidden] to [rows, hidden], or one module that is called on x, topk_weights and
      a DispatchPlan and has num_experts (FeedForwardBank, ModuleExperts), in place of the bank; ffn is then not read
    device, dtype: of the parameters made here

    Parameters: gate.weight [num_experts, hidden], gate.bias; experts.up, down, up_bias, down_bias as in
    FeedForwardBank; shared.* as in FeedForward; shared_gate.weight [1, hidden]; noise_gate.weight [num_experts, hidden],
    zeros at first. They and the buffer are those of turnout::MoE in C++, drawn in the same order.
    Raises ValueError or TypeError naming the argument, what it got and what was expected.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        shared_ffn: int = 0,
        shared_gated: bool = False,
        gate_bias: bool = False,
        router: ops.RouterOptions | Mapping[str, Any] | str | None = None,
        selection_bias: bool = False,
        jitter: float = 0.0,
        jitter_experts: bool = False,
        noisy: bool = False,
        capacity: CapacityOptions | None = None,
        load_count: losses.LoadCount = "per_assignment",
        balance_coefficient: float = 1e-2,
        z_coefficient: float = 0.0,
        gate: nn.Module | None = None,
        experts: nn.Module | Iterable[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.positive_int(_NAME, hidden=hidden, num_experts=num_experts)
        check.top_k(_NAME, top_k, num_experts)
        check.one_of(_NAME, get_args(losses.LoadCount), load_count=load_count)
        check.non_negative_number(_NAME, balance_coefficient=balance_coefficient, z_coefficient=z_coefficient)
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.router = dict(ops.router_preset(router) if isinstance(router, str) else router or {})
        none = ops.route(torch.zeros(0, num_experts), top_k, **self.router)  # raises for impossible switches
        self.capacity = CapacityOptions() if capacity is None else capacity
        self.capacity.apply(none, num_experts, 0)
        self.load_count = load_count
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = nn.Linear(hidden, num_experts, bias=gate_bias, **where) if gate is None else gate
        if experts is None:
            self.experts: nn.Module = FeedForwardBank(hidden, ffn, num_experts, activation, bias, **where)
        else:
            self.experts = as_experts(_NAME, experts, num_experts)
        bias_made = torch.zeros(num_experts, dtype=torch.float32, device=device) if selection_bias else None
        self.register_buffer("selection_bias", bias_made)
        self.jitter, self.jitter_experts = jitter, jitter_experts
        routers.jitter(torch.zeros(0), jitter)  # raises for an impossible amount
        self.noise_gate = nn.Linear(hidden, num_experts, bias=False, **where) if noisy else None
        if self.noise_gate is not None:
            nn.init.zeros_(self.noise_gate.weight)
        self.shared, self.shared_gate = _shared(hidden, shared_ffn, shared_gated, activation, bias, where)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> MoEOutput:
        """x [..., hidden]; for capacity per sequence [..., sequence, hidden]. No tokens: an empty output, losses of 0.

        token_mask: x's shape without hidden, bool; False: padding, which takes no place, counts in no loss and gets zero
          from the routed experts
        """
        per_sequence = self.capacity.per_sequence and not self.capacity.dropless
        check.shaped(_NAME, "x", x, "[..., sequence, hidden]" if per_sequence else "[..., hidden]", self.hidden)
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{_NAME}: token_mask has shape {list(token_mask.shape)}, expected {list(x.shape[:-1])} (x without hidden)"
            )
        tokens = x.reshape(-1, self.hidden)
        mask = None if token_mask is None else token_mask.flatten()
        jittered = routers.jitter(tokens, self.jitter) if self.jitter > 0 and self.training else tokens
        logits = self._logits(jittered)
        tokens = jittered if self.jitter_experts else tokens
        routing = ops.route(logits, self.top_k, **self.router, selection_bias=self.selection_bias, token_mask=mask)
        aux_loss = self._aux_loss(routing, logits, mask)
        dropped = routing.topk_ids.new_zeros(())
        if not self.capacity.dropless:
            group_size = x.shape[-2] if per_sequence else tokens.shape[0]
            routing, dropped = self.capacity.apply(routing, self.num_experts, group_size)
        plan = ops.plan(routing.topk_ids, self.num_experts)
        y = self.experts(tokens, routing.topk_weights, plan)
        if self.shared is not None:
            y = ops.add_shared(y, self.shared(tokens), None if self.shared_gate is None else self.shared_gate(tokens))
        return MoEOutput(y.reshape(x.shape), aux_loss, routing, plan, dropped)

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = _in_its_type(self.gate, tokens)
        if logits.shape[-1] != self.num_experts:
            raise ValueError(
                f"{_NAME}: the gate's output has shape {list(logits.shape)}, expected [tokens, {self.num_experts}] "
                "(num_experts)"
            )
        if self.noise_gate is None or not self.training:
            return logits
        return routers.noisy_logits(logits, _in_its_type(self.noise_gate, tokens)).logits

    def _aux_loss(self, routing: ops.Routing, logits: Tensor, mask: Tensor | None) -> Tensor:
        loss = routing.scores.new_zeros(())
        if self.balance_coefficient > 0:
            balance = losses.balance_loss(routing.scores, routing.topk_ids, self.load_count, token_mask=mask)
            loss = loss + self.balance_coefficient * balance
        if self.z_coefficient > 0:
            loss = loss + self.z_coefficient * losses.z_loss(logits, token_mask=mask)
        return loss

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, top_k={self.top_k}"


def _in_its_type(gate: nn.Module, tokens: Tensor) -> Tensor:
    """Calls a gate in the type of its weights, under autocast too."""
    weight = next(gate.parameters(), None)
    tokens = tokens if weight is None else tokens.to(weight.dtype)
    if not torch.amp.is_autocast_available(tokens.device.type):  # as on the meta device
        return gate(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        return gate(tokens)


def as_experts(owner: str, experts: nn.Module | Iterable[nn.Module], num_experts: int) -> nn.Module:
    """A module that runs experts by a plan: what is given, or ModuleExperts of a list. Raises for another number."""
    if type(experts) is nn.ModuleList or not isinstance(experts, nn.Module):
        experts = ModuleExperts(experts)
    count = getattr(experts, "num_experts", None)
    if count != num_experts:
        raise ValueError(f"{owner}: experts holds {count} experts, expected {num_experts} (num_experts)")
    return experts


def _shared(
    hidden: int, ffn: int, gated: bool, activation: Activation, bias: bool, where: dict[str, Any]
) -> tuple[FeedForward | None, nn.Linear | None]:
    if ffn == 0 and not gated:
        return None, None
    check.positive_int(_NAME, shared_ffn=ffn)
    shared = FeedForward(hidden, ffn, activation, bias, **where)
    return shared, nn.Linear(hidden, 1, bias=False, **where) if gated else None
