"""Whole models of each family: Turnout's experts against transformers' own eager ones."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_bounds import assert_as_exact, unit
from hf_families import (
    FAMILIES,
    Run,
    backward,
    forward,
    make_inputs,
    make_model,
    on_turnout,
    recorded_choices,
    sequences_of_one_mind,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
NEW_TOKENS = 32
families = pytest.mark.parametrize("family", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_gradients_as_exact(turnout: Run, eager: Run, truth: Run, scale: float = 0.0) -> None:
    """An expert module without tokens gets zeros where eager leaves it without a gradient (Switch)."""
    assert eager.gradients.keys() <= turnout.gradients.keys()
    for name, gradient in turnout.gradients.items():
        if name in eager.gradients:
            assert_as_exact(name, gradient, eager.gradients[name], truth.gradients[name], scale)
        else:
            assert ".experts." in name
            assert not gradient.any()


def wider(model):
    dtype = next(model.parameters()).dtype
    return copy.deepcopy(model).to(torch.float64 if dtype == torch.float32 else torch.float32)


@dtypes
@families
def test_logits_and_all_gradients(family, dtype) -> None:
    batch = 8
    eager = make_model(family, dtype)
    models = (on_turnout(eager), eager, wider(eager))
    inputs = make_inputs(family, batch, 8)
    rows = sequences_of_one_mind(batch, *(forward(model, inputs) for model in models))
    assert len(rows) >= (batch if dtype == torch.float32 else batch // 2)

    turnout_run, eager_run, truth = (backward(model, inputs, rows) for model in models)
    assert_as_exact("logits", *(run.logits[rows] for run in (turnout_run, eager_run, truth)))
    assert_gradients_as_exact(turnout_run, eager_run, truth)


@families
def test_one_token_leaves_most_experts_empty(family) -> None:
    eager = make_model(family)
    models = (on_turnout(eager), eager, wider(eager))
    inputs = make_inputs(family, 1, 1)
    runs = [backward(model, inputs, torch.tensor([0])) for model in models]
    assert_as_exact("logits", *(run.logits for run in runs))
    # The router's gradient is a difference of two near numbers, here of one token alone.
    largest = max(float(gradient.norm()) for gradient in runs[2].gradients.values())
    assert_gradients_as_exact(*runs, scale=largest)


@families
def test_padding_masks(family) -> None:
    eager = make_model(family)
    models = (on_turnout(eager), eager, wider(eager))
    inputs = make_inputs(family, 5, 7, padded=True)
    runs = [forward(model, inputs) for model in models]
    kept = slice(None) if "decoder_input_ids" in inputs else inputs["attention_mask"].bool()
    assert_as_exact("logits", *(run.logits[kept] for run in runs))


def generate(model, inputs: dict[str, Tensor]):
    prompt = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    with recorded_choices(model) as choices:
        result = model.generate(
            **prompt, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return result.sequences[:, -NEW_TOKENS:], torch.stack(result.logits, 1), choices


def steps_to_compare(logits: Tensor, dtype: torch.dtype, mine: list[Tensor], theirs: list[Tensor]) -> list[int]:
    """Of each sequence, how many greedy tokens must be the same.

    Up to the first token whose best two logits lie within what rounding moves them, and the first step at which the
    router came so near a tie that another expert ran. The logits of two runs differ by 2 to 4 u in norm, so two of them
    by about 4 √2 u of their root mean square, and 16 u is 3 standard deviations of that.
    """
    best = logits.double().topk(2).values
    close = best[..., 0] - best[..., 1] <= 16 * unit(dtype) * logits.double().square().mean().sqrt()
    batch, steps = close.shape
    calls = len(theirs) // steps  # a step; the first one has those of an encoder too
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        step = max(0, (index - (len(theirs) - steps * calls)) // calls)
        close[:, step] |= (a.reshape(batch, -1).sort().values != b.reshape(batch, -1).sort().values).any(-1)
    return [int(row.nonzero()[0]) if row.any() else steps for row in close]


@dtypes
@families
def test_greedy_tokens(family, dtype) -> None:
    eager = make_model(family, dtype)
    batch = 4 if dtype == torch.float32 else 32
    inputs = make_inputs(family, batch, 6, padded=dtype == torch.float32)
    tokens, _, mine = generate(on_turnout(eager), inputs)
    expected, logits, theirs = generate(eager, inputs)
    steps = steps_to_compare(logits, dtype, mine, theirs)
    if dtype == torch.float32:
        assert steps == [NEW_TOKENS] * batch
    assert sum(steps) >= NEW_TOKENS
    for sequence, count in enumerate(steps):
        assert tokens[sequence, :count].tolist() == expected[sequence, :count].tolist()
