"""What the peers compute: weights and inputs of a shape, the float64 result that each is held against, and how far off
it may be.

T tokens, E experts, K choices of a token, D hidden, F ffn, U rows of `up`: 2·F for gated activations, else F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("forward", "step", "decode")
# ‖difference‖ / ‖reference‖. bf16 keeps 8 bits, and peers round gate, up, h and y: some 2⁻⁸ each; fp32 sums of a few
# thousand products lose some 2⁻²⁰.
TOLERANCE = {"bf16": 2e-2, "fp32": 2e-5}
CHECKED_EXPERTS = 3
ROUTINGS = 8  # decoding takes them in turn, so that no expert stays in a cache
SEED = 20240229


def is_gated(activation: str) -> bool:
    return activation in ("swiglu", "geglu")


def activate(name: str, u: Tensor) -> Tensor:
    if is_gated(name):
        gate, up = u.chunk(2, -1)
        return (functional.silu(gate) if name == "swiglu" else functional.gelu(gate)) * up
    return {"relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu,
            "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh")}[name](u)


@dataclass
class Bank:
    """The weights of one shape in one type. up [E, U, D], down [E, D, F]."""

    activation: str
    up: Tensor
    down: Tensor

    @classmethod
    def make(cls, shape: dict, type_: str) -> Bank:
        experts, hidden, ffn = shape["experts"], shape["hidden"], shape["ffn"]
        rows = ffn * (2 if is_gated(shape["activation"]) else 1)
        generator = torch.Generator().manual_seed(SEED)

        def draw(rows: int, columns: int) -> Tensor:
            bank = torch.empty(experts, rows, columns, dtype=TYPES[type_])
            for expert in bank:
                expert.copy_(torch.randn(rows, columns, generator=generator) * columns**-0.5)
            return bank

        return cls(shape["activation"], draw(rows, hidden), draw(hidden, ffn))

    @property
    def expert_bytes(self) -> int:
        return (self.up[0].numel() + self.down[0].numel()) * self.up.element_size()


@dataclass
class Inputs:
    """One call. x and grad_y [T, D], topk_ids [T, K] int64, topk_weights [T, K] float32."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    grad_y: Tensor

    @classmethod
    def make(cls, shape: dict, type_: str, tokens: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        weights, ids = torch.rand(tokens, shape["experts"], generator=generator).softmax(-1).topk(shape["top_k"])
        x, grad_y = (torch.randn(tokens, shape["hidden"], generator=generator).to(TYPES[type_]) for _ in range(2))
        return cls(x, ids, weights / weights.sum(-1, keepdim=True), grad_y)

    def rows_of_experts(self, experts: int) -> Tensor:
        return torch.bincount(self.topk_ids.flatten(), minlength=experts)


@dataclass
class Case:
    """One cell of the comparison: a bank, a pass, and the inputs that its runs take in turn."""

    name: str
    type: str
    which: str  # of PASSES
    bank: Bank
    inputs: list[Inputs]

    @classmethod
    def make(cls, shape: dict, type_: str, which: str, tokens: int, bank: Bank) -> Case:
        count = ROUTINGS if which == "decode" else 1
        inputs = [Inputs.make(shape, type_, tokens, SEED + 1 + i) for i in range(count)]
        return cls(f"{shape['name']} T={tokens}", type_, which, bank, inputs)

    @property
    def is_step(self) -> bool:
        return self.which == "step"

    def work(self, i: int) -> float:
        """Of the i-th run: flops of the products, 2 a multiply-add, a step being three forwards; for decoding the bytes
        of the weights of the experts that it uses."""
        if self.which == "decode":
            rows = self.inputs[i % len(self.inputs)].rows_of_experts(len(self.bank.up))
            return float(rows.count_nonzero() * self.bank.expert_bytes)
        products = self.bank.up[0].numel() + self.bank.down[0].numel()
        return 2.0 * self.inputs[0].topk_ids.numel() * products * (3 if self.is_step else 1)

    def busiest_experts(self) -> list[int]:
        counts = self.inputs[0].rows_of_experts(len(self.bank.up))
        return counts.argsort(descending=True)[:CHECKED_EXPERTS].tolist()


def reference(case: Case) -> dict[str, Tensor]:
    """Results in float64, one expert at a time: each output, and for a step the gradients that are checked."""
    if not case.is_step:
        return {f"y[{i}]": reference_forward(case.bank, inputs) for i, inputs in enumerate(case.inputs)}
    inputs, bank = case.inputs[0], case.bank
    x = inputs.x.double().requires_grad_()
    weights = inputs.topk_weights.double().requires_grad_()
    y = torch.zeros_like(inputs.x, dtype=torch.float64)
    result = {"y[0]": y, "x": torch.zeros_like(y), "topk_weights": torch.zeros_like(weights)}
    busiest = case.busiest_experts()
    for e in range(len(bank.up)):
        tokens, choices = (inputs.topk_ids == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        up, down = (w[e].double().requires_grad_(e in busiest) for w in (bank.up, bank.down))
        part = activate(bank.activation, x[tokens] @ up.T) @ down.T * weights[tokens, choices, None]
        y.index_add_(0, tokens, part.detach())
        leaves = {"x": x, "topk_weights": weights}
        if e in busiest:
            leaves |= {f"up[{e}]": up, f"down[{e}]": down}
        for name, grad in zip(leaves, torch.autograd.grad(part, list(leaves.values()), inputs.grad_y[tokens].double())):
            result[name] = result[name] + grad if name in result else grad
    return result


def reference_forward(bank: Bank, inputs: Inputs) -> Tensor:
    y = torch.zeros_like(inputs.x, dtype=torch.float64)
    for e in inputs.rows_of_experts(len(bank.up)).nonzero().flatten().tolist():
        tokens, choices = (inputs.topk_ids == e).nonzero(as_tuple=True)
        h = activate(bank.activation, inputs.x[tokens].double() @ bank.up[e].double().T)
        y.index_add_(0, tokens, h @ bank.down[e].double().T * inputs.topk_weights[tokens, choices, None].double())
    return y


def worst_error(expected: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[str, float]:
    """Which result is furthest off, and by what share of its norm; NaN counts as furthest."""
    errors = {name: float((got[name].detach().double() - value).norm() / value.norm())
              for name, value in expected.items()}
    return max(errors.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)
