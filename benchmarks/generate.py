"""How long a small transformers model generates with each experts implementation: eager, grouped_mm, batched_mm,
turnout, and turnout with packed experts.

    python benchmarks/generate.py --type bf16

One model of random weights (Qwen3-MoE by shape). Rounds are interleaved: in each one every implementation reads the
prompt and generates once, in an order that rotates. Times are of a whole generate(), and of one that stops after its
first token (reading the prompt); shown are medians and quartiles, and the tokens of each are compared with eager's.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))

import transformers  # noqa: E402
import turnout.hf  # noqa: E402  (this checkout's)

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED = "turnout, packed"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "turnout", PACKED)


def make_model(options: argparse.Namespace) -> transformers.PreTrainedModel:
    torch.manual_seed(20240229)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        moe_intermediate_size=options.ffn,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        norm_topk_prob=True,
        initializer_range=0.1,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(TYPES[options.type]).eval()


def choose(model: transformers.PreTrainedModel, implementation: str) -> None:
    turnout.hf.unpack(model)
    if implementation == PACKED:
        turnout.hf.prepack(model)
    else:
        model.set_experts_implementation(implementation)


def seconds(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def shown(values: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles([1e3 * value for value in values], n=4)
    return f"{median:.0f} ({low:.0f} to {high:.0f})"


def processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=TYPES, default="bf16")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def main() -> None:
    options = parse()
    model = make_model(options)
    prompt = torch.randint(2, 1024, (options.batch, options.prompt))
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "do_sample": False}

    def generate(new: int) -> torch.Tensor:
        return model.generate(**given, max_new_tokens=new)

    whole: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    reading: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    tokens = {}
    for turn in range(options.rounds + 1):  # the first one warms up
        shift = turn % len(IMPLEMENTATIONS)
        for name in IMPLEMENTATIONS[shift:] + IMPLEMENTATIONS[:shift]:
            choose(model, name)
            generate(1)
            first, _ = seconds(lambda: generate(1))
            took, tokens[name] = seconds(lambda: generate(options.new))
            if turn > 0:
                reading[name].append(first)
                whole[name].append(took)

    print(f"{processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}, turnout {turnout.__version__}")  # fmt: skip
    print(f"{options.type}, hidden {options.hidden}, ffn {options.ffn}, {options.experts} experts, top {options.top_k}, "
          f"{options.layers} layers, batch {options.batch}, {options.rounds} rounds")  # fmt: skip
    print(f"\n| experts | prompt of {options.prompt} tokens, ms | and {options.new} new tokens, ms | tokens as eager's |")
    print("|---|---|---|---|")
    for name in IMPLEMENTATIONS:
        same = float((tokens[name] == tokens["eager"])[:, options.prompt :].float().mean())
        print(f"| {name} | {shown(reading[name])} | {shown(whole[name])} | {same:.0%} |")


if __name__ == "__main__":
    main()
