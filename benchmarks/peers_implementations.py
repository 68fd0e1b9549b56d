"""The peers: each holds its own form of one case's weights and runs a forward or a training step.

A peer has forward() → y without gradients, or step() → y after a backward with fresh gradients, which then lie in
x.grad, topk_weights.grad and expert_gradients(e).
"""

from __future__ import annotations

import pathlib
import sys

import torch
from torch import Tensor
from torch.nn import functional

PYTHON = pathlib.Path(__file__).resolve().parents[1] / "python"


class Absent(Exception):
    """Why a peer cannot run here."""


def activate(name: str, u: Tensor) -> Tensor:
    if name in ("swiglu", "geglu"):
        gate, up = u.chunk(2, -1)
        return (functional.silu(gate) if name == "swiglu" else functional.gelu(gate)) * up
    return {"relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu,
            "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh")}[name](u)


class Peer:
    """Bank tensors of its own; call() computes y from them."""

    def __init__(self, case, step: bool) -> None:
        self.activation, self.topk_ids, self.grad_y = case.activation, case.topk_ids, case.grad_y
        self.x = case.x.clone().requires_grad_(step)
        self.topk_weights = case.topk_weights.clone().requires_grad_(step)
        self.take_weights(case, step)

    def take_weights(self, case, step: bool) -> None:
        self.up, self.down = (w.clone().requires_grad_(step) for w in (case.up, case.down))
        self.leaves = [self.up, self.down]

    def call(self) -> Tensor:
        raise NotImplementedError

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call()

    def step(self) -> Tensor:
        for leaf in [self.x, self.topk_weights, *self.leaves]:
            leaf.grad = None
        y = self.call()
        y.backward(self.grad_y)
        return y

    def expert_gradients(self, e: int) -> tuple[Tensor, Tensor]:
        return self.up.grad[e], self.down.grad[e]


def import_turnout():
    try:
        import turnout
    except ModuleNotFoundError:  # not installed: that of the source tree
        sys.path.insert(0, str(PYTHON))
        import turnout
    return turnout


class Turnout(Peer):
    def __init__(self, case, step: bool) -> None:
        self.turnout = import_turnout()
        super().__init__(case, step)

    def call(self) -> Tensor:
        return self.turnout.fused_experts(self.x, self.topk_ids, self.topk_weights, self.up, self.down, self.activation)


class TurnoutPacked(Turnout):
    """Weights packed beforehand, as inference does."""

    def take_weights(self, case, step: bool) -> None:
        if step:
            raise Absent("packed weights are for inference")
        self.packed = self.turnout.prepack(case.up, case.down, case.activation)

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

    def take_weights(self, case, step: bool) -> None:
        self.up, self.down = ([w.clone().requires_grad_(step) for w in bank] for bank in (case.up, case.down))
        self.leaves = self.up + self.down

    def call(self) -> Tensor:
        order, tokens, counts = sorted_rows(self.topk_ids, len(self.up))
        outputs = []
        for rows, up, down in zip(self.x[tokens].split(counts.tolist()), self.up, self.down):
            if len(rows):
                outputs.append(functional.linear(activate(self.activation, functional.linear(rows, up)), down))
        return weighted_sum(torch.cat(outputs), order, tokens, self.topk_weights, self.x)

    def expert_gradients(self, e: int) -> tuple[Tensor, Tensor]:
        return self.up[e].grad, self.down[e].grad


def grouped_experts(x, topk_ids, topk_weights, up, down, activation: str) -> Tensor:
    order, tokens, counts = sorted_rows(topk_ids, up.shape[0])
    ends = counts.cumsum(0).to(torch.int32)
    u = functional.grouped_mm(x[tokens], up.transpose(-2, -1), offs=ends)
    rows = functional.grouped_mm(activate(activation, u), down.transpose(-2, -1), offs=ends)
    return weighted_sum(rows, order, tokens, topk_weights, x)


class GroupedMM(Peer):
    """torch.nn.functional.grouped_mm over the bank."""

    run = staticmethod(grouped_experts)

    def call(self) -> Tensor:
        return self.run(self.x, self.topk_ids, self.topk_weights, self.up, self.down, self.activation)


class Compiled(GroupedMM):
    """torch.compile of the same."""

    def take_weights(self, case, step: bool) -> None:
        super().take_weights(case, step)
        self.run = torch.compile(grouped_experts, fullgraph=True)


PEERS = {
    "turnout": Turnout,
    "turnout-packed": TurnoutPacked,
    "loop": Loop,
    "grouped_mm": GroupedMM,
    "compile": Compiled,
}
