"""The MoE layer: gate → selection → losses → capacity → plan → experts, + shared experts, each stage one op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import losses, ops, routers
from ..experts import Activation
from .feed_forward import FeedForward, FeedForwardBank, ModuleExperts
from .gate import Gate

_NAME = "turnout.MoE"
_OF_GROUPS = ("groups", "kept_groups", "group_top", "group_mask")
"""Switches that are part of a choice, which a hash is not."""


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

    def places(self, group_tokens: int, top_k: int, num_experts: int) -> int:
        """Places of an expert for a group of tokens, see expert_capacity()."""
        return ops.expert_capacity(
            group_tokens,
            top_k,
            num_experts,
            factor=self.factor,
            fixed=self.fixed,
            minimum=self.minimum,
            rounding=self.rounding,
            count_choices=self.count_choices,
        )

    def apply(self, routing: ops.Routing, num_experts: int, group_size: int) -> tuple[ops.Routing, Tensor]:
        """What is left of a routing, and how many choices were dropped (scalar int64).

        group_size: tokens of a group"""
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
    logits: Tensor
    """[tokens, experts]: what the gate gave, noise included"""
    balance_loss: Tensor | None
    """scalar before its coefficient; None where it is not computed"""
    z_loss: Tensor | None
    """scalar before its coefficient; None where that is 0"""


class MoE(nn.Module):
    """A feed-forward block of num_experts experts, top_k of which each token passes.

    hidden, ffn: of x, and of one expert
    activation, bias: of the experts, shared ones included; swiglu and geglu are gated
    shared_ffn: width of a block that every token passes beside its experts, 0: there is none; shared_gated: its output
      is multiplied by σ(shared_gate(x)) (Qwen2-MoE) instead of added as it is (DeepSeek)
    gate_bias: of the gate, a linear map from hidden to num_experts (nn.Linear, with the same bits at any thread count)
    selection: who is paired with whom; all but topk balance the load by themselves and have no balancing loss
      topk           a token takes its best experts, route()
      expert_choice  an expert takes its best tokens, route_expert_choice(): as many as capacity gives it places, with
                     factor 1 where it says nothing; top_k is then the mean number of experts of a token. Not causal
      sinkhorn       route_sinkhorn() in training, not causal; in evaluation the largest logits
      hash           hash_ids() of the token_ids that forward() gets; hash_seed: another one a layer
    router: how the experts of a token and their weights follow from the logits: switches of route() by name, or the
      name of a router_preset(); by default softmax, weights divided by their sum. With top_k = 1 only
      weights="probability" lets the output train the gate. For topk and hash; the others have weights of their own
    selection_bias: experts are chosen by score + a buffer selection_bias [num_experts], zeros at first, which no
      gradient moves (DeepSeek-V3); update_selection_bias() makes its next value. It stays float32 in whatever type the
      layer is: its steps are smaller than what lower types tell apart
    jitter: in training the router's input is x · uniform(1 ± jitter); jitter_experts: the experts see that input too
      (Mixtral in transformers)
    noisy: in training the logits are logits + noise · softplus(noise_gate(x)) (Shazeer)
    capacity: a CapacityOptions; by default nothing is dropped
    load_count, balance_coefficient, z_coefficient: the losses, see balance_loss() and z_loss(); with a coefficient of 0
      a loss is not computed
    sum_over_ranks: sums a tensor over the ranks of a job, see balance_loss(): both losses are then those of all ranks'
      tokens together; without it each rank balances its own
    gate: any module from [tokens, hidden] to logits [tokens, num_experts], in place of the linear map. It computes in
      the type of its own weights, under autocast too: `layer.gate.float()` keeps the router of a bfloat16 layer in
      float32
    experts: a list of modules from [rows, hidden] to [rows, hidden], or one module that is called on x, topk_weights
      and a DispatchPlan and has num_experts (FeedForwardBank, ModuleExperts), in place of the bank; ffn is then not
      read
    device, dtype: of the parameters made here

    Parameters: gate.weight [num_experts, hidden], gate.bias; experts.up, down, up_bias, down_bias as in
    FeedForwardBank; shared.* as in FeedForward; shared_gate.weight [1, hidden]; noise_gate.weight [num_experts,
    hidden], zeros at first. They and the buffer are those of turnout::MoE in C++, drawn in the same order.
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
        selection: routers.Selection = "topk",
        hash_seed: int = 0,
        router: ops.RouterOptions | Mapping[str, Any] | str | None = None,
        selection_bias: bool = False,
        jitter: float = 0.0,
        jitter_experts: bool = False,
        noisy: bool = False,
        capacity: CapacityOptions | None = None,
        load_count: losses.LoadCount = "per_assignment",
        balance_coefficient: float = 1e-2,
        z_coefficient: float = 0.0,
        sum_over_ranks: losses.SumOverRanks | None = None,
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
        check.one_of(_NAME, get_args(routers.Selection), selection=selection)
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.selection, self.hash_seed = selection, hash_seed
        self.router = _switches(selection, router)
        self.capacity = _capacity(selection, capacity)
        with check.types_of(_NAME):  # impossible switches raise, and those of a wrong type
            none = ops.route(torch.zeros(0, num_experts), top_k, **self.router)
            self.capacity.apply(none, num_experts, 0)
            routers.jitter(torch.zeros(0), jitter)
        flags = {"bias": bias, "shared_gated": shared_gated, "gate_bias": gate_bias, "selection_bias": selection_bias}
        check.flag(_NAME, jitter_experts=jitter_experts, noisy=noisy, **flags)
        check.flag(f"{_NAME}: capacity", per_sequence=self.capacity.per_sequence)
        check.integer(_NAME, hash_seed=hash_seed)
        check.function(_NAME, sum_over_ranks=sum_over_ranks)
        self.load_count = load_count
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.sum_over_ranks = sum_over_ranks

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = Gate(hidden, num_experts, bias=gate_bias, **where) if gate is None else gate
        check.module(_NAME, gate=self.gate)
        if experts is None:
            self.experts: nn.Module = FeedForwardBank(hidden, ffn, num_experts, activation, bias, **where)
        else:
            self.experts = as_experts(_NAME, experts, num_experts)
        if selection_bias and selection != "topk":
            raise ValueError(f"{_NAME}: selection_bias is set, but selection is {selection!r}, expected 'topk'")
        bias_made = torch.zeros(num_experts, dtype=torch.float32, device=device) if selection_bias else None
        self.register_buffer("selection_bias", bias_made)
        self.jitter, self.jitter_experts = jitter, jitter_experts
        self.noise_gate = Gate(hidden, num_experts, bias=False, **where) if noisy else None
        if self.noise_gate is not None:
            nn.init.zeros_(self.noise_gate.weight)
        self.shared, self.shared_gate = _shared(hidden, shared_ffn, shared_gated, activation, bias, where)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, token_ids: Tensor | None = None) -> MoEOutput:
        """x [..., hidden]; for capacity per sequence [..., sequence, hidden]. No tokens: an empty output, losses of 0.

        token_mask: x's shape without hidden, bool; False: padding, which takes no place, counts in no loss and gets
          zero from the routed experts
        token_ids: x's shape without hidden, int32 or int64: the words, which selection="hash" needs
        """
        per_sequence = self.capacity.per_sequence and not self.capacity.dropless
        check.shaped(_NAME, "x", x, "[..., sequence, hidden]" if per_sequence else "[..., hidden]", self.hidden)
        check.of_tokens(_NAME, "token_mask", token_mask, x)
        check.of_tokens(_NAME, "token_ids", token_ids, x)
        tokens = x.reshape(-1, self.hidden)
        group_size = x.shape[-2] if per_sequence else tokens.shape[0]
        mask = None if token_mask is None else token_mask.flatten()
        jittered = routers.jitter(tokens, self.jitter) if self.jitter > 0 and self.training else tokens
        logits = self._logits(jittered)
        tokens = jittered if self.jitter_experts else tokens
        if self.selection == "expert_choice":
            places = self.capacity.places(group_size, self.top_k, self.num_experts)
            routing, plan = routers.route_expert_choice(
                logits, places, group_size if per_sequence else 0, token_mask=mask
            )
            balance, z, aux_loss = self._losses(routing, logits, mask)
            dropped = routing.topk_ids.new_zeros(())
        else:
            routing = self._route(logits, mask, token_ids)
            balance, z, aux_loss = self._losses(routing, logits, mask)
            routing, dropped = self._limit(routing, group_size)
            plan = ops.plan(routing.topk_ids, self.num_experts)
        y = self.experts(tokens, routing.topk_weights, plan)
        if self.shared is not None:
            y = ops.add_shared(y, self.shared(tokens), None if self.shared_gate is None else self.shared_gate(tokens))
        return MoEOutput(y.reshape(x.shape), aux_loss, routing, plan, dropped, logits, balance, z)

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = _in_its_type(self.gate, tokens)
        expected = (tokens.shape[0], self.num_experts)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = f"has shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"is a {type(logits).__name__}"
            raise ValueError(f"{_NAME}: the gate's output {got}, expected {list(expected)} (tokens, num_experts)")
        if self.noise_gate is None or not self.training:
            return logits
        return routers.noisy_logits(logits, _in_its_type(self.noise_gate, tokens)).logits

    def _route(self, logits: Tensor, mask: Tensor | None, token_ids: Tensor | None) -> ops.Routing:
        if self.selection == "sinkhorn":
            return routers.route_sinkhorn(logits, self.top_k, self.training, token_mask=mask)
        if self.selection == "hash":
            if token_ids is None:
                raise ValueError(f"{_NAME}: token_ids is None, expected the words that selection='hash' goes by")
            ids = routers.hash_ids(token_ids, self.num_experts, self.top_k, self.hash_seed)
            how = {name: value for name, value in self.router.items() if name not in _OF_GROUPS}
            return routers.route_chosen(logits, ids, **how, token_mask=mask)
        return ops.route(logits, self.top_k, **self.router, selection_bias=self.selection_bias, token_mask=mask)

    def _limit(self, routing: ops.Routing, group_size: int) -> tuple[ops.Routing, Tensor]:
        if self.capacity.dropless:
            return routing, routing.topk_ids.new_zeros(())
        return self.capacity.apply(routing, self.num_experts, group_size)

    def _losses(
        self, routing: ops.Routing, logits: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Balance and z-loss before their coefficients, and what is to be added to the loss of the model."""
        shared: dict[str, Any] = {"token_mask": mask, "sum_over_ranks": self.sum_over_ranks}
        balance, z, aux_loss = None, None, routing.scores.new_zeros(())
        if self.balance_coefficient > 0 and self.selection == "topk":
            balance = losses.balance_loss(routing.scores, routing.topk_ids, self.load_count, **shared)
            aux_loss = aux_loss + self.balance_coefficient * balance
        if self.z_coefficient > 0:
            z = losses.z_loss(logits, **shared)
            aux_loss = aux_loss + self.z_coefficient * z
        return balance, z, aux_loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """What moves a module and changes its type: selection_bias moves, but stays float32."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias.dtype != bias.dtype:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, top_k={self.top_k}, selection={self.selection}"


def _switches(selection: str, router: object) -> dict[str, Any]:
    """The router's options as keywords."""
    if router is None:
        return {}
    if selection in ("expert_choice", "sinkhorn"):
        raise ValueError(
            f"{_NAME}: router is {router!r}, expected None: selection={selection!r} has weights of its own"
        )
    if isinstance(router, str):
        router = ops.router_preset(router)
    if not isinstance(router, Mapping):
        raise TypeError(f"{_NAME}: router is {router!r}, expected switches of route() by name, or the name of a preset")
    known = ops.RouterOptions.__annotations__
    for name in router:
        if name not in known:
            raise TypeError(f"{_NAME}: router holds {name!r}, expected switches of route(): {', '.join(known)}")
    if selection == "hash" and router.get("groups", 1) != 1:
        raise ValueError(f"{_NAME}: router.groups is {router['groups']}, expected 1 with selection='hash'")
    return dict(router)


def _capacity(selection: str, capacity: object) -> CapacityOptions:
    capacity = CapacityOptions() if capacity is None else capacity
    if not isinstance(capacity, CapacityOptions):
        raise TypeError(f"{_NAME}: capacity is {capacity!r}, expected a turnout.CapacityOptions")
    if selection == "expert_choice" and capacity.dropless:
        return replace(capacity, factor=1.0)  # experts pick as many tokens as there are places
    return capacity


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
    if count is None:
        raise TypeError(
            f"{owner}: experts is a {type(experts).__name__} without num_experts, expected a list of modules, or one "
            "that is called on x, topk_weights and a plan, as FeedForwardBank is"
        )
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
