"""Measures expert parallelism on this machine, fits the cost model of docs/scaling.md, and says what it predicts.

    python benchmarks/scaling.py [--ranks 1,2] [--shape many-rows,few-rows,gelu] [--json FOLDER]

Runs `turnout bench --exchange` under torchrun with one thread a rank and prints Markdown: what was measured, the model
beside it, and predictions for links of published speed, which are marked as such.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "build" / "bin" / "turnout"

# Bytes a second and rank, one way, as the makers give them.
LINKS = {"10 Gbit/s Ethernet": 1.25e9, "100 Gbit/s Ethernet": 12.5e9, "400 Gbit/s InfiniBand NDR": 50e9}


def measure(ranks, arguments, folder):
    """The JSON of one run."""
    path = folder / f"ranks-{ranks}.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--standalone",
                "--nproc-per-node", str(ranks)]
    subprocess.run([*torchrun, PROGRAM, "bench", "--exchange", "--threads", "1", "--json", path, *arguments],
                   check=True, stdout=sys.stderr)
    return json.loads(path.read_text())


def matrices(shape):
    return 3 if shape["activation"] in ("swiglu", "geglu") else 2


def flops(result):
    shape = result["shape"]
    return 2 * result["tokens"] * shape["top_k"] * matrices(shape) * shape["hidden"] * shape["ffn"]


def median(result, *keys):
    for key in keys:
        result = result[key]
    return result["median"]


def fit(results):
    """(seconds of a message, bytes a second): least squares over the plain exchanges, out and back."""
    points = [(2 * r["bytes"], median(r, "plain")) for r in results]
    latency = min(median(r, "counts") for r in results)
    speed = sum(b * b for b, _ in points) / sum(b * max(t - 2 * latency, 1e-9) for b, t in points)
    return latency, speed


def print_measured(runs):
    print("| shape | type | tokens a rank | ranks | MB one way | plain, ms | exchange, ms | share | experts, ms "
          "| forward, ms (1 / 2 / 4 chunks) | step, ms (1 / 2 / 4 chunks) |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for run in runs:
        for r in run["results"]:
            chunks = [" / ".join(f"{1e3 * median(r, kind, c):.1f}" for c in ("1", "2", "4"))
                      for kind in ("forward", "step")]
            plain, exchange = median(r, "plain"), median(r, "exchange")
            print(f"| {r['shape']['name']} | {r['type']} | {r['tokens']} | {run['ranks']} | {r['bytes'] / 1e6:.2f} "
                  f"| {1e3 * plain:.2f} | {1e3 * exchange:.2f} | {100 * plain / exchange:.0f} % "
                  f"| {1e3 * median(r, 'experts'):.1f} | {chunks[0]} | {chunks[1]} |")


def print_model(run, alone):
    latency, speed = fit(run["results"])
    print(f"\nFitted with {run['ranks']} ranks: {1e6 * latency:.0f} µs an exchange of counts, {speed / 1e9:.2f} GB/s "
          "a rank and direction.\n")
    print("| shape | type | forward measured, ms | model, ms | weak-scaling efficiency |")
    print("|---|---|--:|--:|--:|")
    own = {(r["shape"]["name"], r["type"], r["tokens"]): r for r in alone["results"]}
    for r in run["results"]:
        before = own[r["shape"]["name"], r["type"], r["tokens"]]
        local = median(before, "forward", "1") - median(before, "experts")  # gather, combine, plans
        model = median(r, "experts") + max(local, 0) + 3 * latency + 2 * r["bytes"] / speed
        print(f"| {r['shape']['name']} | {r['type']} | {1e3 * median(r, 'forward', '1'):.1f} | {1e3 * model:.1f} "
              f"| {100 * median(before, 'forward', '1') / median(r, 'forward', '1'):.0f} % |")


def print_predictions(run):
    print("\nPrediction, not measured: share of a forward that the exchange takes on 16 ranks, and the width of an "
          "expert from which it takes less than the experts.\n")
    print("| shape | type | GF/s a rank |" + "".join(f" {name} |" for name in LINKS))
    print("|---|---|--:|" + "--:|" * len(LINKS))
    for r in run["results"]:
        shape, experts = r["shape"], median(r, "experts")
        rate = flops(r) / experts
        size = 2 if r["type"] == "bf16" else 4
        cells = []
        for speed in LINKS.values():
            exchange = 2 * r["tokens"] * shape["top_k"] * shape["hidden"] * size * (15 / 16) / speed
            width = size * rate * (15 / 16) / (speed * matrices(shape))
            cells.append(f"{100 * exchange / (exchange + experts):.1f} %, {width:.0f}")
        print(f"| {shape['name']} | {r['type']} | {rate / 1e9:.0f} |" + "".join(f" {cell} |" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--shape", default="many-rows,few-rows,gelu")
    parser.add_argument("--type", default="bf16,fp32")
    parser.add_argument("--seconds", default="0.5")
    parser.add_argument("--json", type=pathlib.Path, help="folder for all numbers")
    options = parser.parse_args()
    arguments = ["--shape", options.shape, "--type", options.type, "--seconds", options.seconds]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.json or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        runs = [measure(int(ranks), arguments, folder) for ranks in options.ranks.split(",")]
    print_measured(runs)
    if len(runs) > 1:
        print_model(runs[-1], runs[0])
        print_predictions(runs[-1])


if __name__ == "__main__":
    main()
