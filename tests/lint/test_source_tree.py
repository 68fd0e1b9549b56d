"""The rules of the source tree: who may include whom, files of at most 600 lines, headers that say what they are."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
LONGEST_FILE = 600
WIDEST_LINE = 120

# Each level and the levels that it may include. The program and the tests see every public header.
MAY_INCLUDE = {
    "kernels": {"kernels"},
    "ops": {"ops", "kernels"},
    "distributed": {"distributed", "ops"},
    "checkpoint": {"checkpoint", "ops"},
    "layers": {"layers", "ops", "distributed"},
    "pretrained": {"pretrained", "layers", "ops", "checkpoint"},
    "models": {"models", "pretrained", "layers", "ops", "distributed", "checkpoint"},
    "compat": {"compat", "layers", "ops"},
}

# The level whose folder of src/ defines what each public header declares.
KERNEL_HEADERS = {("table.h",), ("linear.h",), ("router.h",), ("routing.h",), ("rows.h",)}  # what the other levels may see
LEVEL_OF_HEADER = {
    "runtime.h": "ops",
    "gate.h": "ops",
    "router.h": "ops",
    "router_variants.h": "ops",
    "balance.h": "ops",
    "statistics.h": "ops",
    "plan.h": "ops",
    "slots.h": "ops",
    "experts.h": "ops",
    "combine.h": "ops",
    "world.h": "distributed",
    "quantized.h": "ops",
    "exchange.h": "distributed",
    "checkpoint.h": "checkpoint",
    "moe.h": "layers",
    "hierarchical_moe.h": "layers",
    "upcycle.h": "layers",
    "chunk_trial.h": "layers",
    "expert_parallel.h": "layers",
    "pretrained.h": "pretrained",
    "compat.h": "compat",
    "text.h": "models",
    "transformer.h": "models",
    "training.h": "models",
    "telemetry.h": "models",
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
INSTRUCTION_SETS = {"x86", "arm"}
# What files compiled with wide instructions may include: nothing with inline functions that the linker could share.
ISA_HEADERS = {"stddef.h", "stdint.h", "string.h", "immintrin.h", "arm_neon.h", "arm_sve.h"}


def includes(path):
    """Yields (line number, is quoted, name) of each #include."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if found := INCLUDE.match(line):
            yield number, found[1] == '"', found[2]


def sources(root, *folders):
    files = (path for folder in folders for path in (root / folder).rglob("*"))
    return sorted(path for path in files if path.suffix in {".h", ".cpp", ".inc"})


def resolve(root, path, name):
    """The file under src/ that a quoted include names, beside the includer or from src/."""
    for base in (path.parent, root / "src"):
        if (candidate := (base / name).resolve()).is_file():
            return candidate.relative_to((root / "src").resolve()).parts
    return None


def refusal(root, path, quoted, name):
    """Why this include breaks the arrows, or None."""
    inside_src = path.is_relative_to(root / "src")
    level = path.relative_to(root / "src").parts[0] if inside_src else LEVEL_OF_HEADER.get(path.name)
    if level is None:
        return f"{path.name} has no level: add it to LEVEL_OF_HEADER"
    if level not in MAY_INCLUDE:
        return f"src/{level} is no level: add it to MAY_INCLUDE"

    if not quoted and not name.startswith("turnout/"):
        if level == "kernels" and "/" in name and name != "sys/mman.h":  # pages of scratch memory
            return "kernels include nothing but the C++ library"
        is_isa = inside_src and INSTRUCTION_SETS & set(path.relative_to(root).parts)
        if is_isa and name not in ISA_HEADERS:
            return "files of one instruction set include no inline code of the C++ library"
        if not inside_src and name.endswith("intrin.h"):
            return "public headers hold no intrinsics"
        return None

    if not quoted:
        header = name.removeprefix("turnout/")
        target = "ops" if header == "version.h" else LEVEL_OF_HEADER.get(header)
        if target is None:
            return f"{header} has no level: add it to LEVEL_OF_HEADER"
        return None if target in MAY_INCLUDE[level] else f"{level} may not include {target}"

    if not inside_src:
        return "public headers include each other as <turnout/…>"
    parts = resolve(root, path, name)
    if parts is None:
        return "there is no such file"
    if parts[0] not in MAY_INCLUDE[level]:
        return f"{level} may not include {parts[0]}"
    if level != "kernels" and parts[0] == "kernels" and parts[1:] not in KERNEL_HEADERS:
        return f"{level} reaches the kernels through kernels/table.h, linear.h, router.h, routing.h and rows.h alone"
    stage = path.relative_to(root / "src").parts[1]
    if level == "ops" and stage == "autograd" and parts[:2] in {("ops", "cpu"), ("ops", "aten"), ("ops", "meta")}:
        return "autograd reaches the backends through the dispatcher"
    return None


