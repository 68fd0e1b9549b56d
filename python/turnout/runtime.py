"""Which CPU kernels run on this machine, why the others do not, and the memory that they keep."""

from __future__ import annotations

from typing import NamedTuple

import torch


class KernelChoice(NamedTuple):
    """One implementation of the CPU kernels."""

    name: str
    reason: str
    """Why it was not taken; empty for the active one."""

    @property
    def active(self) -> bool:
        return not self.reason


def kernel_choices() -> list[KernelChoice]:
    """All implementations in order of preference: the first that this machine can run is active, unless the environment
    variable TURNOUT_FORCE_ISA named another when the first op ran.

    Raises ValueError when it names one that is unknown or that this machine lacks.
    """
    names, reasons = torch.ops.turnout.kernel_choices()
    return [KernelChoice(*pair) for pair in zip(names, reasons, strict=True)]


def release_scratch() -> None:
    """Frees the scratch and the freed outputs that kernels keep between calls, for when no op runs."""
    torch.ops.turnout.release_scratch()
