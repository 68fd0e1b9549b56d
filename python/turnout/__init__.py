"""Turnout: Mixture of Experts on LibTorch.

The stages of an MoE layer as functions over tensors, each one an op that C++ shares: route, limit_capacity, plan,
dispatch, combine, fused_experts and the losses. MoE and HierarchicalMoE are modules of them; `turnout.compat` has the
layers of five well-known descriptions.
All ops run under torch.compile and torch.export without graph breaks, on the CPU and on any device of torch.
"""

from . import _library

_library.load()

from . import compat, nn  # noqa: E402  (ops exist from here on)
from .experts import PackedExperts, fused_experts, prepack  # noqa: E402
from .nn import CapacityOptions, HierarchicalMoE, HierarchicalMoEOutput, MoE, MoEOutput  # noqa: E402
from .ops import (  # noqa: E402
    Capped,
    DispatchPlan,
    DispatchTensors,
    RouterOptions,
    Routing,
    Top2Routing,
    add_shared,
    balance_loss,
    combine,
    dispatch,
    dispatch_tensors,
    expert_capacity,
    feed_forward,
    limit_capacity,
    nested_ids,
    plan,
    queue_positions,
    route,
    route_top2,
    router_preset,
    router_preset_names,
    slot_importance,
    slot_plan,
    topk,
    z_loss,
)
from .quantized import decode_fp8_blocks, decode_mxfp4  # noqa: E402
from .runtime import KernelChoice, kernel_choices, release_scratch  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CapacityOptions",
    "Capped",
    "DispatchPlan",
    "DispatchTensors",
    "HierarchicalMoE",
    "HierarchicalMoEOutput",
    "KernelChoice",
    "MoE",
    "MoEOutput",
    "PackedExperts",
    "RouterOptions",
    "Routing",
    "Top2Routing",
    "add_shared",
    "balance_loss",
    "combine",
    "compat",
    "decode_fp8_blocks",
    "decode_mxfp4",
    "dispatch",
    "dispatch_tensors",
    "expert_capacity",
    "feed_forward",
    "fused_experts",
    "kernel_choices",
    "limit_capacity",
    "nested_ids",
    "nn",
    "plan",
    "prepack",
    "queue_positions",
    "release_scratch",
    "route",
    "route_top2",
    "router_preset",
    "router_preset_names",
    "slot_importance",
    "slot_plan",
    "topk",
    "z_loss",
]
