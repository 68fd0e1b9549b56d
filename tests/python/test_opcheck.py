"""torch.library.opcheck for every op: schema, fake tensors, autograd registration, compiled graphs."""

import pytest
import torch
from naive import bank
from torch.utils._pytree import tree_map_only

import turnout

OPS = torch.ops.turnout
IDS = torch.tensor([[0, 2], [2, -1], [0, 2], [-1, -1]])
PLAN = turnout.plan(IDS, 3)
MASK = torch.tensor([True, True, False, True])
SLOTS = turnout.slot_plan(IDS, 3, 2, 2)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def expert_lists(layout: str) -> list[list[torch.Tensor]]:
    tensors = bank(3, 3, 2, "swiglu", torch.float32).values()
    parts = [[t] if layout == "bank" else [p.clone() for p in t.unbind()] for t in tensors]
    return [[p.requires_grad_() for p in part] for part in parts]


def experts_arguments(layout: str) -> tuple[object, ...]:
    return (leaf(4, 3), leaf(4, 2), *PLAN, *expert_lists(layout), "swiglu")


def without_gradients(arguments: tuple[object, ...]) -> tuple[object, ...]:
    return tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)


def packed_arguments() -> tuple[object, ...]:
    up, down, up_bias, down_bias = expert_lists("bank")
    packed = turnout.prepack(up, down, up_bias=up_bias, down_bias=down_bias)
    tensors = (torch.randn(4, 3), torch.rand(4, 2), *PLAN, packed.data)
    return (*tensors, packed.layout, packed.ffn, packed.up_bias, packed.down_bias, packed.activation)


CASES = {
    "gate_logits": lambda: (leaf(4, 3), leaf(5, 3), leaf(5)),
    "gate_logits_backward": lambda: (torch.randn(4, 5), torch.randn(4, 3), torch.randn(5, 3), [True] * 3),
    "topk": lambda: (leaf(4, 5), 2),
    "route": lambda: (leaf(4, 5), 2, "normalized"),
    "route_forward": lambda: (leaf(4, 6), 2, "sigmoid", "normalized", 0.1, 2.0, 3, 2, 2, "zero", torch.randn(6)),
    "route_backward": lambda: (
        torch.randn(4, 2), torch.randn(4, 3), torch.randn(4, 3), IDS.clamp_min(0), torch.rand(4, 3),
        "softmax", "probability", 0.0, 1.0,
    ),
    "route_chosen": lambda: (leaf(4, 3), IDS, "softmax_of_topk"),
    "jitter": lambda: (leaf(4, 3), 0.25, torch.rand(4, 3)),
    "noisy_logits": lambda: (leaf(4, 3), leaf(4, 3), 0.01, torch.randn(4, 3)),
    "noisy_load": lambda: (leaf(4, 3), leaf(4, 3), leaf(4, 3).abs() + 1, 2),
    "route_expert_choice": lambda: (leaf(4, 3), 2, 4),
    "sinkhorn": lambda: (torch.randn(4, 3),),
    "route_sinkhorn": lambda: (leaf(4, 3), 2),
    "hash_ids": lambda: (torch.arange(6), 5, 2, 7),
    "route_top2": lambda: (leaf(2, 6, 4), "threshold", 0.3),
    "balance_loss": lambda: (leaf(4, 3), IDS, "per_assignment", 2, MASK),
    "balance_sums": lambda: (leaf(4, 3), IDS, "first_choice", 2, MASK),
    "balance_loss_of_sums": lambda: (torch.rand(2, 8, requires_grad=True), torch.rand(2, 8)),
    "z_loss": lambda: (leaf(4, 3), MASK),
    "z_sums": lambda: (leaf(4, 3), MASK),
    "z_loss_of_sums": lambda: (torch.rand(3, requires_grad=True), torch.rand(3)),
    "expert_importance": lambda: (IDS, leaf(4, 2), 3),
    "cv_squared": lambda: (leaf(5),),
    "expert_counts": lambda: (IDS, 3),
    "update_selection_bias": lambda: (torch.randn(3), torch.tensor([1, 5, 2]), 0.1, True),
    "routing_statistics": lambda: (torch.rand(4, 3), PLAN[0], torch.tensor(2), MASK),
    "plan": lambda: (IDS, 3),
    "queue_positions": lambda: (IDS, 3, 2, "score", torch.rand(4, 2)),
    "limit_capacity": lambda: (IDS, leaf(4, 2), 3, 1, 2, "random", False, torch.rand(4, 2)),
    "slot_plan": lambda: (IDS, 3, 2, 2),
    "slot_importance": lambda: (torch.rand(4, 2), *SLOTS[1:]),
    "nested_ids": lambda: (IDS, 2, 3),
    "dispatch_tensors": lambda: (IDS, leaf(4, 2), 3, 2, 2),
    "dispatch": lambda: (leaf(4, 3), *PLAN[1:]),
    "combine": lambda: (leaf(8, 3), leaf(4, 2), *PLAN[1:]),
    "add_shared": lambda: (leaf(4, 3), leaf(4, 3), leaf(4, 1)),
    "experts": lambda: experts_arguments("bank"),
    "experts of lists": lambda: (*experts_arguments("list"), False, True),
    "experts_forward": lambda: (*without_gradients(experts_arguments("bank")), True),
    "prepack": lambda: (*without_gradients(expert_lists("list")[:2]), "swiglu"),
    "experts_packed": packed_arguments,
    "fused_experts": lambda: (leaf(4, 3), IDS, leaf(4, 2), *expert_lists("list"), "swiglu", True),
    "decode_mxfp4": lambda: (torch.randint(0, 256, (2, 3, 16), dtype=torch.uint8), torch.full((2, 3), 127).byte()),
    "decode_fp8_blocks": lambda: (torch.randn(5, 4).to(torch.float8_e4m3fn), torch.rand(3, 2), [2, 3]),
    "feed_forward": lambda: (leaf(2, 2, 3), leaf(4, 3), leaf(3, 2), leaf(4), None, "geglu"),
}


