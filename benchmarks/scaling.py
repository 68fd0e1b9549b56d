"""Measures expert parallelism on this machine, fits the cost model of docs/scaling.md, and says what it predicts.

    python benchmarks/scaling.py [--shape many-rows,few-rows,gelu] [--json FOLDER]
    python benchmarks/scaling.py --link 1000        the two ranks on two hosts, joined by 1000 Mbit/s (root)

Runs `turnout bench --exchange` with one thread a rank, on one rank and on two, and prints Markdown: what was measured,
the model beside it, and predictions for links of published speed, which are marked as such.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from two_hosts import ADDRESS, Unavailable, two_hosts

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "build" / "bin" / "turnout"

# Bytes a second and rank, one way, as the makers give them.
LINKS = {"10 Gbit/s Ethernet": 1.25e9, "100 Gbit/s Ethernet": 12.5e9, "400 Gbit/s InfiniBand NDR": 50e9}


def run_ranks(command, prefixes, host):
    """One process a prefix, as a launcher would start them; ends this program where one fails."""
    with socket.socket() as end:
        end.bind(("", 0))
        port = str(end.getsockname()[1])
    ranks = []
    for rank, prefix in enumerate(prefixes):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(prefixes)), "MASTER_ADDR": host,
                       "MASTER_PORT": port}
        ranks.append(subprocess.Popen([*prefix, *command], env=environment, stdout=sys.stderr))
    if any([rank.wait() != 0 for rank in ranks]):
        sys.exit(f"{' '.join(map(str, command))}: failed")


def measure(ranks, link, arguments, folder):
    """The JSON of one run. @param link: Mbit/s between the ranks; 0: all on this host"""
    path = folder / f"ranks-{ranks}.json"
    command = [PROGRAM, "bench", "--exchange", "--threads", "1", "--json", path, *arguments]
    if ranks > 1 and link > 0:
        try:
            with two_hosts(link) as prefixes:
                run_ranks(command, prefixes, ADDRESS)
        except Unavailable as reason:
            sys.exit(f"--link: {reason}")
    else:
        run_ranks(command, [[]] * ranks, "127.0.0.1")
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


def share(run, plain, exchange):
    return f"{100 * plain / exchange:.0f} %" if run["ranks"] > 1 else "-"  # one rank exchanges nothing


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
                  f"| {1e3 * plain:.2f} | {1e3 * exchange:.2f} | {share(run, plain, exchange)} "
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
    parser.add_argument("--link", type=int, default=0, help="Mbit/s between two hosts of a rank each; 0: one host")
    parser.add_argument("--shape", default="many-rows,few-rows,gelu")
    parser.add_argument("--type", default="bf16,fp32")
    parser.add_argument("--seconds", default="0.5")
    parser.add_argument("--json", type=pathlib.Path, help="folder for all numbers")
    options = parser.parse_args()
    arguments = ["--shape", options.shape, "--type", options.type, "--seconds", options.seconds]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.json or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        runs = [measure(ranks, options.link, arguments, folder) for ranks in (1, 2)]
    print_measured(runs)
    print_model(runs[1], runs[0])
    print_predictions(runs[1])


if __name__ == "__main__":
    main()
