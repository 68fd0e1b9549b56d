"""The examples of docs/checkpoints.md run as they stand, in both languages."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}

TINY = (
    "MixtralConfig(vocab_size=16, hidden_size=32, intermediate_size=16, num_local_experts=4, num_hidden_layers=1, "
    "num_attention_heads=4, num_key_value_heads=2)"
)


def block(language):
    [code] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return code


def run(*command):
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python_example_runs():
    assert run(sys.executable, "-c", block("python")) == "[0, 1]\n"


def test_cpp_example_is_what_the_build_compiled_and_runs(tmp_path):
    assert block("cpp") == (ROOT / "tests" / "docs" / "checkpoint_example.cpp").read_text()
    save = f"import transformers as t; t.AutoModelForCausalLM.from_config(t.{TINY}).save_pretrained({str(tmp_path)!r})"
    run(sys.executable, "-c", save)
    printed = run(ROOT / "build" / "bin" / "checkpoint_example", str(tmp_path))
    assert printed.startswith("mixtral, layer 0: output [4, 32]\n")