# opcheck adds all outputs up, beginning with the first, and cannot add float to int64: these are compiled elsewhere.
INTEGERS_FIRST = {
    "route", "route_forward", "route_top2", "route_chosen", "route_expert_choice", "route_sinkhorn", "limit_capacity",
    "routing_statistics",
}  # fmt: skip
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
# opcheck's test of the schema multiplies the inputs, which torch cannot do in float8.
FLOAT8_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("case", CASES)
def test_op(case) -> None:
    op = getattr(OPS, case.split()[0]).default
    checks = {"test_utils": CHECKS} if case in INTEGERS_FIRST else {}
    if case == "decode_fp8_blocks":
        checks = {"test_utils": FLOAT8_CHECKS}
    torch.library.opcheck(op, CASES[case](), **checks)


def test_route_with_every_option() -> None:
    options = {**turnout.router_preset("deepseek_v3"), "groups": 3, "kept_groups": 2}
    tensors = {"selection_bias": torch.randn(6), "token_mask": torch.tensor([True, True, False, True])}
    torch.library.opcheck(OPS.route.default, (leaf(4, 6), 2), {**options, **tensors}, test_utils=CHECKS)


@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_apply_capacity(factor) -> None:
    torch.library.opcheck(OPS.apply_capacity.default, (IDS, leaf(4, 2), 3, 2), {"factor": factor}, test_utils=CHECKS)


def test_experts_backward() -> None:
    """Without gradients of its own: it refuses a second derivative."""
    x, weights, *rest = without_gradients(experts_arguments("bank"))
    _, kept = OPS.experts_forward(x, weights, *rest, True)
    torch.library.opcheck(OPS.experts_backward.default, (torch.randn(4, 3), x, weights, *rest, kept, [True] * 6))


@pytest.fixture
def lone_group():
    """The name of a process group of one rank."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


def test_expert_parallel(lone_group) -> None:
    arguments = (leaf(4, 3), IDS, leaf(4, 2), *expert_lists("bank"), "swiglu", 3, lone_group, 2)
    torch.library.opcheck(OPS.expert_parallel.default, arguments)
    backward = (torch.randn(4, 3), *without_gradients(arguments), [True] * 6)
    torch.library.opcheck(OPS.expert_parallel_backward.default, backward)


def test_no_op_is_left_out() -> None:
    """A new op needs a case here."""
    declared = {
        schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("turnout::")
    }
    tested = {case.split()[0] for case in CASES}
    tested |= {"apply_capacity", "experts_backward", "expert_parallel", "expert_parallel_backward"}
    assert declared - tested == {
        "expert_bounds", "expert_capacity", "kernel_choices", "packed_layout", "release_scratch", "router_preset",
        "router_preset_names", "convert_checkpoint", "load_moe_layer", "pretrained_moe", "published_tensors",
    }  # words and numbers out, or files
