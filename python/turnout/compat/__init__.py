"""The layers of five well-known descriptions of Mixture of Experts, under their own names.

Each keeps the names, arguments, attributes and defaults of its description and computes with this library's ops.
Where a description is ambiguous or slips, the docstring says what holds here.

  MoeLayer                                       LLMBook-zh, code 5.4
  MoEConfig, TopKRouter, MixtureOfExperts        top-k routing with capacity, after Shazeer 2017 and Fedus 2021
  SimpleMoELayer                                 the layer of an introductory course, with a balancing loss
  MoELayer                                       (output, aux_loss), optionally blended with a dense block
  Top2Gating, Experts, MoE, HeirarchicalMoE      the package mixture-of-experts 0.2.3 (GShard, tensor2tensor)
"""

from .auxiliary import MoELayer
from .gshard import Experts, HeirarchicalMoE, HierarchicalMoE, MoE, Top2Gating
from .module_list import MoeLayer
from .simple import SimpleMoELayer
from .top_k import MixtureOfExperts, MoEConfig, TopKRouter

__all__ = [
    "Experts",
    "HeirarchicalMoE",
    "HierarchicalMoE",
    "MixtureOfExperts",
    "MoE",
    "MoEConfig",
    "MoELayer",
    "MoeLayer",
    "SimpleMoELayer",
    "Top2Gating",
    "TopKRouter",
]
