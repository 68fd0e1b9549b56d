"""The program `turnout`, driven as a user drives it: help, errors, interruption, and small real runs."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from program import PROGRAM, TINY, on_terminal, refuses, start, train, turnout, wait_for_checkpoint


@pytest.mark.parametrize("command", [[], ["compare"], ["train"], ["generate"]])
def test_help_has_examples(command):
    done = turnout(*command, "--help")
    assert done.returncode == 0 and "Examples:" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("command", [[], ["compare"], ["train"], ["generate"], ["bench"], ["inspect"]])
def test_help_fits_80_columns(command):
    lines = turnout(*command, "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]


def test_version_names_turnout_torch_and_kernels():
    done = turnout("--version")
    assert done.returncode == 0
    assert re.search(r"^turnout \d+\.\d+\.\d+$", done.stdout, re.M)
    assert re.search(r"^torch \d+\.\d+", done.stdout, re.M)
    assert re.search(r"^kernels \w+", done.stdout, re.M)


@pytest.mark.parametrize("arguments, words", [
    ("", "subcommand"),
    ("frobnicate", "frobnicate"),
    ("compare --frobnicate 1", "--frobnicate"),
    ("compare --layers many", "--layers"),
    ("compare --router best", "'best', expected one of normalized"),
    ("compare --kind sparse", "'sparse', expected one of dense, moe, hybrid"),
    ("compare --kind dense", "expected moe or hybrid"),
    ("compare --pattern some", "'some'"),
    ("compare --activation tanh", "'tanh'"),
    ("compare --layers 0", "layers is 0"),
    ("compare --experts 4 --top-k 5", "top_k is 5, expected 1 to 4 (num_experts)"),
    ("compare --hidden 99999999999", "hidden is 99999999999"),
    ("compare --hidden 30 --heads 4", "hidden is 30"),
    ("compare --alpha 2", "alpha is 2"),
    ("compare --capacity -1", "-1"),
    ("compare --tokens 0", "--tokens is 0"),
    ("compare --tokens 9223372036854775807", "--tokens is 9223372036854775807"),
    ("train --threads 1025", "--threads is 1025, expected 0 to 1024"),
    ("train --seed -1", "--seed: is -1, expected 0 to"),
    ("generate no/such/model --prompt x --seed -1", "--seed: is -1, expected 0 to"),
    ("compare --lr nan", "learning_rate is nan"),
    ("compare --text no/such/file", "no/such/file"),
    ("train --checkpoint-every 0", "--checkpoint-every is 0"),
    ("train --resume --output no/such/folder", "no/such/folder/checkpoint.safetensors"),
    ("generate no/such/model --prompt x", "no/such/model/config.json"),
    ("generate", "required"),
    ("train --text no\nsuch\033[2Jfile", "no\\nsuch\\x1b[2Jfile: cannot read"),
])
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path):
    assert words in refuses(*arguments.split(" " if arguments else None), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help"])
@pytest.mark.parametrize("to", [">/dev/full", ">&-"])
def test_output_that_cannot_be_written_is_an_error(arguments, to):
    assert "standard output: cannot write" in refuses(*arguments.split(), through=to)


@pytest.mark.parametrize("to", ["2>/dev/full", "2>&-"])
def test_a_run_outlives_its_stderr(tmp_path, text, to):
    assert turnout("train", "--frobnicate", through=to).returncode == 2
    out = tmp_path / "out"
    assert turnout(*train_arguments(text, out, steps=40), through=to).returncode == 0
    assert turnout("generate", out, "--prompt", "x").returncode == 0


def test_a_run_is_not_overwritten(tmp_path, text):
    out = tmp_path / "out"
    assert turnout(*train_arguments(text, out, steps=20)).returncode == 0
    for name in "checkpoint.safetensors", "model.safetensors":
        before = (out / name).read_bytes()
        message = refuses(*train_arguments(text, out, steps=20))
        assert name in message and "--resume" in message and "--output" in message
        assert (out / name).read_bytes() == before
        (out / name).unlink()


def test_a_path_that_is_no_utf8_is_stored_and_found_again(tmp_path, text):
    odd, out = text.with_name("50%41 of \udcff\u00e9"), tmp_path / "out"
    text.rename(odd)
    done = turnout(*train_arguments(odd, out, steps=20))
    assert done.returncode == 0, done.stderr
    done = turnout("train", "--resume", "--output", out, "--text", odd)
    assert done.returncode == 0, done.stderr


def test_unusable_texts_and_folders_are_refused_before_training(tmp_path, text):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "no text found" in refuses("compare", "--text", empty, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    in_the_way = tmp_path / "file"
    in_the_way.write_text("a file")
    for command in "compare", "train":
        message = refuses(command, *TINY, "--text", text, "--output", in_the_way / "out")
        assert str(in_the_way / "out") in message
    assert in_the_way.read_text() == "a file"


def test_compare_writes_all_it_says(tmp_path, text):
    out = tmp_path / "out"
    done = turnout("compare", *TINY, "--text", text, "--tokens", 64 * 20, "--evaluations", 4, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "\033" not in done.stdout + done.stderr and "\r" not in done.stderr, "plain lines away from a terminal"
    assert "% " in done.stderr and "left" in done.stderr
    for words in "bits a byte, equal tokens", "bits a byte, equal time", "active parameters", "choices dropped":
        assert words in done.stdout
    report = json.loads((out / "compare.json").read_text())
    dense, moe = report["results"]["dense"], report["results"]["moe"]
    assert dense["flops_per_token"]["total"] == moe["flops_per_token"]["total"]
    assert moe["flops_per_token"]["gate"] == 2 * 2 * 16 * 4
    assert dense["tokens"] == moe["tokens"] == 64 * 20
    assert moe["parameters"] > moe["active_parameters"]
    assert moe["dropped"] == 0 and moe["choices"] == 64 * 20 * 2 * 2
    assert [sum(layer) for layer in moe["expert_load"]] == [64 * 20 * 2] * 2
    assert report["machine"]["threads"] == 1 and report["machine"]["torch"]
    curves = [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]
    for name in "dense", "moe":
        points = [point for point in curves if point["model"] == name]
        assert [point["step"] for point in points] == [5, 10, 15, 20]
        assert points[-1]["bits_per_byte"] == report["results"][name]["bits_per_byte_at_equal_tokens"]
        seconds = report["results"]["equal_time_seconds"]
        at_time = report["results"][name]["bits_per_byte_at_equal_time"]
        if points[-1]["seconds"] == seconds:
            assert at_time == points[-1]["bits_per_byte"]
        generated = turnout("generate", out / name, "--prompt", "the ", "--tokens", 20, "--seed", 3)
        assert generated.returncode == 0 and generated.stdout.startswith("the "), generated.stderr
        assert len(generated.stdout.encode(errors="surrogateescape")) == 4 + 20 + 1


def test_capacity_drops_and_is_reported(tmp_path, text):
    done = turnout("compare", *TINY, "--text", text, "--tokens", 640, "--capacity", 0.5, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    moe = json.loads((tmp_path / "out" / "compare.json").read_text())["results"]["moe"]
    assert moe["dropped"] > 0


def test_models_are_read_by_the_safetensors_package_and_back(tmp_path, text):
    numpy = pytest.importorskip("safetensors.numpy")
    out = tmp_path / "out"
    done = turnout("train", *TINY, "--text", text, "--tokens", 640, "--output", out)
    assert done.returncode == 0, done.stderr
    file = out / "model.safetensors"
    tensors = numpy.load_file(file)
    assert tensors["layer_0.moe.experts.up"].shape == (4, 12, 16)
    before = turnout("generate", out, "--prompt", "the ", "--temperature", 0).stdout
    numpy.save_file(tensors, file)
    again = turnout("generate", out, "--prompt", "the ", "--temperature", 0)
    assert again.returncode == 0 and again.stdout == before, again.stderr
    del tensors["norm.bias"]
    numpy.save_file(tensors, file)
    assert "'norm.bias' is missing" in refuses("generate", out, "--prompt", "x")
    file.write_bytes(file.read_bytes()[:-4])
    assert str(file) in refuses("generate", out, "--prompt", "x")
    (out / "config.json").write_text("{}")
    assert str(out / "config.json") in refuses("generate", out, "--prompt", "x")


def train_arguments(text, out, steps=300):
    return train(text, out, steps, "--checkpoint-every", 20)


def start_and_wait_for_checkpoint(arguments, out):
    process = start(arguments)
    wait_for_checkpoint(out, [process])
    return process


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, text):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert turnout(*train_arguments(text, unbroken)).returncode == 0
    process = start_and_wait_for_checkpoint(train_arguments(text, killed), killed)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run must be cut short for this test to mean anything"
    assert not (killed / "model.safetensors").exists()
    # Killed again and again, at whatever point the clock hits.
    for delay in 0.3, 0.5, 0.7:
        process = subprocess.Popen([PROGRAM, "train", "--resume", "--output", killed], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
    done = turnout("train", "--resume", "--output", killed)
    assert done.returncode == 0, done.stderr
    for name in "model.safetensors", "config.json", "checkpoint.safetensors":
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_resume_refuses_other_options_and_another_text(tmp_path, text):
    out = tmp_path / "out"
    assert turnout(*train_arguments(text, out, steps=20)).returncode == 0
    checkpoint = (out / "checkpoint.safetensors").read_bytes()
    assert "--layers is 3, but" in refuses("train", "--resume", "--output", out, "--layers", 3)
    assert turnout("train", "--resume", "--output", out, "--layers", 2).returncode == 0
    (text / "page0.txt").write_text("another text " * 50)
    assert "another text" in refuses("train", "--resume", "--output", out)
    assert (out / "checkpoint.safetensors").read_bytes() == checkpoint


def test_ctrl_c_stops_with_status_130_and_a_whole_checkpoint(tmp_path, text):
    out = tmp_path / "out"
    process = start_and_wait_for_checkpoint(train_arguments(text, out, steps=20000), out)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    stopped = re.search(r"stopped at step (\d+) of 20000", stderr.splitlines()[-1])
    assert stopped, stderr
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(out / "checkpoint.safetensors", "numpy") as file:
        assert file.metadata()["step"] == stopped[1]
    assert not list(out.glob("*.partial"))


def test_a_full_disk_is_named_and_keeps_the_old_checkpoint(tmp_path, text):
    out = tmp_path / "out"
    process = start_and_wait_for_checkpoint(train_arguments(text, out, steps=2000), out)
    process.kill()
    process.communicate()
    checkpoint = (out / "checkpoint.safetensors").read_bytes()
    limit = len(checkpoint) // 1024 // 2
    command = ["bash", "-c", f"ulimit -f {limit}; exec \"$@\"", "-", PROGRAM, "train", "--resume", "--output", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert str(out / "checkpoint.safetensors") in done.stderr.splitlines()[-1]
    assert (out / "checkpoint.safetensors").read_bytes() == checkpoint
    assert not list(out.glob("*.partial"))


def test_divergence_names_the_step_with_status_1(tmp_path, text):
    done = turnout("train", *TINY, "--text", text, "--tokens", 64 * 200, "--lr", 1000, "--weight-decay", 100,
                   "--output", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert re.search(r"^turnout: training diverged at step \d+, (layer \d+|embedding|head|loss)", done.stderr, re.M)


def test_a_terminal_gets_a_bar_and_no_color_is_obeyed(tmp_path, text):
    def shown(name, **environment):
        return on_terminal(train_arguments(text, tmp_path / name, steps=20), "stderr", **environment)

    colored = shown("a", NO_COLOR="")
    assert b"\r" in colored and b"===" in colored and b"\033[32m" in colored
    assert b"\033[32m" not in shown("b", NO_COLOR="1")