def broken_arrows(root):
    broken = []
    for path in sources(root, "src", "include"):
        for number, quoted, name in includes(path):
            if why := refusal(root, path, quoted, name):
                broken.append(f"{path.relative_to(root)}:{number}: {name}: {why}")
    for path in sources(root, "cli"):
        for number, quoted, name in includes(path):
            if quoted and not (path.parent / name).is_file():
                broken.append(f"{path.relative_to(root)}:{number}: {name}: the program sees public headers alone")
    return broken


def is_documented(lines, at):
    """Whether the type that starts at this index has a /// comment above, or is a struct whose fields have."""
    above = [text for text in lines[:at] if not text.startswith(("template", "["))]
    if above and above[-1].startswith("///"):
        return True
    body = lines[at : lines.index("};", at) if "};" in lines[at:] else at]
    return lines[at].startswith("struct") and any("///" in text for text in body)


def undocumented(root):
    """Public headers without an opening comment, with conditional code, or with a type that has no /// comment."""
    found = []
    for path in sorted((root / "include" / "turnout").glob("*.h")):
        lines = path.read_text().splitlines()
        where = path.relative_to(root)
        if not lines or not lines[0].startswith("// "):
            found.append(f"{where}:1: the first line does not say what the header is")
        for number, line in enumerate(lines, 1):
            if re.match(r"\s*#\s*if", line):
                found.append(f"{where}:{number}: public headers have no conditional code")
            if re.match(r"(struct|class|enum class) \w+[^;]*$", line) and not is_documented(lines, number - 1):
                found.append(f"{where}:{number}: no /// comment on {line.split('{')[0].strip()}")
    return found


def test_include_arrows():
    assert not broken_arrows(ROOT), "\n" + "\n".join(broken_arrows(ROOT))


def test_public_headers_are_documented():
    assert not undocumented(ROOT), "\n" + "\n".join(undocumented(ROOT))


def test_no_file_is_too_long():
    kinds = {".h", ".cpp", ".inc", ".py", ".sh", ".cmake", ".txt"}
    folders = ("include", "src", "cli", "python", "tests", "benchmarks", "cmake", "scripts")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds)
    long = {str(path.relative_to(ROOT)): count for path in files
            if (count := len(path.read_text().splitlines())) > LONGEST_FILE}
    assert not long, f"files of more than {LONGEST_FILE} lines: {long}"


def test_lines_of_what_users_read_fit():
    """Public headers and the Python package."""
    files = [*(ROOT / "include").rglob("*.h"), *(ROOT / "python").rglob("*.py")]
    wide = [f"{path.relative_to(ROOT)}:{number}" for path in files
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > WIDEST_LINE]
    assert not wide, f"lines of more than {WIDEST_LINE} characters: {wide}"


def test_each_source_says_its_idea_first():
    silent = [str(path.relative_to(ROOT)) for path in sources(ROOT, "src", "cli", "tests/cpp")
              if not path.read_text().startswith(("//", "/*"))]
    assert not silent, f"files whose first line is no comment: {silent}"


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_broken_arrows_are_found_with_file_and_line(tmp_path):
    write(tmp_path, "src/kernels/table.h", "#include <vector>\n#include <ATen/ATen.h>\n")
    write(tmp_path, "src/kernels/x86/avx2.cpp", "#include <algorithm>\n#include <immintrin.h>\n")
    write(tmp_path, "src/ops/cpu/experts.cpp", '#include "kernels/table.h"\n#include "kernels/x86/avx2.cpp"\n')
    write(tmp_path, "src/ops/aten/experts.h", "#include <ATen/ATen.h>\n")
    write(tmp_path, "src/ops/autograd/experts.cpp", '#include "../aten/experts.h"\n')
    write(tmp_path, "src/ops/plan.cpp", "#include <turnout/moe.h>\n")
    write(tmp_path, "src/layers/moe.cpp", '#include "models/hash.h"\n#include "missing.h"\n')
    write(tmp_path, "src/models/hash.h", "#include <turnout/moe.h>\n")
    write(tmp_path, "include/turnout/plan.h", "#include <immintrin.h>\n")
    write(tmp_path, "cli/main.cpp", '#include "models/hash.h"\n#include <turnout/moe.h>\n')
    assert sorted(line.split(": ")[0] for line in broken_arrows(tmp_path)) == sorted([
        "src/kernels/table.h:2",
        "src/kernels/x86/avx2.cpp:1",
        "src/layers/moe.cpp:1",
        "src/layers/moe.cpp:2",
        "src/ops/autograd/experts.cpp:1",
        "src/ops/cpu/experts.cpp:2",
        "src/ops/plan.cpp:1",
        "include/turnout/plan.h:1",
        "cli/main.cpp:1",
    ])


def test_undocumented_headers_are_found(tmp_path):
    write(tmp_path, "include/turnout/plan.h",
          "#pragma once\n#ifdef X\nstruct Bare {\n};\n/// Said.\nstruct Told {\n};\n"
          "struct Fields {\n  int n;  ///< said\n};\nstruct Later;\n")
    assert [line.split(": ")[0] for line in undocumented(tmp_path)] == [
        "include/turnout/plan.h:1", "include/turnout/plan.h:2", "include/turnout/plan.h:3"]
