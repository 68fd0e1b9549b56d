"""The peers of torch, transformers and Turnout itself: each holds its own form of one bank's weights.

A peer has forward() → y without gradients, or step() → y after a backward with fresh gradients, which then lie in
x.grad, topk_weights.grad and expert_gradients(e). A class that cannot serve a case raises Absent, which says why.
"""

from __future__ import annotations

import pathlib
import sys
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from peers_cases import Case, activate, is_gated

PYTHON = pathlib.Path(__file__).resolve().parents[1] / "python"


class Absent(Exception):
    """Why a peer does not take part."""


class Peer:
    """Weights as plain parameters over the bank; call() computes y from them."""

    one_case_a_process = False  # True where a library keeps caches or pools that cannot be emptied

    def __init__(self, case: Case, wheels: pathlib.Path | None) -> None:
        self.case, self.activation, self.wheels = case, case.bank.activation, wheels
        self.prepare()
        self.take_weights(case.bank.up, case.bank.down, case.is_step)
        self.take_inputs(0)

    def prepare(self) -> None:
        """Imports and loads what the peer stands on."""

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        self.up, self.down = (w.detach().requires_grad_(step) for w in (up, down))
        self.leaves = [self.up, self.down]

    def take_inputs(self, i: int) -> None:
        """The i-th inputs of the case, over and over."""
        inputs = self.case.inputs[i % len(self.case.inputs)]
        self.x, self.topk_weights = (
            t.detach().requires_grad_(self.case.is_step) for t in (inputs.x, inputs.topk_weights))
        self.topk_ids, self.grad_y = inputs.topk_ids, inputs.grad_y

    def call(self) -> Tensor:
        raise NotImplementedError

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call()

    def step(self) -> Tensor:
        self.drop_gradients()
        y = self.call()
        y.backward(self.grad_y)
        return y

    def drop_gradients(self) -> None:
        for leaf in [self.x, self.topk_weights, *self.leaves]:
            leaf.grad = None

    def expert_gradients(self, e: int) -> tuple[Tensor, Tensor]:
        return self.up.grad[e], self.down.grad[e]

    def release_scratch(self) -> None:
        """Gives back what the library keeps between calls, where it can."""


def import_turnout():
    try:
        import turnout
    except ModuleNotFoundError:  # not installed: that of the source tree
        sys.path.insert(0, str(PYTHON))
        import turnout
    return turnout


class Turnout(Peer):
    """turnout.fused_experts over the plain bank."""

    recompute = False

    def prepare(self) -> None:
        self.turnout = import_turnout()

    def call(self) -> Tensor:
        return self.turnout.fused_experts(self.x, self.topk_ids, self.topk_weights, self.up, self.down,
                                          self.activation, recompute=self.recompute)

    def release_scratch(self) -> None:
        self.turnout.release_scratch()


class TurnoutRecompute(Turnout):
    """The same, with gate and up computed anew in the backward."""

    recompute = True

    def prepare(self) -> None:
        if not self.case.is_step:
            raise Absent("recompute concerns the backward alone")
        super().prepare()


class TurnoutPacked(Turnout):
    """Weights packed beforehand, as inference does."""

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        if step:
            raise Absent("packed weights are for inference")
        self.packed = self.turnout.prepack(up, down, self.activation)

    def call(self) -> Tensor:
        return self.turnout.fused_experts(self.x, self.topk_ids, self.topk_weights, self.packed)


