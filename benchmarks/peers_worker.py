"""A peer in a process of its own: what crashes or hangs there ends that peer's row, not the comparison.

Between its turns a worker is stopped, so that no pool of threads spins in another peer's time.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pathlib
import resource
import signal
import time
from dataclasses import dataclass, replace

import torch

from peers_cases import TOLERANCE, Bank, Case, reference, worst_error
from peers_implementations import (
    Absent,
    Compiled,
    GroupedMM,
    Loop,
    PackedLoop,
    TransformersBatched,
    TransformersGrouped,
    Turnout,
    TurnoutPacked,
    TurnoutRecompute,
)
from peers_wheels import KtKernel, Sglang, Vllm, Zentorch

PEERS = {
    "turnout": Turnout,
    "turnout-packed": TurnoutPacked,
    "turnout-recompute": TurnoutRecompute,
    "loop": Loop,
    "loop-onednn": PackedLoop,
    "grouped_mm": GroupedMM,
    "compile": Compiled,
    "transformers-grouped_mm": TransformersGrouped,
    "transformers-batched_mm": TransformersBatched,
    "zentorch": Zentorch,
    "vllm": Vllm,
    "sglang": Sglang,
    "kt-kernel": KtKernel,
}
PREPARE_SECONDS, TURN_SECONDS = 600, 300  # compilation takes its time


@dataclass(frozen=True)
class Job:
    """A case in files, which workers map: one copy of the plain weights serves all of them."""

    bank: pathlib.Path
    case: pathlib.Path
    expected: pathlib.Path

    @classmethod
    def within(cls, folder: pathlib.Path) -> Job:
        return cls(folder / "bank.pt", folder / "case.pt", folder / "expected.pt")

    def write_bank(self, bank: Bank) -> Bank:
        """The mapped one, which takes the place of what was given."""
        write(bank, self.bank)
        return read(self.bank)

    def write_case(self, case: Case) -> None:
        """That of the bank written last, with its results in float64."""
        write(replace(case, bank=None), self.case)
        write(reference(case), self.expected)

    def read(self) -> tuple[Case, dict[str, torch.Tensor]]:
        return replace(read(self.case), bank=read(self.bank)), read(self.expected)


def write(content: object, path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)  # the one before may still be mapped
    torch.save(content, path)


def read(path: pathlib.Path):
    return torch.load(path, mmap=True, weights_only=False)


class Worker:
    """The parent's hold on the process of one peer."""

    def __init__(self, name: str, wheels: pathlib.Path | None, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, wheels, threads), daemon=True)
        self.process.start()
        theirs.close()

    def prepare(self, job: Job) -> dict:
        """A row: its error, first time and memory; or why it is absent, failed or wrong."""
        return self.ask(("prepare", job), PREPARE_SECONDS)

    def turn(self, runs: int) -> dict:
        """{"seconds": of each of that many runs}"""
        return self.ask(("turn", runs), TURN_SECONDS)

    def drop(self) -> None:
        self.ask(("drop", None), TURN_SECONDS)

    def ask(self, request: tuple, seconds: float) -> dict:
        self.signal(signal.SIGCONT)
        try:
            self.connection.send(request)
            if not self.connection.poll(seconds):
                self.process.kill()
                return {"failed": f"gave no answer for {seconds} s"}
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return {"failed": f"its process {end_of(self.process.exitcode)}"}
        self.signal(signal.SIGSTOP)
        return answer

    def signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.connection.close()  # serve() returns
        self.process.join(5)
        self.process.kill()
        self.process.join()


def end_of(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def serve(connection, name: str, wheels: pathlib.Path | None, threads: int) -> None:
    """The process of a worker: answers requests until the connection closes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped process outlives no parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries greet
        os.dup2(null, stream)
    torch.set_num_threads(threads)
    peer = None
    while True:
        try:
            what, argument = connection.recv()
        except EOFError:
            return
        answer = {}
        if what == "prepare":
            peer, answer = prepare(name, argument, wheels)
        elif what == "turn":
            answer = turn(peer, argument)
        else:
            peer = None
            gc.collect()
        connection.send(answer)


def prepare(name: str, job: Job, wheels: pathlib.Path | None):
    """(peer, row); the peer is None unless its results are right."""
    case, expected = job.read()
    try:
        peer = PEERS[name](case, wheels)
        where, error = worst_error(expected, results_of(peer))
        row = {"error": error, "error_of": where}
        if not error <= TOLERANCE[case.type]:
            return None, row | {"wrong": f"{where} is off by {error:.1e}, allowed {TOLERANCE[case.type]:.0e}"}
        del expected
        if case.is_step:
            row["memory_growth"] = memory_growth(peer)
        start = time.perf_counter()
        run(peer)
        return peer, row | {"first_seconds": time.perf_counter() - start}
    except Absent as reason:
        return None, {"absent": str(reason)}
    except Exception as failure:  # a peer's own failure is a result, not the end of the others
        return None, {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]}


def run(peer) -> None:
    peer.step() if peer.case.is_step else peer.forward()


def results_of(peer) -> dict[str, torch.Tensor]:
    """What reference() gives, as the peer computes it."""
    if not peer.case.is_step:
        results = {}
        for i in range(len(peer.case.inputs)):
            peer.take_inputs(i)
            results[f"y[{i}]"] = peer.forward()
        return results
    results = {"y[0]": peer.step(), "x": peer.x.grad, "topk_weights": peer.topk_weights.grad}
    for e in peer.case.busiest_experts():
        results[f"up[{e}]"], results[f"down[{e}]"] = peer.expert_gradients(e)
    return results


def turn(peer, runs: int) -> dict:
    """A turn of several runs has one more before them, untimed: the others' turns have left the caches cold."""
    if runs > 1:
        run(peer)
    seconds = []
    for i in range(runs):
        if len(peer.case.inputs) > 1:
            peer.take_inputs(i)
        start = time.perf_counter()
        run(peer)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def memory_growth(peer) -> int | None:
    """Bytes by which the resident memory of this process peaks in a step above what it was before, less the weights'
    gradients. Free heap and the library's scratch are given back first. None where Linux does not reset the peak."""
    peer.drop_gradients()
    peer.release_scratch()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at what is resident
    except OSError:
        return None
    before = status_bytes("VmRSS")
    peer.step()
    growth = status_bytes("VmHWM") - before
    bank = peer.case.bank
    return growth - len(bank.up) * bank.expert_bytes


def status_bytes(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
