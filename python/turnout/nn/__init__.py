"""Modules over the ops: the MoE layers, their parts, and experts that are modules.

Names, shapes and initial values of parameters are those of the C++ modules, so a state_dict moves between both
languages.
"""

from .feed_forward import FeedForward, FeedForwardBank, ModuleExperts
from .hierarchical_moe import HierarchicalMoE, HierarchicalMoEOutput
from .moe import CapacityOptions, MoE, MoEOutput
from .perceptron import Perceptron, activation_name, run_experts
from .top2_gating import GatedChoices, Top2Gating

__all__ = [
    "CapacityOptions",
    "FeedForward",
    "FeedForwardBank",
    "GatedChoices",
    "HierarchicalMoE",
    "HierarchicalMoEOutput",
    "MoE",
    "MoEOutput",
    "ModuleExperts",
    "Perceptron",
    "Top2Gating",
    "activation_name",
    "run_experts",
]
