"""`turnout inspect`: its numbers against the published package and against torch, its text, its refusals."""

import json
import math
import shutil

import mixture_of_experts.mixture_of_experts as oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from program import TINY, on_terminal, refuses, turnout


def inspect(*arguments):
    done = turnout("inspect", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def numbers(*arguments):
    return json.loads(inspect("--json", *arguments))


def drawn(batch=2, sequence=8, hidden=16, experts=4, seed=0):
    """Input, gate, uniform numbers and expert weights, drawn as the program draws them."""
    torch.manual_seed(seed)
    x, gate = torch.randn(batch, sequence, hidden), torch.randn(hidden, experts)
    uniform = torch.rand(batch, sequence)
    w1 = torch.empty(experts, hidden, 4 * hidden).uniform_(-1 / math.sqrt(4 * hidden), 1 / math.sqrt(4 * hidden))
    w2 = torch.empty(experts, 4 * hidden, hidden).uniform_(-1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
    return x, gate, uniform, w1, w2


def package(policy, factor, **sizes):
    """dispatch, combine and loss of the published gating on the same input."""
    x, gate, *_ = drawn(**sizes)
    gating = oracle.Top2Gating(x.shape[-1], num_gates=gate.shape[-1], second_policy_train=policy,
                               capacity_factor_train=factor)
    with torch.no_grad():
        gating.w_gating.copy_(gate)
        return gating(x)


def test_text_has_every_part_within_80_columns():
    for arguments in [], ["--hierarchical"], ["--experts", 64, "--sequence", 32], ["--step", 3], \
            ["--router", "mixtral", "--top-k", 3, "--experts", 8], \
            ["--router", "mixtral", "--top-k", 9, "--experts", 40, "--step", 3]:
        output = inspect(*arguments)
        assert "\033" not in output
        assert max(map(len, output.splitlines())) <= 80, [line for line in output.splitlines() if len(line) > 80]
    output = inspect()
    for title in "STAGES", "TOKENS", "SECOND-EXPERT POLICIES", "CAPACITY", "FROM BALANCED TO COLLAPSED":
        assert title in output
    for name in "raw_gates", "mask_1", "mask_2", "dispatch_tensor", "combine_tensor", "expert_inputs", "output", \
            "Routing.scores", "DispatchPlan.token_of_row":
        assert name in output


def test_shapes_are_those_of_the_package():
    dispatch, combine, _ = package("all", 1.25)
    stages = {row["described"]: row for row in numbers("--policy", "all")["stages"]["stages"]}
    assert stages["dispatch_tensor"]["described_shape"] == list(dispatch.shape)
    assert stages["combine_tensor"]["described_shape"] == list(combine.shape)
    assert stages["inputs"]["described_shape"] == stages["output"]["described_shape"] == [2, 8, 16]
    assert stages["expert_inputs"]["described_shape"] == [4, 2, 4, 16]


@pytest.mark.parametrize("policy", ["all", "none"])
@pytest.mark.parametrize("sizes", [{}, {"batch": 3, "sequence": 40, "experts": 8, "seed": 5}])
def test_policies_agree_with_the_package(policy, sizes):
    dispatch, _, loss = package(policy, 1.25, **sizes)
    options = [word for key, value in sizes.items() for word in (f"--{key}", value)]
    found = {entry["policy"]: entry for entry in numbers(*options)["policies"]}
    assert found[policy]["rows"] == dispatch.sum((0, 1, 3)).long().tolist()
    assert found[policy]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    choices = 2 if policy == "all" else 1
    tokens = dispatch.shape[0] * dispatch.shape[1]
    assert found[policy]["dropped"] == choices * tokens - dispatch.sum().item()


def test_tensors_too_large_to_make_are_counted():
    found = numbers("--view", "stages", "--batch", 1, "--sequence", 65536)
    assert list(found) == ["options", "stages"]
    stages = found["stages"]
    # 65,536 tokens, 4 experts, floor(1.25 · 65,536 / 4) places: 21 GB, were it made
    assert stages["dispatch_tensor_numbers"] == 65536 * 4 * 20480
    assert stages["dispatch_tensor_ones"] == stages["rows"]


def test_threshold_and_random_keep_what_their_rules_say():
    x, gate, uniform, *_ = drawn()
    best = torch.softmax(x @ gate, -1).topk(2).values
    second = best[..., 1] / (best.sum(-1) + 1e-9)
    for threshold in 0.1, 0.3:
        found = {entry["policy"]: entry for entry in numbers("--threshold", threshold)["policies"]}
        assert found["threshold"]["second_experts"] == (second > threshold).sum().item()
        assert found["random"]["second_experts"] == (uniform < second / threshold).sum().item()


def test_capacity_sweep_agrees_with_the_package():
    sizes = {"batch": 2, "sequence": 64, "experts": 4, "seed": 1}
    options = [word for key, value in sizes.items() for word in (f"--{key}", value)]
    for entry in numbers("--policy", "all", *options, "--factors", "0.5,1,1.5,4")["capacity"]:
        dispatch, _, _ = package("all", entry["factor"], **sizes)
        kept = dispatch.sum().item()
        assert entry["places"] == dispatch.shape[-1]
        assert entry["dropped"] == 2 * 128 - kept
        assert entry["idle"] == 2 * 4 * dispatch.shape[-1] - kept
        assert entry["tokens_without_expert"] == (dispatch.sum((2, 3)) == 0).sum().item()


def test_the_sweep_says_where_the_minimum_counts():
    line = "Up to a factor of 1.5 the minimum of 4 places counts (--minimum-capacity)."
    assert line in inspect("--view", "capacity")  # 8 tokens, 4 experts: a factor of 2 gives 4 places itself
    assert "minimum of" not in inspect("--view", "capacity", "--minimum-capacity", 0)


def test_collapse_goes_from_1_to_the_number_of_experts():
    for experts in 4, 8:
        steps = numbers("--experts", experts, "--sequence", 64)["collapse"]
        assert steps[0]["loss"] == pytest.approx(1, abs=1e-12) and steps[0]["max_over_mean"] == 1
        assert experts - 0.3 < steps[-1]["loss"] < experts and steps[-1]["max_over_mean"] == experts
        losses = [step["loss"] for step in steps]
        assert losses == sorted(losses)
        for step in steps:
            # confident gates make P nearly f: E · Σ f², less what they leave to the other experts
            shares = [rows / sum(step["wanted"]) for rows in step["wanted"]]
            assert step["loss"] == pytest.approx(experts * sum(f * f for f in shares), abs=0.3)


def test_a_step_shows_the_numbers_of_its_token():
    x, gate, _, w1, w2 = drawn()
    for token in 0, 3, 15:
        step = numbers("--policy", "all", "--step", token, "--capacity-factor", 4)["step"]
        row = x.view(16, 16)[token]
        scores = torch.softmax(row @ gate, -1)
        best = scores.topk(2)
        weights = best.values / best.values.sum()
        outputs = [torch.relu(row @ w1[e]) @ w2[e] for e in best.indices.tolist()]
        assert [choice["expert"] for choice in step["choices"]] == best.indices.tolist()
        for choice, weight, output in zip(step["choices"], weights, outputs):
            assert choice["fate"] == "kept"
            assert choice["weight"] == pytest.approx(weight.item(), rel=1e-5)
            assert choice["output"] == pytest.approx(output[:4].tolist(), rel=1e-4, abs=1e-6)
        y = weights[0] * outputs[0] + weights[1] * outputs[1]
        assert step["output"] == pytest.approx(y[:4].tolist(), rel=1e-4, abs=1e-6)
        assert step["logits"] == pytest.approx((row @ gate).tolist(), rel=1e-4, abs=1e-5)


def test_a_threshold_of_0_divides_by_the_least_number():
    text = inspect("--policy", "random", "--threshold", 0, "--step", 3)
    assert "/ 1e-09 is true: the second expert stays" in text


def test_collapse_has_the_places_of_the_other_tables():
    found = numbers("--router", "mixtral", "--top-k", 1, "--capacity-factor", 1)
    assert found["stages"]["capacity"] == 4  # ceil(1 · 16 · 1 / 4)
    assert [step["dropped"] for step in found["collapse"]] == [max(0, step["wanted"][0] - 4) for step in found["collapse"]]


def test_a_step_tells_drops_and_what_a_policy_left_out():
    fates = {choice["fate"] for token in numbers("--policy", "threshold", "--threshold", 0.3, "--sequence", 16,
                                                 "--capacity-factor", 0.5)["tokens"] for choice in token["choices"]}
    assert fates == {"kept", "dropped", "left out"}
    tokens = numbers("--policy", "threshold", "--threshold", 0.3)["tokens"]
    left = next(t["token"] for t in tokens if t["choices"][1]["fate"] == "left out")
    assert "is false: the second expert is left out" in inspect("--policy", "threshold", "--threshold", 0.3, "--step", left)


def test_two_levels_add_up():
    h = numbers("--hierarchical", "--sequence", 32, "--experts", 3, "--inner", 5, "--policy", "all")["hierarchy"]
    assert [rows for outer in h["inner"]["rows"] for rows in outer] == h["tokens_per_expert"]
    assert h["dropped"] == h["outer"]["dropped"] + h["inner"]["dropped"]
    assert h["aux_loss"] == pytest.approx(h["loss_coefficient"] * (h["outer"]["loss"] + h["inner"]["loss"]), rel=1e-5)
    slots = 3 * 2 * h["outer"]["capacity"]
    assert h["first_choice_slots"] + h["second_choice_slots"] + h["empty_slots"] == slots
    assert sum(h["outer"]["rows"]) == slots - h["empty_slots"]


def test_other_routers_and_orders():
    for router in "mixtral", "switch", "gpt_oss":
        found = numbers("--router", router, "--top-k", 3, "--experts", 6, "--drop-order", "random", "--seed", 2)
        assert "policies" not in found
        x, gate, *_ = drawn(experts=6, seed=2)
        best = (x @ gate).view(16, 6).topk(3).indices.tolist()
        assert [[c["expert"] for c in token["choices"]] for token in found["tokens"]] == best
        kept = sum(c["fate"] == "kept" for token in found["tokens"] for c in token["choices"])
        assert kept == found["stages"]["rows"]


@pytest.mark.parametrize("arguments, words", [
    ("--experts 1", "--experts is 1, expected 2"),
    ("--batch 0", "--batch is 0"),
    ("--hidden 99999999", "--hidden is 99999999"),
    ("--batch 60000 --sequence 60000", "too many tokens"),
    ("--experts 60000 --inner 60000", "too many experts"),
    ("--policy some", "'some', expected one of all, none, threshold, random"),
    ("--router best", "--router is 'best', expected one of mixtral"),
    ("--minimum-capacity 9223372036854775807", "--minimum-capacity is 9223372036854775807, expected 0 to 65536"),
    ("--minimum-capacity 65536 --batch 60 --experts 60", "too many to look at: lower --minimum-capacity"),
    ("--hierarchical --drop-order score", "--drop-order does not reach the hierarchical view"),
    ("--view hierarchy --minimum-capacity 1", "--minimum-capacity does not reach the hierarchical view"),
    ("--router deepseek_v3", "groups"),
    ("--top-k 3", "--top-k is 3, expected 2 with --router gshard"),
    ("--router mixtral --top-k 9", "--top-k is 9, expected 1 to the number of experts, 4"),
    ("--threshold -1", "--threshold is -1"),
    ("--capacity-factor nan", "--capacity-factor is nan"),
    ("--factors 1,-2", "--factors holds -2"),
    ("--drop-order last", "'last'"),
    ("--view everything", "'everything', expected one of stages"),
    ("--step 16", "--step is 16, expected a token from 0 to 15"),
    ("--seed -1", "--seed"),
    ("--checkpoint no/such/folder", "no/such/folder"),
    ("--checkpoint no/such/folder --batch 1", "--batch is an option of the drawn example"),
    ("--checkpoint no/such/folder --view tokens", "--view is an option of the drawn example"),
    ("--router mixtral --policy all", "--policy belongs to --router gshard, but --router is 'mixtral'"),
    ("--router mixtral --hierarchical", "--hierarchical belongs to --router gshard"),
    ("--router mixtral --view policies", "--view policies belongs to --router gshard"),
    ("--router deepseek_v3 --experts 8 --top-k 3", "--router deepseek_v3 does not fit --experts 8 --top-k 3: "),
    ("--step -1", "--step is -1, expected a token from 0 to 15"),
    ("--seed 18446744073709551616", "--seed: is 18446744073709551616, expected 0 to 18446744073709551615"),
    ("--html .", ".: cannot be replaced by a file: is a folder"),
    ("--text README.md", "--text requires --checkpoint"),
    ("--html no/such/folder/page.html", "no/such/folder/page.html"),
])
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path):
    assert words in refuses("inspect", *arguments.split(), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_an_empty_path_is_refused():
    for arguments in ["--checkpoint", ""], ["--html", ""], ["--checkpoint", "no/such/folder", "--text", ""]:
        assert f"{arguments[-2]} is empty, expected a path" in refuses("inspect", *arguments)


def test_a_terminal_gets_colour_unless_no_color_is_set():
    assert b"\033[1m" in on_terminal(["inspect"], "stdout", NO_COLOR="")
    assert b"\033" not in on_terminal(["inspect"], "stdout", NO_COLOR="1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    book = folder / "book.txt"
    book.write_text("the points are set for the other line; " * 200)
    out = folder / "model"
    done = turnout("train", *TINY, "--pattern", "alternating", "--capacity", 0.8, "--text", book, "--tokens", 64 * 40,
                   "--output", out)
    assert done.returncode == 0, done.stderr
    return out, book


def test_a_trained_layer_on_its_text(checkpoint):
    folder, book = checkpoint
    layer = numbers("--checkpoint", folder, "--layer", 1, "--text", book, "--tokens", 1024)["layer"]
    trace = layer["trace"]
    assert trace["tokens"] == 1024 and trace["choices"] == 2048
    assert sum(trace["rows"]) + trace["dropped"] == 2048 and trace["dropped"] > 0
    assert trace["max_over_mean"] == pytest.approx(max(trace["rows"]) * 4 / sum(trace["rows"]))
    assert 0 < trace["entropy"] < trace["entropy_max"] == pytest.approx(math.log(4))
    assert [taker["rows"] for taker in layer["takers"]] == trace["rows"]
    for taker in layer["takers"]:
        for byte in taker["bytes"]:
            assert byte["lift"] == pytest.approx(byte["share"] / byte["text_share"]) and byte["lift"] > 1
        for example in taker["examples"]:
            assert example["before"] + example["at"] + example["after"] in book.read_text()
    output = inspect("--checkpoint", folder, "--layer", 1, "--text", book)
    assert "WHAT EACH EXPERT TAKES" in output
    assert max(len(line) for line in output.splitlines() if str(folder.parent) not in line) <= 80


def test_steps_through_a_trained_layer_are_those_of_its_trace(checkpoint, tmp_path):
    """What the trace says of a forward through the whole model, the steps say token by token."""
    folder, _ = checkpoint
    (tmp_path / "text").write_text("pts")  # one window of three bytes: 2 places for 6 choices of 4 experts
    layers = [numbers("--checkpoint", folder, "--layer", 1, "--text", tmp_path / "text", "--step", t)["layer"]
              for t in range(3)]
    trace, steps = layers[0]["trace"], [layer["step"] for layer in layers]
    assert trace["tokens"] == 3 and all(layer["trace"] == trace for layer in layers)
    logits = torch.tensor([step["logits"] for step in steps])
    assert trace["logit_rms"] == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-5)
    assert trace["logit_max"] == pytest.approx(logits.abs().max().item(), rel=1e-5)
    best = logits.topk(2).indices.tolist()
    assert [[choice["expert"] for choice in step["choices"]] for step in steps] == best
    kept = [choice["expert"] for step in steps for choice in step["choices"] if choice["fate"] == "kept"]
    assert [kept.count(e) for e in range(4)] == trace["rows"] and 6 - len(kept) == trace["dropped"]
    for step, byte in zip(steps, "pts"):
        assert step["text"]["at"] == byte and step["capacity"] == 2
        scores = torch.tensor(step["logits"]).softmax(0)
        weights = scores.topk(2).values / scores.topk(2).values.sum()
        y = torch.zeros(4)
        for choice, weight in zip(step["choices"], weights.tolist()):
            assert choice["weight"] == pytest.approx(weight, rel=1e-5)
            if choice["fate"] == "kept":
                assert choice["slot"] == 2 * choice["expert"] + choice["place"]
                y += weight * torch.tensor(choice["output"])
        assert step["output"] == pytest.approx(y.tolist(), rel=1e-4, abs=1e-6)
    output = inspect("--checkpoint", folder, "--layer", 1, "--text", tmp_path / "text", "--step", 1)
    assert "TOKEN 1: SEQUENCE 0, POSITION 1" in output and "  text    p[t]s" in output
    assert "weights: the probabilities, divided by their sum" in output and "WHAT EACH" not in output
    assert "--step is 3, expected a token from 0 to 2" in refuses("inspect", "--checkpoint", folder, "--layer", 1, "--text",
                                                                  tmp_path / "text", "--step", 3)


def test_no_more_tokens_than_asked_for(checkpoint):
    folder, book = checkpoint
    layer = numbers("--checkpoint", folder, "--layer", 1, "--text", book, "--tokens", 3)["layer"]
    assert layer["trace"]["tokens"] == 3
    few = inspect("--checkpoint", folder, "--layer", 1, "--text", book, "--tokens", 3)
    assert few.count("bytes  none more often than others") == 4


def spoiled(folder, part, to):
    """The checkpoint with NaN in the tensors of layer 1 whose name holds `part`."""
    shutil.copytree(folder, to)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
        found = [name for name in names if "layer_1" in name and part in name]
        assert found
        save_file(tensors | {name: tensors[name] * math.nan for name in found}, to / "model.safetensors", file.metadata())
    return to


def test_weights_that_are_no_numbers(checkpoint, tmp_path):
    folder, book = checkpoint
    gate = spoiled(folder, "gate", tmp_path / "gate")
    for fed in [], ["--text", book]:
        assert "router logits that are NaN" in refuses("inspect", "--checkpoint", gate, "--layer", 1, *fed)
    experts = spoiled(folder, "down", tmp_path / "experts")
    assert "[nan, nan, nan, nan, …]" in inspect("--checkpoint", experts, "--layer", 1, "--tokens", 9, "--step", 3)


def test_a_trained_layer_on_random_rows(checkpoint):
    folder, _ = checkpoint
    trace = numbers("--checkpoint", folder, "--layer", 1, "--tokens", 100)["layer"]["trace"]
    assert trace["tokens"] == 100
    assert trace == numbers("--checkpoint", folder, "--layer", 1, "--tokens", 100)["layer"]["trace"]


def test_layers_and_folders_that_do_not_fit_are_refused(checkpoint, tmp_path):
    folder, book = checkpoint
    assert "--layer is 2, expected 0 to 1" in refuses("inspect", "--checkpoint", folder, "--layer", 2)
    assert "--layer is 0, which is dense" in refuses("inspect", "--checkpoint", folder, "--layer", 0)
    assert "no/such/text" in refuses("inspect", "--checkpoint", folder, "--layer", 1, "--text", "no/such/text")
    assert "--tokens is 0" in refuses("inspect", "--checkpoint", folder, "--layer", 1, "--tokens", 0)
    empty = tmp_path / "empty"
    empty.write_text("")
    assert f"{empty}: the text is empty" in refuses("inspect", "--checkpoint", folder, "--layer", 1, "--text", empty)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert str(tmp_path / "config.json") in refuses("inspect", "--checkpoint", tmp_path)


def test_a_router_of_sigmoids_says_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    step = numbers("--checkpoint", tmp_path, "--tokens", 20, "--step", 7)["layer"]["step"]
    kept = torch.sigmoid(torch.tensor([step["logits"][choice["expert"]] for choice in step["choices"]]))
    weights = [choice["weight"] for choice in step["choices"]]
    assert weights == pytest.approx((2.5 * kept / kept.sum()).tolist(), rel=1e-5)
    output = inspect("--checkpoint", tmp_path, "--tokens", 20, "--step", 7)
    assert "weights: the sigmoids of the logits, divided by their sum, times 2.5" in output
    assert "chosen by sigmoid + bias" in output
    assert max(len(line) for line in output.splitlines() if str(tmp_path) not in line) <= 80


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_a_layer_of_a_published_model_on_random_rows(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "num_experts_per_tok": 2,
             "num_local_experts": 6, "num_experts": 6, "shared_expert_intermediate_size": 20,
             "mlp_only_layers": [0] if family == "Qwen3Moe" else None}
    config = getattr(transformers, f"{family}Config")(**{k: v for k, v in sizes.items() if v is not None})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    [gate] = [p for name, p in model.named_parameters() if "layers.1." in name and name.endswith(".gate.weight")]
    layer = numbers("--checkpoint", tmp_path, "--layer", 1, "--tokens", 200, "--step", 7)["layer"]
    torch.manual_seed(0)
    x = torch.randn(200, 32)
    logits = x @ gate.detach().T
    assert layer["trace"]["rows"] == logits.topk(2).indices.flatten().bincount(minlength=6).tolist()
    assert layer["trace"]["logit_rms"] == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-4)
    with torch.no_grad():
        y = model.model.layers[1].mlp(x[None])
    step = layer["step"]
    assert step["output"] == pytest.approx((y[0] if isinstance(y, tuple) else y)[0, 7, :4].tolist(), rel=1e-4, abs=1e-6)
    assert step["logits"] == pytest.approx(logits[7].tolist(), rel=1e-4, abs=1e-5)
    assert ("shared" in step) == (family == "Qwen2Moe")
    assert "takers" not in layer
    if family == "Qwen3Moe":
        assert "--layer is 0, expected one of those with experts" in refuses("inspect", "--checkpoint", tmp_path)
    book = tmp_path / "book.txt"
    book.write_text("text")
    assert "--text" in refuses("inspect", "--checkpoint", tmp_path, "--layer", 1, "--text", book)
