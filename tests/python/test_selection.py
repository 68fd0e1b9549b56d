"""turnout.MoE with selections other than top-k, a selection bias that keeps its type, and losses of all ranks."""

import copy

import pytest
import torch
import turnout
from naive import assert_close, mixture, of_bank
from torch import nn

HIDDEN, FFN, EXPERTS, TOKENS = 6, 5, 4, 24
TERMS = HIDDEN + FFN + 2
WORDS = torch.arange(TOKENS).view(2, 12) % 7


def layer_of(selection, **options) -> turnout.MoE:
    return turnout.MoE(HIDDEN, FFN, EXPERTS, selection=selection, dtype=torch.float64, **options)


def inputs() -> torch.Tensor:
    return torch.randn(2, 12, HIDDEN, dtype=torch.float64)


def scores_of(layer, x) -> torch.Tensor:
    return (x.reshape(-1, HIDDEN) @ layer.gate.weight.T).softmax(-1)


def of_loop(layer, x, ids, weights) -> torch.Tensor:
    bank = {name: getattr(layer.experts, name) for name in ("up", "down", "up_bias", "down_bias")}
    return mixture(x.reshape(-1, HIDDEN), ids, weights, of_bank(bank, "gelu")).view(x.shape)


class TestExpertChoice:
    @pytest.mark.parametrize(("factor", "per_sequence"), [(0.0, False), (0.5, False), (1.5, True)])
    def test_experts_run_on_what_they_pick(self, factor, per_sequence) -> None:
        capacity = turnout.CapacityOptions(factor=factor, per_sequence=per_sequence)
        layer, x = layer_of("expert_choice", capacity=capacity), inputs()
        made = layer(x)
        group = 12 if per_sequence else TOKENS
        places = round((factor or 1) * group * 2 / EXPERTS)  # top_k = 2 is the mean number of experts of a token
        scores = scores_of(layer, x)
        picked = torch.zeros_like(scores, dtype=torch.bool)
        for first in range(0, TOKENS, group):
            best = scores[first : first + group].topk(places, dim=0).indices
            picked[first : first + group].scatter_(0, best, True)
        ids = torch.where(picked, torch.arange(EXPERTS), -1)
        assert torch.equal(made.routing.topk_ids, ids)
        assert made.plan.tokens_per_expert.tolist() == [places * TOKENS // group] * EXPERTS
        assert_close(made.output, of_loop(layer, x, ids, scores * picked), TERMS)
        assert int(made.dropped) == 0

    def test_more_places_than_tokens_are_all_tokens(self) -> None:
        layer = layer_of("expert_choice", capacity=turnout.CapacityOptions(fixed=100))
        assert layer(inputs()).plan.tokens_per_expert.tolist() == [TOKENS] * EXPERTS
        assert layer(inputs()[:0]).output.shape == (0, 12, HIDDEN)

    def test_padding_is_picked_by_none(self) -> None:
        layer, x, mask = layer_of("expert_choice"), inputs(), torch.arange(TOKENS).view(2, 12) % 3 > 0
        made = layer(x, mask)
        assert not made.output[~mask].any()
        assert made.plan.tokens_per_expert.tolist() == [12] * EXPERTS  # 12 of 16 real tokens
        assert made.routing.topk_ids[~mask.flatten()].eq(-1).all()

    def test_everything_gets_a_gradient(self) -> None:
        layer = layer_of("expert_choice", shared_ffn=3, z_coefficient=1e-3)
        x = inputs().requires_grad_()
        made = layer(x)
        (made.output.square().sum() + made.aux_loss).backward()
        assert all(p.grad.any() for p in (x, *layer.parameters()))


class TestSinkhorn:
    def test_balances_in_training_alone(self) -> None:
        layer, x = layer_of("sinkhorn"), inputs()
        with torch.no_grad():
            layer.gate.weight[0] += 3 * x.flatten(0, 1).mean(0)  # an expert that many tokens like
        logits = x.flatten(0, 1) @ layer.gate.weight.T
        trained = layer(x)
        ids, weights, _ = turnout.route_sinkhorn(logits, 2)
        assert torch.equal(trained.routing.topk_ids, ids)
        assert_close(trained.output, of_loop(layer, x, ids, weights), TERMS)
        free = layer.eval()(x)
        assert torch.equal(free.routing.topk_ids, logits.topk(2).indices)
        spread = [int(made.plan.tokens_per_expert.max()) for made in (trained, free)]
        assert spread[0] < spread[1]

    def test_padding_takes_no_part(self) -> None:
        layer, x, mask = layer_of("sinkhorn"), inputs(), torch.arange(TOKENS).view(2, 12) % 3 > 0
        padded, real = layer(x, mask), layer(x[mask])
        assert_close(padded.output[mask], real.output, TERMS)
        assert not padded.output[~mask].any()

    def test_logits_of_any_size_balance(self) -> None:
        """Rows far below others, which a common factor would leave at 0."""
        logits = torch.randn(32, EXPERTS, dtype=torch.float64)
        far = logits + torch.linspace(-1000, 1000, 32, dtype=torch.float64).unsqueeze(1)
        scaled = turnout.sinkhorn(far, 1e-12)
        # up to the source's epsilon of 1e-8, beside sums of e⁻¹⁰ and more
        assert torch.allclose(scaled, turnout.sinkhorn(logits, 1e-12), rtol=1e-3)
        assert torch.allclose(scaled.sum(1), torch.full((32,), 1 / 32, dtype=torch.float64), rtol=1e-3)


class TestHash:
    def test_goes_by_the_words(self) -> None:
        layer, x = layer_of("hash", top_k=1, hash_seed=5), inputs()
        made = layer(x, token_ids=WORDS)
        ids = turnout.hash_ids(WORDS, EXPERTS, 1, 5)
        assert torch.equal(made.routing.topk_ids, ids)
        assert_close(made.output, of_loop(layer, x, ids, torch.ones(TOKENS, 1, dtype=torch.float64)), TERMS)
        other = layer_of("hash", top_k=1, hash_seed=6)(x, token_ids=WORDS)
        assert not torch.equal(other.routing.topk_ids, ids)

    def test_weights_are_those_of_the_router(self) -> None:
        layer, x = layer_of("hash", router="deepseek_v2_lite"), inputs()
        mask = WORDS != 3
        made = layer(x, mask, WORDS)
        ids = turnout.hash_ids(WORDS, EXPERTS, 2)
        kept = mask.flatten().unsqueeze(1)
        assert torch.equal(made.routing.topk_ids, ids.masked_fill(~kept, -1))
        assert_close(made.routing.topk_weights, scores_of(layer, x).gather(1, ids) * kept, TERMS)

    def test_groups_are_refused(self) -> None:
        with pytest.raises(ValueError, match="router.groups is 4, expected 1 with selection='hash'"):
            layer_of("hash", router={"groups": 4, "kept_groups": 2})

    def test_capacity_limits_it(self) -> None:
        layer = layer_of("hash", top_k=1, capacity=turnout.CapacityOptions(fixed=1))
        made = layer(inputs(), token_ids=torch.zeros(2, 12, dtype=torch.int32))
        assert int(made.dropped) == TOKENS - 1

    def test_compiles_whole(self) -> None:
        layer, x = layer_of("hash"), inputs()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x, token_ids=WORDS).output, layer(x, token_ids=WORDS).output, TERMS)


