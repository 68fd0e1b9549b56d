"""Expert layers of several libraries side by side: the same weights and inputs, checked against float64, then timed.

    python benchmarks/peers.py --shape few-rows --type fp32 --pass step
    python benchmarks/peers.py --wheels DIR --report benchmarks/results

Every peer runs in a process of its own, computes once, and is compared with a float64 loop: outputs and, for the
training step, the gradients of x, of the routing weights and of the busiest experts' weights. One that is absent, fails
or is wrong is named with the reason and not timed. Rounds are interleaved: in each one every peer has a turn, in an order
that rotates, and `turnout bench --limits` measures the register peak and the read bandwidth.

Without --shape, --type and --pass the cells are those of the report.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

import peers_report as report
from peers_cases import PASSES, TYPES, Bank, Case
from peers_wheels import DOWNLOAD
from peers_worker import PEERS, Job, Worker

ROOT = pathlib.Path(__file__).resolve().parents[1]
# shape → type → passes
REPORT_CELLS = {
    "many-rows": {"bf16": ("forward", "step"), "fp32": ("forward", "step")},
    "few-rows": {"bf16": ("forward", "step"), "fp32": ("forward", "step")},
    "gelu": {"fp32": ("forward", "step")},
    "qwen3-30b-a3b": {"bf16": ("forward", "decode"), "fp32": ("forward",)},
}
TURN = 0.1  # seconds of runs that a turn should have; a turn of the longest runs has one
MOST_RUNS = 16


@dataclass(frozen=True)
class Cell:
    shape: dict
    type: str
    which: str
    tokens: int


def cells_of(options: argparse.Namespace, shapes: dict[str, dict]) -> list[Cell]:
    """Bank by bank, so that each is made once."""
    chosen = REPORT_CELLS
    if options.shape or options.type or options.passes:
        names = options.shape or list(REPORT_CELLS)
        chosen = {name: {t: options.passes or PASSES for t in options.type or TYPES} for name in names}
    return [Cell(shapes[name], type_, which, tokens)
            for name, types in chosen.items() for type_, passes in types.items() if type_ in shapes[name]["types"]
            for which in passes for tokens in shapes[name].get("decode_tokens" if which == "decode" else "tokens", [])]


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartile1": low, "quartile3": high, "min": min(values), "max": max(values)}


class Comparison:
    """The workers, and the files that they read cases from."""

    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        self.options, self.folder, self.job = options, folder, Job.within(folder)
        self.workers: dict[str, Worker] = {}
        self.limits: list[dict] = []
        self.machine: dict = {}
        self.bank: Bank | None = None
        self.bank_of = ("", "")  # shape and type

    def measure_limits(self) -> dict[str, float]:
        """Flops and bytes a second, now, by the program on as many threads as torch has here."""
        path = self.folder / "limits.json"
        subprocess.run([self.options.program, "bench", "--limits", "--threads", str(self.options.threads), "--json",
                        path], check=True, capture_output=True)
        measured = json.loads(path.read_text())
        self.machine = measured["machine"]
        self.limits.append({name: value["median"] for name, value in measured["limits"].items()
                            if isinstance(value, dict)})
        return self.limits[-1]

    def write(self, cell: Cell) -> Case:
        if self.bank_of != (cell.shape["name"], cell.type):
            self.bank = self.job.write_bank(Bank.make(cell.shape, cell.type))
            self.bank_of = (cell.shape["name"], cell.type)
        case = Case.make(cell.shape, cell.type, cell.which, cell.tokens, self.bank)
        self.job.write_case(case)
        return case

    def worker(self, name: str) -> Worker:
        if name not in self.workers or not self.workers[name].alive:
            self.workers[name] = Worker(name, self.options.wheels, self.options.threads)
        return self.workers[name]

    def run(self, cell: Cell) -> list[dict]:
        case = self.write(cell)
        head = {"case": case.name, "type": case.type, "pass": case.which}
        rows = {name: head | {"peer": name} | row for name, row in self.prepare().items()}
        self.take_rounds(case, rows)
        for name, worker in list(self.workers.items()):
            if PEERS[name].one_case_a_process and "error" in rows[name]:
                worker.close()
            elif worker.alive:
                worker.drop()
        return list(rows.values())

    def prepare(self) -> dict[str, dict]:
        """What each worker says of the case, in the order of the peers. Two work at a time, since nothing is timed yet
        and compilation, which comes first, takes one core."""
        names = sorted(self.options.peer, key=lambda name: name != "compile")
        workers = [self.worker(name) for name in names]  # here, since a process ends with the thread that started it
        with ThreadPoolExecutor(2) as pool:
            answers = dict(zip(names, pool.map(lambda worker: worker.prepare(self.job), workers)))
        return {name: answers[name] for name in self.options.peer}

    def take_rounds(self, case: Case, rows: dict[str, dict]) -> None:
        names = [name for name, row in rows.items() if "first_seconds" in row]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        rates: dict[str, list[float]] = {name: [] for name in names}
        runs = {name: self.runs_of_turn(case, rows[name]["first_seconds"]) for name in names}
        limits = []
        for round_ in range(self.options.rounds):
            measured = self.measure_limits()
            limits.append(measured["read_bytes" if case.which == "decode" else f"{case.type}_flops"])
            turn = round_ % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                if "failed" in rows[name]:
                    continue
                answer = self.worker(name).turn(runs[name])
                if "failed" in answer:
                    rows[name] |= answer
                    continue
                taken = answer["seconds"]
                seconds[name].append(statistics.median(taken))
                rates[name].append(statistics.median(case.work(i) / s for i, s in enumerate(taken)))
        for name in names:
            if "failed" not in rows[name]:
                rows[name] |= {"seconds": quartiles(seconds[name]), "rate": quartiles(rates[name]), "runs": runs[name]}
                if all(limits):
                    rows[name]["share"] = quartiles([r / limit for r, limit in zip(rates[name], limits)])

    @staticmethod
    def runs_of_turn(case: Case, first_seconds: float) -> int:
        """All inputs equally often."""
        groups = min(MOST_RUNS, TURN / first_seconds) / len(case.inputs)
        return max(1, int(groups)) * len(case.inputs)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="peers: " + ", ".join(PEERS) + f"\n\nThe wheels come by:\n    {DOWNLOAD}\n    pip install transformers")
    parser.add_argument("--shapes", type=pathlib.Path, default=ROOT / "benchmarks/shapes/default.json")
    parser.add_argument("--shape", nargs="+", metavar="NAME")
    parser.add_argument("--type", nargs="+", choices=TYPES)
    parser.add_argument("--pass", nargs="+", choices=PASSES, dest="passes")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--wheels", type=pathlib.Path, metavar="DIR", help="where pip download put wheels of peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "build/bin/turnout", help="measures the limits")
    parser.add_argument("--json", type=pathlib.Path, help="file for all numbers, with hardware and versions")
    parser.add_argument("--report", type=pathlib.Path, metavar="DIR", help="folder for <machine>-<date>.md and .json")
    options = parser.parse_args(arguments)
    options.command = "python benchmarks/peers.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    if options.rounds < 2 or options.threads < 1:
        parser.error("--rounds takes 2 or more, --threads 1 or more")
    if not options.program.is_file():
        parser.error(f"--program {options.program} is not there: build it by `make program`")
    for name in ("wheels", "report"):
        folder = getattr(options, name)
        if folder and not folder.is_dir():
            parser.error(f"--{name} {folder} is not a folder")
    shapes = {shape["name"]: shape for shape in json.loads(options.shapes.read_text())["shapes"]}
    if unknown := [name for name in options.shape or [] if name not in shapes]:
        parser.error(f"--shape {unknown[0]} is not in {options.shapes}, which has {', '.join(shapes)}")
    options.cells = cells_of(options, shapes)
    if not options.cells:
        parser.error("nothing to measure: the shapes have no such type and pass")
    return options


def write_results(options: argparse.Namespace, result: dict) -> None:
    text = json.dumps(result, indent=2) + "\n"
    if options.json:
        options.json.write_text(text)
    if options.report:
        path = options.report / report.report_name(result["machine"])
        path.with_name(path.name + ".json").write_text(text)
        path.with_name(path.name + ".md").write_text(report.markdown(result))
        print(f"\n{path}.md")


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and files go
    memory = pathlib.Path("/dev/shm")  # files in memory, where there are such
    folder = pathlib.Path(tempfile.mkdtemp(prefix="turnout-peers-", dir=memory if memory.is_dir() else None))
    comparison = Comparison(options, folder)
    rows = []
    try:
        for cell in options.cells:
            rows += (new := comparison.run(cell))
            report.show(new)
    finally:
        comparison.close()
        shutil.rmtree(folder)
    names = comparison.limits[0]
    write_results(options, {
        "machine": report.describe_machine(options.threads, options.wheels, comparison.machine),
        "command": options.command, "rounds": options.rounds,
        "limits": {name: quartiles([limit[name] for limit in comparison.limits]) for name in names},
        "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
