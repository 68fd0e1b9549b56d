"""telemetry.jsonl as `train` and `compare` write it: the documented fields, the sums, a resumed run."""

import json
import pathlib
import re

from program import ROOT, TINY, refuses, turnout

PAGE = (ROOT / "docs" / "telemetry.md").read_text()


def lines_of(path, **wanted):
    lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    return [line for line in lines if all(line[key] == value for key, value in wanted.items())]


def documented(kind):
    """The fields that the page's table of this kind names."""
    table = PAGE.split(f"## `{kind}`")[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")][2:]
    return {"kind"} | {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_compare_writes_the_documented_lines(tmp_path, text):
    out = tmp_path / "out"
    done = turnout("compare", *TINY, "--text", text, "--tokens", 64 * 20, "--capacity", 0.7, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "telemetry.jsonl" in done.stdout
    file = out / "telemetry.jsonl"
    moe = json.loads((out / "compare.json").read_text())["results"]["moe"]
    assert [line["model"] for line in lines_of(file, kind="run")] == ["dense", "moe"]
    for kind in "interval", "layer":
        for line in lines_of(file, kind=kind):
            assert set(line) == documented(kind) | ({"model", "first_step", "step"} if kind == "layer" else set())
    assert all(set(line) | {"kind"} == documented("curves.jsonl") for line in lines_of(out / "curves.jsonl"))
    assert len(lines_of(file, kind="interval", model="moe")) == 20
    assert not lines_of(file, kind="layer", model="dense")
    for layer in range(2):
        lines = lines_of(file, kind="layer", model="moe", layer=layer)
        assert [sum(of_expert) for of_expert in zip(*(line["load"] for line in lines))] == moe["expert_load"][layer]
        assert all(sum(line["load"]) + line["dropped"] == line["choices"] == 64 * 2 for line in lines)
    assert sum(line["dropped"] for line in lines_of(file, kind="layer")) == moe["dropped"] > 0
    assert all(line["z_loss"] is None and line["balance_loss"] > 0 for line in lines_of(file, kind="layer"))


def test_a_resumed_run_keeps_its_lines(tmp_path, text):
    out = tmp_path / "out"
    run = ["train", *TINY, "--text", text, "--tokens", 64 * 20, "--output", out]
    assert turnout(*run).returncode == 0
    file = out / "telemetry.jsonl"
    whole = file.read_text()
    assert turnout("train", "--resume", "--output", out).returncode == 0
    assert file.read_text() == whole
    file.write_text(whole + "{}\n")
    assert f"{file}: line {len(whole.splitlines()) + 1} is no telemetry" in refuses("train", "--resume", "--output", out)
    file.unlink()
    assert turnout("train", "--resume", "--output", out).returncode == 0, "a missing file is no obstacle"
