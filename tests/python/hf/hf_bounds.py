"""How near a result must be to the exact one: measured by what transformers' own code reaches in the same type."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff."""
    return torch.finfo(dtype).eps / 2


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def assert_as_exact(name: str, turnout: Tensor, eager: Tensor, truth: Tensor, scale: float = 0.0) -> None:
    """Turnout is no further from the exact result than eager is: ‖turnout − truth‖ ≤ 3 ‖eager − truth‖ + 16 u ‖truth‖.

    truth comes of the same weights in the next wider type. Both errors are sums of many independent roundings of the
    same size; 3 is for their spread in small tensors, 16 u for those in which eager happens to round well. scale stands
    in for ‖truth‖ where it is larger.
    """
    assert turnout.dtype == eager.dtype
    assert turnout.shape == eager.shape
    scale = max(scale, float(truth.double().norm()))
    allowed = 3 * distance(eager, truth) + 16 * unit(eager.dtype) * scale
    error = distance(turnout, truth)
    assert error <= allowed, f"{name} is off by {error:.3e}, allowed {allowed:.3e}"
