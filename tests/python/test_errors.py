"""Bad input: every error names the op or class, the argument, what it got and what it expected."""

import pytest
import torch
import turnout
from torch import nn
from turnout.nn import Perceptron

from turnout import compat

X = torch.randn(4, 3)
IDS = torch.tensor([[0, 1], [1, 0], [0, 1], [-1, 1]])
WEIGHTS = torch.ones(4, 2)
UP, DOWN = torch.randn(2, 10, 3), torch.randn(2, 3, 5)
PLAN = turnout.plan(IDS, 2)


def fused(x=X, ids=IDS, weights=WEIGHTS, up=UP, down=DOWN, activation="swiglu", **more):
    return turnout.fused_experts(x, ids, weights, up, down, activation, **more)


def packed():
    return turnout.prepack(UP, DOWN)


OPS = [
    (lambda: turnout.topk(X, 4), ValueError, "turnout::topk: top_k is 4, expected 1 to 3"),
    (lambda: turnout.topk(X, 0), ValueError, "turnout::topk: top_k is 0"),
    (lambda: turnout.topk(None, 1), ValueError, "turnout::topk: scores is not defined, expected a tensor"),
    (lambda: turnout.topk(IDS, 1), TypeError, "turnout::topk: scores is Long, expected float32"),
    (lambda: turnout.route(X[0], 1), ValueError, r"turnout::route: logits has shape \[3\], expected \[tokens, experts\]"),
    (lambda: turnout.route(X, 1, "softmax"), ValueError, "router weights is 'softmax', expected one of normalized"),
    (lambda: turnout.route(X, 4), ValueError, r"turnout::route: top_k is 4, expected 1 to 3 \(experts\)"),
    (lambda: turnout.route(X, 1, score="tanh"), ValueError, "score function is 'tanh', expected one of softmax, sigmoid"),
    (lambda: turnout.route(X, 1, groups=2), ValueError, "turnout::route: groups is 2, expected a divisor of 3 experts"),
    (lambda: turnout.route(X, 1, groups=3, kept_groups=4), ValueError, r"kept_groups is 4, expected 1 to 3 \(groups\)"),
    (lambda: turnout.route(X, 2, groups=3), ValueError, r"kept_groups is 1 of 1 experts each, expected at least 2 experts"),
    (lambda: turnout.route(X, 1, groups=3, group_top=2), ValueError, r"group_top is 2, expected 1 to 1 \(experts of a group\)"),
    (lambda: turnout.route(X, 1, group_mask="none"), ValueError, "group mask is 'none', expected one of minus_infinity, zero"),
    (lambda: turnout.route(X, 1, precision="half"), ValueError, "router precision is 'half', expected one of float32, logits"),
    (lambda: turnout.route(X, 1, scale=float("inf")), ValueError, "turnout::route: scale is inf, expected a finite number"),
    (lambda: turnout.route(X, 1, selection_bias=X[0, :2]), ValueError, r"selection_bias has shape \[2\], expected size 3"),
    (lambda: turnout.route(X, 1, token_mask=X[:, 0]), TypeError, "turnout::route: token_mask is Float, expected bool"),
    (lambda: turnout.route(X, 1, token_mask=X[:2, 0] > 0), ValueError, r"token_mask has shape \[2\], expected size 4 \(tokens\)"),
    (lambda: turnout.router_preset("dense"), ValueError, "router preset is 'dense', expected one of mixtral, qwen2_moe"),
    (lambda: turnout.route_top2(X, "most"), ValueError, "second-expert policy is 'most', expected one of all, none"),
    (lambda: turnout.route_top2(X[:, :1]), ValueError, "turnout::route_top2: logits has 1 experts, expected at least 2"),
    (lambda: turnout.route_top2(X, importance=X), ValueError, "turnout::route_top2: importance has shape"),
    (lambda: turnout.balance_loss(X, IDS[:2]), ValueError, r"turnout::balance_loss: topk_ids has shape \[2, 2\], expected size 4"),
    (lambda: turnout.balance_loss(X, IDS, "mean"), ValueError, "load count is 'mean', expected one of per_assignment"),
    (lambda: turnout.balance_loss(X, IDS, group_size=3), ValueError, "group_size is 3, expected a divisor of 4 tokens"),
    (lambda: turnout.balance_loss(X, WEIGHTS), TypeError, "turnout::balance_loss: topk_ids is Float, expected int64"),
    (lambda: turnout.z_loss(X[0]), ValueError, r"turnout::z_loss: logits has shape \[3\]"),
    (lambda: turnout.balance_loss(X, IDS, token_mask=X[:, 0]), TypeError, "turnout::balance_loss: token_mask is Float, expected bool"),
    (lambda: turnout.balance_loss_of_sums(X), ValueError, r"turnout::balance_loss_of_sums: sums has shape \[4, 3\], expected \[groups"),
    (lambda: turnout.expert_importance(IDS, X, 3), ValueError, r"expert_importance: topk_weights has shape \[4, 3\], expected \[4, 2\]"),
    (lambda: turnout.cv_squared(X), ValueError, r"turnout::cv_squared: values has shape \[4, 3\], expected \[experts\]"),
    (lambda: turnout.expert_counts(IDS, 1), (ValueError, RuntimeError), "turnout::expert_counts: topk_ids holds an id"),
    (lambda: turnout.update_selection_bias(X[0], IDS[0], 1.0), ValueError, r"counts has shape \[2\], expected size 3"),
    (lambda: turnout.update_selection_bias(X[0], X[0], -1.0), ValueError, "turnout::update_selection_bias: rate is -1"),
    (lambda: turnout.routing_statistics(turnout.route(X, 1), turnout.plan(IDS, 2)), ValueError, r"expert_offsets has shape \[3\], expected size 4"),
    (lambda: turnout.route_chosen(X, IDS[:2]), ValueError, r"turnout::route_chosen: topk_ids has shape \[2, 2\], expected size 4"),
    (lambda: turnout.route_chosen(X[:, :1], IDS), (ValueError, RuntimeError), "turnout::route_chosen: topk_ids holds an id"),
    (lambda: turnout.route_chosen(X, IDS - 2), (ValueError, RuntimeError), "turnout::route_chosen: topk_ids holds an id"),
    (lambda: turnout.route_chosen(X, IDS, epsilon=-1.0), ValueError, "turnout::route_chosen: epsilon is -1, expected"),
    (lambda: turnout.route_chosen(X, IDS[:, :0]), ValueError, r"topk_ids has shape \[4, 0\], expected top_k of at least 1"),
    (lambda: turnout.route_chosen(X, IDS, token_mask=X[:, 0]), TypeError, "route_chosen: token_mask is Float, expected bool"),
    (lambda: turnout.route_sinkhorn(X, 1, token_mask=X[:, 0]), TypeError, "route_sinkhorn: token_mask is Float, expected"),
    (lambda: turnout.sinkhorn(X[:, :0]), ValueError, r"logits has shape \[4, 0\], expected at least one expert"),
    (lambda: turnout.z_loss(X[:, :0]), ValueError, r"z_loss: logits has shape \[4, 0\], expected at least one expert"),
    (lambda: turnout.z_loss_of_sums(X[0, :2]), ValueError, r"z_loss_of_sums: sums has shape \[2\], expected size 3"),
    (lambda: turnout.z_loss_of_sums(X[0], X[0, :2]), ValueError, r"z_loss_of_sums: total has shape \[2\], expected \[3\]"),
    (lambda: turnout.update_selection_bias(X[0], X[0], float("inf")), ValueError, "rate is inf, expected a finite number"),
    (lambda: turnout.routing_statistics(turnout.route(X, 1), turnout.plan(IDS, 3), X[0]), ValueError, r"dropped has shape \[3\]"),
    (lambda: turnout.route_top2(X, uniform=IDS[:, 0]), TypeError, "turnout::route_top2: uniform is Long, expected float32"),
    (lambda: turnout.jitter(X, 0.1, uniform=X.long()), TypeError, "turnout::jitter: uniform is Long, expected float32"),
    (lambda: turnout.expert_parallel(X, IDS, WEIGHTS, UP, DOWN, num_experts=2), ValueError, "expert_parallel: group is None"),
    (lambda: turnout.jitter(X, 1.0), ValueError, "turnout::jitter: amount is 1, expected 0 to below 1"),
    (lambda: turnout.noisy_logits(X, X[:, :2]), ValueError, r"noise_logits has shape \[4, 2\], expected \[4, 3\] as logits has"),
    (lambda: turnout.noisy_load(X, turnout.noisy_logits(X, X), 4), ValueError, r"turnout::noisy_load: top_k is 4, expected 1 to 3"),
    (lambda: turnout.route_expert_choice(X, 0), ValueError, r"route_expert_choice: capacity is 0, expected at least 1"),
    (lambda: turnout.route_expert_choice(X, 1, 3), ValueError, "group_size is 3, expected a divisor of 4 tokens"),
    (lambda: turnout.sinkhorn(X, 0.0), ValueError, "turnout::sinkhorn: tolerance is 0, expected a number above 0"),
    (lambda: turnout.route_sinkhorn(X, 4), ValueError, "top_k is 4, expected 1 to 3"),
    (lambda: turnout.hash_ids(X, 4), TypeError, "turnout::hash_ids: token_ids is Float, expected int64"),
    (lambda: turnout.hash_ids(IDS, 4, 5), ValueError, r"turnout::hash_ids: top_k is 5, expected 1 to 4 \(experts\)"),
    (lambda: turnout.plan(IDS, 0), ValueError, "turnout::plan: num_experts is 0, expected at least 1"),
    (lambda: turnout.plan(IDS.float(), 2), TypeError, "turnout::plan: topk_ids is Float, expected int64 or int32"),
    (lambda: turnout.plan(IDS[0], 2), ValueError, r"turnout::plan: topk_ids has shape \[2\], expected \[tokens, top_k\]"),
    (lambda: turnout.plan(IDS, 1), (ValueError, RuntimeError), "turnout::plan: "),
    (lambda: turnout.plan(IDS - 1, 2), (ValueError, RuntimeError), "turnout::plan: "),
    (lambda: turnout.queue_positions(IDS, 2, 3), ValueError, "group_size is 3, expected a divisor of 4 tokens"),
    (lambda: turnout.queue_positions(IDS, 2, 4, "luck"), ValueError, "order is 'luck', expected one of choice"),
    (lambda: turnout.queue_positions(IDS, 2, 4, "score"), ValueError, "order 'score' needs priority"),
    (lambda: turnout.queue_positions(IDS, 2, 4, priority=WEIGHTS), ValueError, "order 'choice' takes no priority"),
    (lambda: turnout.limit_capacity(IDS, WEIGHTS, 2, 0, 4), ValueError, "capacity is 0, expected at least 1"),
    (lambda: turnout.limit_capacity(IDS, X, 2, 1, 4), ValueError, r"turnout::limit_capacity: topk_weights has shape \[4, 3\]"),
    (lambda: turnout.expert_capacity(4, 2, 2, factor=-1.0), ValueError, "factor is -1, expected a finite number"),
    (lambda: turnout.expert_capacity(4, 2, 2, rounding="up"), ValueError, "capacity rounding is 'up', expected one of ceil, floor, share"),
    (lambda: turnout.slot_plan(IDS, 2, 0, 4), ValueError, "turnout::slot_plan: capacity is 0, expected at least 1"),
    (lambda: turnout.slot_importance(X, PLAN), ValueError, r"turnout::slot_importance: topk_weights has shape \[4, 3\]"),
    (lambda: turnout.nested_ids(IDS, 3, 2), ValueError, r"turnout::nested_ids: topk_ids has shape \[4, 2\], expected rows in 3"),
    (lambda: turnout.dispatch_tensors(IDS, X, 2, 1, 4), ValueError, "turnout::dispatch_tensors: topk_weights has shape"),
    (lambda: turnout.dispatch(X[:3], PLAN), ValueError, r"turnout::dispatch: x has shape \[3, 3\], expected size 4"),
    (lambda: turnout.combine(X, WEIGHTS, PLAN), ValueError, r"turnout::combine: rows has shape \[4, 3\], expected size 8"),
    (lambda: turnout.combine(X[[0] * 8], X, PLAN), ValueError, "turnout::combine: topk_weights has shape"),
    (lambda: fused(x=X[0]), ValueError, r"turnout::fused_experts: x has shape \[3\], expected \[tokens, hidden\]"),
    (lambda: fused(ids=IDS[:2]), ValueError, r"turnout::fused_experts: topk_ids has shape \[2, 2\], expected size 4"),
    (lambda: fused(weights=WEIGHTS[:, :1]), ValueError, r"turnout::experts: topk_weights has shape \[4, 1\]"),
    (lambda: fused(weights=WEIGHTS.double()), TypeError, "turnout::experts: topk_weights is Double, expected Float$"),
    (lambda: fused(activation="tanh"), ValueError, "activation is 'tanh', expected one of relu, gelu, gelu_tanh, silu, swiglu, geglu, swiglu_clamped"),
    (lambda: fused(up=UP[:, :9]), ValueError, "turnout::experts: up has 9 rows an expert, expected an even number"),
    (lambda: fused(activation="gelu"), ValueError, r"turnout::experts: down has shape \[2, 3, 5\], expected size 10"),
    (lambda: fused(up=UP[..., :2]), ValueError, r"turnout::experts: up has shape \[2, 10, 2\], expected size 3"),
    (lambda: fused(down=DOWN.double()), TypeError, "turnout::experts: down is Double, expected Float as x is"),
    (lambda: fused(down=[DOWN[0]] * 3), ValueError, r"turnout::experts: down has 3 tensors, expected one bank or 2"),
    (lambda: fused(up=[]), ValueError, "turnout::fused_experts: up is empty"),
    (lambda: fused(up_bias=torch.ones(2, 5)), ValueError, r"turnout::experts: up_bias has shape \[2, 5\], expected size 10"),
    (lambda: fused(down_bias=torch.ones(3)), ValueError, "turnout::experts: down_bias has 1 tensors|down_bias has shape"),
    (lambda: fused(ids=IDS + 1), (ValueError, RuntimeError), "turnout::plan: "),
    (lambda: fused(down=None), TypeError, "turnout.fused_experts: down is None, expected a tensor or a list"),
    (lambda: fused(up=3), TypeError, "turnout.fused_experts: up is a int, expected a tensor or a list of tensors"),
    (lambda: fused(up=[UP[0], 3]), TypeError, "turnout.fused_experts: up holds a int, expected a tensor"),
    (lambda: fused(up=packed()), TypeError, "turnout.fused_experts: down is given beside packed weights"),
    (lambda: fused(up=packed(), down=None, activation="geglu"), ValueError, "activation is 'geglu', expected 'swiglu'"),
    (lambda: fused(x=X.to_sparse()), TypeError, "x is Sparse, expected a dense tensor"),
    (lambda: turnout.route(X.to_sparse(), 2), TypeError, "turnout::route: logits is Sparse, expected a dense tensor"),
    (lambda: fused(up=UP[0]), ValueError, r"turnout.fused_experts: up has shape \[.*\], expected 3 axes, the first of them"),
    (lambda: fused(up_bias=UP[0, :, 0]), ValueError, "turnout.fused_experts: up_bias has shape .* expected 2 axes"),
    (lambda: turnout.prepack(3, DOWN), TypeError, "turnout.prepack: up is a int, expected a tensor or a list"),
    (lambda: turnout.prepack(UP, DOWN[..., :4]), ValueError, r"turnout::experts: down has shape \[2, 3, 4\]"),
    (lambda: turnout.prepack([], []), ValueError, "turnout::prepack: up is empty"),
    (lambda: turnout.feed_forward(X, UP[0, :, :2], DOWN[0]), ValueError, "turnout::feed_forward: up has shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), OPS)
def test_ops(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def moe_layer(experts=None, gate=None, k=2):
    experts = [nn.Linear(3, 3) for _ in range(4)] if experts is None else experts
    return compat.MoeLayer(experts, gate or nn.Linear(3, 4), k)


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, rows):
        return self.make(rows)


def garbage(make):
    return moe_layer([Returns(make) for _ in range(4)])


CONFIG = compat.MoEConfig(4, 2)


def changed_config():
    config = compat.MoEConfig(4, 2)
    config.top_k = 9
    return config


COMPAT = [
    (lambda: moe_layer([]), ValueError, "MoeLayer: experts is empty, expected at least one module"),
    (lambda: moe_layer([torch.relu]), TypeError, r"MoeLayer: experts\[0\] is a .*, expected a torch.nn.Module"),
    (lambda: moe_layer(gate=torch.relu), TypeError, "MoeLayer: gate is a .*, expected a torch.nn.Module"),
    (lambda: moe_layer(k=5), ValueError, r"MoeLayer: num_experts_per_tok is 5, expected 1 to 4 \(experts\)"),
    (lambda: moe_layer(k=0), ValueError, "MoeLayer: num_experts_per_tok is 0, expected at least 1"),
    (lambda: moe_layer(k=2.0), TypeError, "MoeLayer: num_experts_per_tok is 2.0, expected an integer"),
    (lambda: moe_layer(gate=nn.Linear(3, 5))(X), ValueError, r"MoeLayer: gate returned \[4, 5\], expected logits of shape \[4, 4\]"),
    (lambda: moe_layer()(IDS), TypeError, "MoeLayer: inputs is torch.int64, expected a floating-point tensor"),
    (lambda: moe_layer()(3), TypeError, "MoeLayer: inputs is a int, expected a tensor"),
    (lambda: garbage(lambda r: r[:, :2])(X), ValueError, r"expert 0 \(Returns\) returned shape \[\d+, 2\] for rows of shape"),
    (lambda: garbage(lambda r: r.sum(0))(X), ValueError, r"expert 0 \(Returns\) returned shape \[3\]"),
    (lambda: garbage(lambda r: (r, 0))(X), TypeError, r"expert 0 \(Returns\) returned tuple, expected a tensor"),
    (lambda: compat.MoEConfig(num_experts=0), ValueError, "MoEConfig: num_experts is 0, expected at least 1"),
    (lambda: compat.MoEConfig(4, 5), ValueError, r"MoEConfig: top_k is 5, expected 1 to 4 \(num_experts\)"),
    (lambda: compat.MoEConfig(4, 2, 0.0), ValueError, "MoEConfig: capacity_factor is 0.0, expected a finite number above 0"),
    (lambda: compat.MoEConfig(4, 2, float("nan")), ValueError, "MoEConfig: capacity_factor is nan"),
    (lambda: compat.MoEConfig(4, 2, expert_capacity=0), ValueError, "MoEConfig: expert_capacity is 0, expected at least 1"),
    (lambda: compat.MoEConfig(True), TypeError, "MoEConfig: num_experts is True, expected an integer"),
    (lambda: compat.TopKRouter(0, CONFIG), ValueError, "TopKRouter: dim is 0, expected at least 1"),
    (lambda: compat.TopKRouter(-8, CONFIG), ValueError, "TopKRouter: dim is -8, expected at least 1"),
    (lambda: compat.TopKRouter(8, {"top_k": 2}), TypeError, "TopKRouter: config is a dict, expected a MoEConfig"),
    (lambda: compat.TopKRouter(8, changed_config()), ValueError, "MoEConfig: top_k is 9, expected 1 to 4"),
    (lambda: compat.TopKRouter(8, CONFIG)(torch.randn(2, 8)), ValueError, r"TopKRouter: x has shape \[2, 8\], expected \[batch, seq_len, dim\]"),
    (lambda: compat.MixtureOfExperts(0, CONFIG), ValueError, "MixtureOfExperts: dim is 0, expected at least 1"),
    (lambda: compat.MixtureOfExperts(8, CONFIG)(torch.randn(1, 2, 7)), ValueError, r"MixtureOfExperts: x has shape \[1, 2, 7\].*with 8 on the last axis"),
    (lambda: compat.SimpleMoELayer(8, 4, 5), ValueError, r"SimpleMoELayer: top_k is 5, expected 1 to 4 \(num_experts\)"),
    (lambda: compat.SimpleMoELayer(0, 4, 2), ValueError, "SimpleMoELayer: embedding_dim is 0, expected at least 1"),
    (lambda: compat.SimpleMoELayer(8, 4, 2, alpha=-1), ValueError, "SimpleMoELayer: alpha is -1, expected a finite number of at least 0"),
    (lambda: compat.SimpleMoELayer(8, 4, 2, load_count="all"), ValueError, "SimpleMoELayer: load_count is 'all', expected one of per_assignment"),
    (lambda: compat.SimpleMoELayer(8, 4, 2)(torch.randn(2, 3, 9)), ValueError, r"SimpleMoELayer: x has shape \[2, 3, 9\]"),
    (lambda: compat.MoELayer(8, 0), ValueError, "MoELayer: num_experts is 0, expected at least 1"),
    (lambda: compat.MoELayer(8, 4, 5), ValueError, r"MoELayer: top_k is 5, expected 1 to 4 \(num_experts\)"),
    (lambda: compat.MoELayer(8, 4, alpha=1.5), ValueError, "MoELayer: alpha is 1.5, expected None or 0 to 1"),
    (lambda: compat.MoELayer(8, 4, activation="swish"), ValueError, "activation is 'swish', expected one of relu, gelu, gelu_tanh, silu"),
    (lambda: compat.MoELayer(8, 4)(torch.randn(2, 7)), ValueError, r"MoELayer: x has shape \[2, 7\]"),
    (lambda: turnout.nn.run_experts([nn.Linear(3, 3)] * 3, X, WEIGHTS, PLAN), ValueError, "experts holds 3 modules, expected 2 as the plan has"),
    (lambda: compat.MoE(8, 4, experts=3), TypeError, "compat.MoE: experts is a int, expected a torch.nn.Module"),
    (lambda: compat.MoE(8, 4)(torch.randn(1, 4, 8).bfloat16()), TypeError, "Top2Gating: x is torch.bfloat16, expected torch.float32 as the weights"),
    (lambda: Perceptron(8, 8, "swiglu"), ValueError, "Perceptron: activation is 'swiglu'"),
    (lambda: compat.Top2Gating(8, 1), ValueError, "Top2Gating: num_gates is 1, expected at least 2"),
    (lambda: compat.Top2Gating(0, 4), ValueError, "Top2Gating: dim is 0, expected at least 1"),
    (lambda: compat.Top2Gating(8, 4, second_policy_eval="some"), ValueError, "Top2Gating: second_policy_eval is 'some', expected one of all, none"),
    (lambda: compat.Top2Gating(8, 4, capacity_factor_train=0.0), ValueError, "Top2Gating: capacity_factor_train is 0.0, expected a finite number above 0"),
    (lambda: compat.Top2Gating(8, 4)(torch.randn(2, 7)), ValueError, r"Top2Gating: x has shape \[2, 7\]"),
    (lambda: compat.MoE(8, 4, activation="relu"), TypeError, "Experts: activation is 'relu', expected a class or function that makes"),
    (lambda: compat.Experts(8, activation=nn.ReLU()), TypeError, r"Experts: activation is ReLU\(\), expected a class"),
    (lambda: compat.Experts(8, num_experts=(4, 0)), ValueError, "Experts: num_experts is 0, expected at least 1"),
    (lambda: compat.Experts(8, activation=nn.Tanh)(X, IDS, WEIGHTS), TypeError, "Experts: act is Tanh, expected ReLU, GELU or SiLU"),
    (lambda: compat.MoE(8, 4, loss_coef=-1.0), ValueError, "MoE: loss_coef is -1.0, expected a finite number of at least 0"),
    (lambda: compat.MoE(8, 4)(torch.randn(4, 8)), ValueError, r"MoE: inputs has shape \[4, 8\], expected \[b, n, dim\]"),
    (lambda: compat.MoE(8, 4, experts=Returns(lambda s: s[..., 0]))(torch.randn(1, 4, 8)), ValueError, r"experts \(Returns\) returned shape \[4, 4\] for slots of shape \[4, 4, 8\]"),
    (lambda: compat.HierarchicalMoE(8, (2, 2, 2)), ValueError, r"HeirarchicalMoE: num_experts is \(2, 2, 2\), expected a pair"),
    (lambda: compat.HierarchicalMoE(8, 4), ValueError, "HeirarchicalMoE: num_experts is 4, expected a pair"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), COMPAT)
def test_layers(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
