"""`turnout bench` on a shape of a few kilobytes: what it writes and what it refuses. No timing decides anything."""

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("TURNOUT_PROGRAM", ROOT / "build" / "bin" / "turnout"))
CASES = ["forward", "forward-packed", "step", "decode", "decode-plain"]
TINY = {"name": "tiny", "experts": 4, "top_k": 2, "hidden": 16, "ffn": 24, "activation": "swiglu",
        "types": ["bf16", "fp32"], "tokens": [8], "decode_tokens": [1]}



def bench(*arguments):
    return subprocess.run([PROGRAM, "bench", *map(str, arguments)], capture_output=True, text=True, timeout=120)


def refuses(*arguments):
    """The one line on stderr of a run that must end with status 2."""
    done = bench(*arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("turnout: "), done.stderr
    return done.stderr


def shape_file(folder, *shapes):
    path = folder / "shapes.json"
    path.write_text(json.dumps({"shapes": shapes}))
    return path


# Decoding moves through 600 MB: with the memory of one bank it makes do with that.
SMALL = ("--seconds", "0.001", "--memory", "0.2561")


def test_json_holds_results_machine_and_limits(tmp_path):
    out = tmp_path / "out.json"
    done = bench("--shapes", shape_file(tmp_path, TINY), *SMALL, "--threads", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[2:])) <= 100
    report = json.loads(out.read_text())
    machine = report["machine"]
    assert machine["threads"] == 1 and machine["torch"] and machine["processor"]
    assert machine["kernels"] in subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout
    assert report["limits"]["read_bytes"]["median"] > 0
    results = report["results"]
    assert [(r["type"], r["case"]) for r in results] == [(t, c) for t in ("bf16", "fp32") for c in CASES]
    forward_flops = 8 * 2 * 2 * 3 * 16 * 24  # tokens · top_k · 2 a multiply-add · 3 matrices of hidden · ffn
    expert_bytes = 3 * 16 * 24 * 2
    for r in results:
        decode = r["case"].startswith("decode")
        assert r["shape"] | {"types": TINY["types"], "tokens": [8], "decode_tokens": [1]} == TINY
        assert r["tokens"] == (1 if decode else 8)
        assert r["flops"] == forward_flops * (3 if r["case"] == "step" else 1 / 8 if decode else 1)
        assert r["limited_by"] == ("read bandwidth" if decode else "register peak")
        assert r["rounds"] >= 5
        for values in r["seconds"], r["rate"], r["limit"], r["share_of_register_peak"], r["share_of_read_bandwidth"]:
            assert 0 <= values["min"] <= values["quartile1"] <= values["median"] <= values["quartile3"] <= values["max"]
        assert r["weight_bytes_moved"] == r["weight_bytes_used"] * (3 if r["case"] == "step" else 1)
        moved, reads = r["weight_bytes_moved"], report["limits"]["read_bytes"]["median"]
        if not decode:
            assert r["share_of_read_bandwidth"]["median"] == pytest.approx(moved / r["seconds"]["median"] / reads)
        elif peak := report["limits"][f"{r['type']}_flops"]["median"]:
            assert r["share_of_register_peak"]["median"] == pytest.approx(r["flops"] / r["seconds"]["median"] / peak)
        if decode and r["type"] == "bf16":
            assert r["weight_bytes_used"] == 2 * expert_bytes <= r["weight_bytes_resident"]


def test_what_does_not_fit_is_skipped_with_the_reason(tmp_path):
    out = tmp_path / "out.json"
    done = bench("--shapes", shape_file(tmp_path, TINY), "--memory", "0.001", "--json", out)
    assert done.returncode == 0, done.stderr
    assert all("needs 0.3 GB of memory, 0.0 GB may be used" in r["skipped"]
               for r in json.loads(out.read_text())["results"])
    assert "skipped: needs" in done.stdout


def test_list_and_choice(tmp_path):
    path = shape_file(tmp_path, TINY, TINY | {"name": "other", "about": "another one"})
    listed = bench("--shapes", path, "--list").stdout
    assert "tiny" in listed and "another one" in listed
    out = tmp_path / "out.json"
    assert bench("--shapes", path, *SMALL, "--shape", "other", "--case", "step,forward", "--type", "fp32", "--json",
                 out).returncode == 0
    assert [(r["shape"]["name"], r["case"], r["type"]) for r in json.loads(out.read_text())["results"]] == [
        ("other", "forward", "fp32"), ("other", "step", "fp32")]


def test_own_shapes_are_found_and_sound():
    listed = bench("--list").stdout
    for name in "mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite", "many-rows", "few-rows", "gelu":
        assert name in listed


@pytest.mark.parametrize("change, words", [
    ({"experts": 0}, "shape tiny has experts 0, expected a whole number of 1 to"),
    ({"hidden": "wide"}, 'shape tiny has hidden "wide"'),
    ({"ffn": 1e30}, "shape tiny has ffn 1e+30"),
    ({"top_k": 5}, "shape tiny has top_k 5, expected 1 to the number of experts, 4"),
    ({"activation": "tanh"}, "shape tiny is wrong: activation is 'tanh'"),
    ({"types": ["int8"]}, "type is 'int8', expected bf16 or fp32"),
    ({"tokens": []}, "shape tiny has tokens [], expected a list"),
    ({"tokens": [1, -2]}, "shape tiny has tokens -2"),
    ({"name": 3}, "shape 1 has name 3"),
    ({"layers": 2}, 'unknown field "layers"'),
])
def test_wrong_field_is_named(change, words, tmp_path):
    message = refuses("--shapes", shape_file(tmp_path, TINY | change), "--list")
    assert words in message and "shapes.json" in message


@pytest.mark.parametrize("text, words", [
    ("{", "is not JSON"),
    ("[]", 'expected an object with a list "shapes"'),
    ('{"shapes": []}', 'expected an object with a list "shapes"'),
    ('{"shapes": [1]}', "shape 1 is 1, expected an object"),
    ('{"shapes": [{"name": "a"}]}', "shape a has no experts"),
])
def test_malformed_file_is_named(text, words, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    message = refuses("--shapes", path)
    assert words in message and "bad.json" in message


def test_two_shapes_of_one_name_are_refused(tmp_path):
    assert "two shapes are called tiny" in refuses("--shapes", shape_file(tmp_path, TINY, TINY))


@pytest.mark.parametrize("arguments, words", [
    ("--shape nothing", "'nothing', expected one of tiny"),
    ("--case backward", "'backward', expected one of forward, forward-packed, step, decode, decode-plain"),
    ("--type int8", "'int8', expected bf16 or fp32"),
    ("--threads -1", "--threads is -1"),
    ("--seconds 0", "--seconds is 0"),
    ("--seconds nan", "--seconds is nan"),
    ("--memory -1", "--memory is -1"),
    ("--json no/such/folder/out.json", "no/such/folder/out.json"),
    ("--shapes no/such/file.json", "no/such/file.json"),
    ("--frobnicate", "--frobnicate"),
])
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path):
    shapes = [] if "--shapes" in arguments else ["--shapes", shape_file(tmp_path, TINY)]
    assert words in refuses(*shapes, *arguments.split())


def test_help_has_examples():
    done = bench("--help")
    assert done.returncode == 0 and "Examples:" in done.stdout
