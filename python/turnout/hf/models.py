"""patch() and unpatch(): all experts of a model onto Turnout, whichever way its family takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from .. import _checks as check
from .banks import IMPLEMENTATION, bank_of, packed_of, uses_interface

Model = TypeVar("Model", bound=nn.Module)

_REPLACED = "_turnout_replaced"


def patch(model: Model) -> Model:
    """Runs all experts of a transformers model by Turnout; returns the model, changed in place.

    For families with transformers' interface it is model.set_experts_implementation("turnout"); the experts of Switch
    Transformers become instances of a subclass. Parameters, their names and what save_pretrained writes stay the same.
    Patching twice changes nothing.
    Raises TypeError or ValueError, before anything is changed, for a model without experts that Turnout knows, with
    quantised weights, or with an activation or gate that Turnout does not compute.
    """
    if getattr(model, "is_quantized", False):
        raise TypeError(
            f"turnout.hf: {type(model).__name__} is quantised, and Turnout reads no quantised weights; load it without "
            "quantization_config, or dequantised"
        )
    found = dict(experts_of(model))
    if not found:
        raise ValueError(
            f"turnout.hf: {type(model).__name__} has no experts that Turnout knows: modules with transformers' experts "
            "interface, or SwitchTransformersExperts"
        )
    for module in found.values():
        if uses_interface(module) and packed_of(module) is None:
            bank_of(module)
    if any(uses_interface(module) for module in found.values()):
        if not hasattr(model, "set_experts_implementation"):
            raise TypeError(
                f"turnout.hf: {type(model).__name__} has no set_experts_implementation; expected a model of "
                "transformers, neither a part of one nor a module around it"
            )
        _use_interface(model)
    for module in found.values():
        if is_switch(module):
            from .switch import TurnoutSwitchExperts

            module.__class__ = TurnoutSwitchExperts
    return model


def unpatch(model: Model) -> Model:
    """Undoes patch(): transformers' own code runs the experts again. Packed experts are unpacked first.

    Raises RuntimeError where prepack() freed the weights.
    """
    from .packing import unpack

    unpack(model)
    for _, module in experts_of(model):
        if is_switch(module):
            from .switch import SwitchTransformersExperts

            module.__class__ = SwitchTransformersExperts
    config = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) == IMPLEMENTATION:
        model.set_experts_implementation(model.__dict__.pop(_REPLACED, None))  # None: transformers' default
    return model


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules that Turnout can run, by name."""
    check.module("turnout.hf", model=model)
    for name, module in model.named_modules():
        if uses_interface(module) or is_switch(module):
            yield name, module


def is_switch(module: nn.Module) -> bool:
    """Asked by name, so that the family is imported only for its own models."""
    return any(base.__name__ == "SwitchTransformersExperts" for base in type(module).__mro__)


def _use_interface(model: Any) -> None:
    current = model.config._experts_implementation
    if current == IMPLEMENTATION:
        return
    model.set_experts_implementation(IMPLEMENTATION)
    model.__dict__[_REPLACED] = current
