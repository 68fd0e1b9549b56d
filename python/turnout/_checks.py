"""Argument checks of the layers: every error names the class, the argument, what it got and what it expected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def types_of(owner: str) -> Iterator[None]:
    """What torch says of an argument whose Python type an op does not take becomes a TypeError in one line."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).split("\n", 1)[0]
        _, found, said = first.partition("() Expected a value of type ")
        if not found:
            raise
        raise TypeError(f"{owner}: expected a value of type {said}") from error


def integer(owner: str, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{owner}: {name} is {value!r}, expected an integer")


def flag(owner: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{owner}: {name} is {value!r}, expected True or False")


def positive_int(owner: str, **values: object) -> None:
    integer(owner, **values)
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{owner}: {name} is {value}, expected at least 1")


def positive_number(owner: str, **values: object) -> None:
    for name, value in values.items():
        _number(owner, name, value)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{owner}: {name} is {value}, expected a finite number above 0")


def non_negative_number(owner: str, **values: object) -> None:
    for name, value in values.items():
        _number(owner, name, value)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{owner}: {name} is {value}, expected a finite number of at least 0")


def _number(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} is {value!r}, expected a number")


def top_k(owner: str, value: int, num_experts: int, *, name: str = "top_k", counted: str = "num_experts") -> None:
    positive_int(owner, **{name: value})
    if value > num_experts:
        raise ValueError(f"{owner}: {name} is {value}, expected 1 to {num_experts} ({counted})")


def one_of(owner: str, words: tuple[str, ...], **values: object) -> None:
    for name, value in values.items():
        if value not in words:
            raise ValueError(f"{owner}: {name} is {value!r}, expected one of {', '.join(words)}")


def module(owner: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, nn.Module):
            raise TypeError(f"{owner}: {name} is a {type(value).__name__}, expected a torch.nn.Module")


def function(owner: str, **values: object) -> None:
    """Each is None, or can be called."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise TypeError(f"{owner}: {name} is {value!r}, expected a function")


def of_tokens(owner: str, name: str, tensor: object, x: Tensor) -> None:
    """`tensor` is None, or has one entry a token of x [..., hidden]."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.shape != x.shape[:-1]:
        raise ValueError(
            f"{owner}: {name} has shape {list(tensor.shape)}, expected {list(x.shape[:-1])} (x without hidden)"
        )


def typed_as(owner: str, name: str, tensor: Tensor, weight: Tensor) -> None:
    """`tensor` has the type of `weight`, or autocast sees to it."""
    device = tensor.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if tensor.dtype != weight.dtype and not cast:
        raise TypeError(f"{owner}: {name} is {tensor.dtype}, expected {weight.dtype} as the weights are")


def shaped(owner: str, name: str, tensor: object, axes: str, last: int | None = None) -> None:
    """`tensor` is a floating-point tensor with the axes that `axes` names, such as "[batch, seq, dim]" or
    "[..., dim]", the last of them `last` long."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(tensor).__name__}, expected a tensor {axes}")
    if not tensor.is_floating_point():
        raise TypeError(f"{owner}: {name} is {tensor.dtype}, expected a floating-point tensor {axes}")
    count = axes.count(",") + 1
    fits = tensor.dim() >= count - 1 if "..." in axes else tensor.dim() == count
    if not fits or tensor.dim() == 0 or (last is not None and tensor.shape[-1] != last):
        size = "" if last is None else f" with {last} on the last axis"
        raise ValueError(f"{owner}: {name} has shape {list(tensor.shape)}, expected {axes}{size}")
