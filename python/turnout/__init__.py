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
from .losses import (  # noqa: E402
    RoutingStatistics,
    balance_loss,
    balance_loss_of_sums,
    balance_sums,
    cv_squared,
    expert_counts,
    expert_importance,
    routing_statistics,
    update_selection_bias,
    z_loss,
    z_loss_of_sums,
    z_sums,
)
from .nn import CapacityOptions, HierarchicalMoE, HierarchicalMoEOutput, MoE, MoEOutput  # noqa: E402
from .ops import (  # noqa: E402
    Capped,
    DispatchPlan,
    DispatchTensors,
    RouterOptions,
    Routing,
    Top2Routing,
    add_shared,
    apply_capacity,
    combine,
    dispatch,
    dispatch_tensors,
    expert_capacity,
    feed_forward,
    gate_logits,
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
)
from .parallel import expert_bounds, expert_parallel  # noqa: E402
from .pretrained import (  # noqa: E402
    PretrainedMoE,
    convert_checkpoint,
    load_moe_layer,
    pretrained_moe,
    published_tensors,
)
from .quantized import decode_fp8_blocks, decode_mxfp4  # noqa: E402
from .routers import (  # noqa: E402
    ExpertChoice,
    NoisyLogits,
    hash_ids,
    jitter,
    noisy_load,
    noisy_logits,
    route_chosen,
    route_expert_choice,
    route_sinkhorn,
    sinkhorn,
)
from .runtime import KernelChoice, kernel_choices, release_scratch  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CapacityOptions",
    "Capped",
    "DispatchPlan",
    "DispatchTensors",
    "ExpertChoice",
    "HierarchicalMoE",
    "HierarchicalMoEOutput",
    "KernelChoice",
    "MoE",
    "MoEOutput",
    "NoisyLogits",
    "PackedExperts",
    "PretrainedMoE",
    "RouterOptions",
    "Routing",
    "RoutingStatistics",
    "Top2Routing",
    "add_shared",
    "apply_capacity",
    "balance_loss",
    "balance_loss_of_sums",
    "balance_sums",
    "combine",
    "compat",
    "convert_checkpoint",
    "cv_squared",
    "decode_fp8_blocks",
    "decode_mxfp4",
    "dispatch",
    "dispatch_tensors",
    "expert_bounds",
    "expert_capacity",
    "expert_counts",
    "expert_importance",
    "expert_parallel",
    "feed_forward",
    "fused_experts",
    "gate_logits",
    "hash_ids",
    "jitter",
    "kernel_choices",
    "limit_capacity",
    "load_moe_layer",
    "nested_ids",
    "nn",
    "noisy_load",
    "noisy_logits",
    "plan",
    "prepack",
    "pretrained_moe",
    "published_tensors",
    "queue_positions",
    "release_scratch",
    "route",
    "route_chosen",
    "route_expert_choice",
    "route_sinkhorn",
    "route_top2",
    "router_preset",
    "router_preset_names",
    "routing_statistics",
    "sinkhorn",
    "slot_importance",
    "slot_plan",
    "topk",
    "update_selection_bias",
    "z_loss",
    "z_loss_of_sums",
    "z_sums",
]
