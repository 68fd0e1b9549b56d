"""prepack() and unpack(): experts packed once for inference, beside their weights or in place of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..experts import prepack as prepack_bank
from .banks import _PACKED, IMPLEMENTATION, Bank, bank_of, packed_of
from .models import Model, experts_of, is_switch, patch

_FREED = "_turnout_freed"
_GUARDED = "_turnout_guarded"


def prepack(model: Model, free_weights: bool = False) -> Model:
    """Packs all experts of a model for inference; returns the model, patched and changed in place.

    The packed experts are a snapshot: weights that change later do not reach it (unpack, then prepack again;
    load_state_dict is refused meanwhile). They take the memory of the experts once more, unless free_weights is true:
    then each module's weights are freed as soon as they are packed, so that no more than one module's are held twice;
    the model can then be neither saved nor unpacked nor run by another implementation, each refused in words. Costs
    reading and writing the weights once. After it the model stays on its device and in its type. Modules that are
    packed already are left as they are.
    Raises what patch() raises.
    """
    patch(model)
    for name, module in experts_of(model):
        if packed_of(module) is None:
            bank = _bank(name, module)
            packed = prepack_bank(
                bank.up, bank.down, bank.activation, up_bias=bank.up_bias, down_bias=bank.down_bias
            )
            module.__dict__[_PACKED] = packed
            _guard(module)
            del bank
        if free_weights:
            _free(module)
    return model


def unpack(model: Model) -> Model:
    """Drops what prepack() packed: the plain weights run again, and training is possible.

    Raises RuntimeError where prepack() freed them.
    """
    found = [(name, module) for name, module in experts_of(model) if packed_of(module) is not None]
    for name, module in found:
        if _FREED in module.__dict__:
            raise RuntimeError(
                f"turnout.hf: the weights of {name} were freed by prepack(free_weights=True); load the model again"
            )
    for _, module in found:
        del module.__dict__[_PACKED]
    return model


def _bank(name: str, module: nn.Module) -> Bank:
    if not is_switch(module):
        return bank_of(module)
    from .switch import switch_bank

    bank = switch_bank(module)
    if bank is None:
        raise TypeError(
            f"turnout.hf: the experts of {name} cannot be packed: expected both matrices of one type, an activation "
            "that Turnout knows, and no dropout (call model.eval() first)"
        )
    return bank


def _guard(module: nn.Module) -> None:
    if _GUARDED not in module.__dict__:
        module.__dict__[_GUARDED] = True
        module.register_load_state_dict_pre_hook(_refuse_to_load)


def _free(module: nn.Module) -> None:
    if _FREED in module.__dict__:
        return
    module.__dict__[_FREED] = True
    module.register_state_dict_pre_hook(_refuse_to_save)
    module.register_forward_pre_hook(_refuse_another_implementation)
    for part in module.modules():
        for name in part._parameters:
            part._parameters[name] = None


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        f"turnout.hf: {prefix.rstrip('.')} has no weights to save, prepack(free_weights=True) freed them; save the "
        "model before, or pack it without free_weights"
    )


def _refuse_to_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    name = prefix.rstrip(".")
    if _FREED in module.__dict__:
        raise RuntimeError(
            f"turnout.hf: {name} takes no weights, prepack(free_weights=True) freed its own; load them into a model "
            "that is not packed"
        )
    if packed_of(module) is not None:
        raise RuntimeError(
            f"turnout.hf: {name} is packed, and what was packed would go on running; call turnout.hf.unpack(model) "
            "before loading and prepack(model) after it"
        )


def _refuse_another_implementation(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    config = getattr(module, "config", None)
    if config is not None and config._experts_implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"turnout.hf: the experts implementation is {config._experts_implementation!r}, but only "
            f"{IMPLEMENTATION!r} can run experts whose weights prepack(free_weights=True) freed"
        )