def sorted_rows(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices in order of their expert, the token of each, and rows an expert."""
    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
    return order, order // topk_ids.shape[1], counts


def weighted_sum(rows: Tensor, order: Tensor, tokens: Tensor, topk_weights: Tensor, x: Tensor) -> Tensor:
    weighted = rows * topk_weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, tokens, weighted)


class Loop(Peer):
    """Two linears an expert, each over a parameter of its own, on rows sorted by expert."""

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        self.up, self.down = ([w.detach().requires_grad_(step) for w in bank] for bank in (up, down))
        self.leaves = self.up + self.down

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return functional.linear(activate(self.activation, functional.linear(rows, self.up[e])), self.down[e])

    def call(self) -> Tensor:
        order, tokens, counts = sorted_rows(self.topk_ids, len(self.up))
        parts = self.x[tokens].split(counts.tolist())
        outputs = torch.cat([self.expert(e, rows) for e, rows in enumerate(parts) if len(rows)])
        return weighted_sum(outputs, order, tokens, self.topk_weights, self.x)

    def expert_gradients(self, e: int) -> tuple[Tensor, Tensor]:
        return self.up[e].grad, self.down[e].grad


class PackedLoop(Loop):
    """The loop over weights that oneDNN packed beforehand, as torch.compile does when it freezes a model."""

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        if step:
            raise Absent("packed weights are for inference")
        if not torch.backends.mkldnn.is_available():
            raise Absent("this torch has no oneDNN")
        rows = max(1, self.case.inputs[0].topk_ids.numel() // len(up))
        self.up, self.down = ([torch.ops.mkldnn._reorder_linear_weight(w.detach(), rows) for w in bank]
                              for bank in (up, down))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        def linear(x: Tensor, weight: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        return linear(activate(self.activation, linear(rows, self.up[e])), self.down[e])


def grouped_experts(x, topk_ids, topk_weights, up, down, activation: str) -> Tensor:
    order, tokens, counts = sorted_rows(topk_ids, up.shape[0])
    ends = counts.cumsum(0).to(torch.int32)
    u = functional.grouped_mm(x[tokens], up.transpose(-2, -1), offs=ends)
    rows = functional.grouped_mm(activate(activation, u), down.transpose(-2, -1), offs=ends)
    return weighted_sum(rows, order, tokens, topk_weights, x)


class GroupedMM(Peer):
    """torch.nn.functional.grouped_mm over the bank."""

    run = staticmethod(grouped_experts)

    def prepare(self) -> None:
        if not hasattr(functional, "grouped_mm"):
            raise Absent(f"torch {torch.__version__} has no grouped_mm")

    def call(self) -> Tensor:
        return self.run(self.x, self.topk_ids, self.topk_weights, self.up, self.down, self.activation)


class Compiled(GroupedMM):
    """torch.compile of the same."""

    def prepare(self) -> None:
        super().prepare()
        torch.compiler.reset()
        torch._inductor.config.compile_threads = 1  # no processes of its own
        self.run = torch.compile(grouped_experts, fullgraph=True, dynamic=False)


class TransformersGrouped(Peer):
    """transformers' experts implementation grouped_mm, chosen as its configuration chooses it."""

    implementation = "grouped_mm"

    def prepare(self) -> None:
        try:
            from transformers.integrations.moe import use_experts_implementation
        except ImportError as error:
            raise Absent(f"transformers is not installed, or too old: {error}") from None
        self.decorate = use_experts_implementation

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        gated = is_gated(self.activation)

        class Experts(torch.nn.Module):
            def __init__(self, config: SimpleNamespace) -> None:
                super().__init__()
                self.num_experts = len(up)
                setattr(self, "gate_up_proj" if gated else "up_proj", torch.nn.Parameter(up.detach(), step))
                self.down_proj = torch.nn.Parameter(down.detach(), step)

            def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
                raise NotImplementedError  # replaced by the implementation

        self.experts = self.decorate(Experts, has_gate=gated)(
            SimpleNamespace(_experts_implementation=self.implementation))
        act = {"swiglu": "silu", "geglu": "gelu"}.get(self.activation, self.activation)
        self.experts.act_fn = lambda u: activate(act, u)
        self.up = self.experts.gate_up_proj if gated else self.experts.up_proj
        self.down = self.experts.down_proj
        self.leaves = [self.up, self.down]

    def call(self) -> Tensor:
        return self.experts(self.x, self.topk_ids, self.topk_weights)


class TransformersBatched(TransformersGrouped):
    """transformers' experts implementation batched_mm: a copy of the weights for each choice of a token."""

    implementation = "batched_mm"
    most_bytes = 8e9

    def prepare(self) -> None:
        copied = self.case.inputs[0].topk_ids.numel() * self.case.bank.expert_bytes * (3 if self.case.is_step else 1)
        if copied > self.most_bytes:
            raise Absent(f"would copy {copied / 1e9:.0f} GB of weights, a set for each choice of a token")
        super().prepare()
