"""What the tests compare with: each stage as the plainest loop over tokens, and tolerances derived from the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "swiglu_clamped")
GATED = ("swiglu", "geglu", "swiglu_clamped")


def activate(pre: Tensor, name: str) -> Tensor:
    plain = {
        "relu": torch.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
    }
    if name in plain:
        return plain[name](pre)
    gate, up = pre.chunk(2, -1)
    if name == "swiglu_clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return (F.silu(gate) if name == "swiglu" else F.gelu(gate)) * up


def perceptron(
    x: Tensor, up: Tensor, down: Tensor, name: str, up_bias: Tensor | None, down_bias: Tensor | None
) -> Tensor:
    return F.linear(activate(F.linear(x, up, up_bias), name), down, down_bias)


def mixture(x: Tensor, ids: Tensor, weights: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """y[t] = Σ_k weights[t, k] · experts[ids[t, k]](x[t]), token by token."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            expert = int(ids[t, k])
            if expert >= 0:
                y = y + weights[t, k].to(x.dtype) * experts[expert](x[t : t + 1])[0]
        rows.append(y)
    return torch.stack(rows) if rows else x.clone()


def bank(
    experts: int, hidden: int, ffn: int, activation: str, dtype: torch.dtype = torch.float64, bias: bool = True
) -> dict[str, Tensor | None]:
    """Random weights of a bank, by the names of fused_experts."""
    rows = 2 * ffn if activation in GATED else ffn
    return {
        "up": torch.randn(experts, rows, hidden, dtype=dtype) / hidden**0.5,
        "down": torch.randn(experts, hidden, ffn, dtype=dtype) / ffn**0.5,
        "up_bias": torch.randn(experts, rows, dtype=dtype) if bias else None,
        "down_bias": torch.randn(experts, hidden, dtype=dtype) if bias else None,
    }


def of_bank(weights: dict[str, Tensor | None], activation: str) -> list[Callable[[Tensor], Tensor]]:
    """The experts of a bank as functions of rows."""

    def expert(e: int) -> Callable[[Tensor], Tensor]:
        def part(name: str) -> Tensor | None:
            return None if weights[name] is None else weights[name][e]

        return lambda x: perceptron(x, part("up"), part("down"), activation, part("up_bias"), part("down_bias"))

    return [expert(e) for e in range(weights["up"].shape[0])]


def assert_close(actual: Tensor, expected: Tensor, terms: int) -> None:
    """Equal up to the rounding of sums of `terms` terms: |error| ≤ 4 · terms · eps · max |expected|.

    A sum of n terms rounds by at most n · eps of the sum of their sizes, which random signs keep within a small factor
    of the largest result; 4 covers the activation and the products around it.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel() == 0:
        return
    bound = 4 * terms * torch.finfo(expected.dtype).eps * float(expected.detach().abs().amax())
    error = float((actual - expected).detach().abs().amax())
    assert error <= bound, f"differs by {error:.3e}, allowed {bound:.3e}"