@pytest.mark.parametrize("selection", ["expert_choice", "sinkhorn", "hash"])
def test_no_balancing_loss(selection) -> None:
    layer, x = layer_of(selection, balance_coefficient=1, z_coefficient=0.5), inputs()
    made = layer(x, token_ids=WORDS)
    assert made.balance_loss is None
    expected = (x.flatten(0, 1) @ layer.gate.weight.T).logsumexp(-1).square().mean()
    assert_close(made.z_loss, expected, TERMS)
    assert_close(made.aux_loss, expected / 2, TERMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_selection_bias_stays_float32(dtype) -> None:
    """A step of 1e-3 is lost in bfloat16 from 0.5 on."""
    layer = turnout.MoE(HIDDEN, FFN, EXPERTS, router={"score": "sigmoid"}, selection_bias=True)
    bias = torch.tensor([0.5, -0.501, 1.001, 0.0])
    layer.selection_bias.copy_(bias)
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    moved = model[0]
    assert moved.gate.weight.dtype == dtype and moved.experts.up.dtype == dtype
    for state in (moved.selection_bias, dict(moved.named_buffers())["selection_bias"], moved.state_dict()["selection_bias"]):
        assert state.dtype == torch.float32 and torch.equal(state, bias)
    assert moved(torch.randn(5, HIDDEN, dtype=dtype)).output.dtype == dtype
    other = turnout.MoE(HIDDEN, FFN, EXPERTS, selection_bias=True, dtype=dtype)
    other.load_state_dict(moved.state_dict())
    assert torch.equal(other.selection_bias, bias)
    assert moved.to("meta").selection_bias.is_meta and moved.selection_bias.dtype == torch.float32


class Ranks:
    """Ranks that are played in turn: the first round notes what each would send, the second answers with the sums."""

    def __init__(self, count: int) -> None:
        self.sent: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.totals: list[torch.Tensor] | None = None
        self.rank = self.call = 0

    def take_turn(self, rank: int) -> None:
        self.rank, self.call = rank, 0

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        if self.totals is None:
            self.sent[self.rank].append(own)
            return own
        self.call += 1
        return self.totals[self.call - 1]


def test_losses_of_all_ranks() -> None:
    ranks = Ranks(3)
    options = {"balance_coefficient": 0.5, "z_coefficient": 0.25}
    layer = layer_of("topk", sum_over_ranks=ranks, **options)
    whole = copy.deepcopy(layer)
    whole.sum_over_ranks = None
    parts = torch.randn(TOKENS, HIDDEN, dtype=torch.float64).split([5, 16, 3])

    def losses() -> list[torch.Tensor]:
        made = []
        for rank, part in enumerate(parts):
            ranks.take_turn(rank)
            made.append(layer(part).aux_loss)
        return made

    losses()
    ranks.totals = [sum(sent) for sent in zip(*ranks.sent, strict=True)]
    expected = whole(torch.cat(parts)).aux_loss
    made = losses()
    for loss in made:
        assert_close(loss, expected, TOKENS)
    [mean] = torch.autograd.grad(sum(made) / 3, layer.gate.weight)
    [truth] = torch.autograd.grad(expected, whole.gate.weight)
    assert_close(mean, truth, TOKENS)


def test_output_holds_what_led_to_the_losses() -> None:
    layer, x = turnout.MoE(HIDDEN, FFN, EXPERTS, z_coefficient=0.5), torch.randn(9, HIDDEN)
    made = layer(x)
    assert torch.equal(made.logits, turnout.gate_logits(x, layer.gate.weight))
    assert torch.equal(made.balance_loss, turnout.balance_loss(made.routing.scores, made.routing.topk_ids))
    assert torch.equal(made.z_loss, turnout.z_loss(made.logits))
    assert_close(made.aux_loss, 1e-2 * made.balance_loss + 0.5 * made.z_loss, 4)
