"""What was measured, in words: versions and hardware, tables for the terminal and for a report."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import subprocess
import time
from importlib import metadata

import torch

from peers_wheels import PACKAGES, wheel_version

ROOT = pathlib.Path(__file__).resolve().parents[1]
OWN = "turnout"  # the names of Turnout's own rows start so


def processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(wheels: pathlib.Path | None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "turnout", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found | {package: version for package in PACKAGES if (version := wheel_version(wheels, package))}


def commit() -> str:
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def describe_machine(threads: int, wheels: pathlib.Path | None, program: dict) -> dict:
    """`program`: the machine as `turnout bench --json` describes it."""
    return {"processor": processor(), "cores": os.cpu_count(), "threads": threads,
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
            "kernels": program["kernels"], "torch_instructions": torch.backends.cpu.get_cpu_capability(),
            "versions": {"turnout": program["turnout"]} | versions(wheels), "commit": commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def report_name(machine: dict) -> str:
    """<machine>-<date>"""
    words = re.sub(r"[^a-z0-9]+", "-", f"{machine['processor']} {machine['threads']} threads".lower()).strip("-")
    return f"{words}-{machine['date'][:10]}"


def cell_title(row: dict) -> str:
    return f"{row['pass']} {row['type']} {row['case']}"


def ranked(rows: list[dict]) -> list[dict]:
    """Those that were timed, fastest first."""
    return sorted((r for r in rows if "seconds" in r), key=lambda r: r["seconds"]["median"])


def reason(row: dict) -> str:
    return next(f"{word}: {row[word]}" for word in ("absent", "failed", "wrong") if word in row)


def share(row: dict | None) -> str:
    return f"{100 * row['share']['median']:.0f} %" if row and row.get("share") else "-"


def rate(row: dict) -> str:
    unit = "GB/s" if row["pass"] == "decode" else "GF/s"
    return f"{row['rate']['median'] / 1e9:.1f} {unit}"


def milliseconds(row: dict) -> tuple[str, str]:
    s = {name: f"{1e3 * value:.4g}" for name, value in row["seconds"].items()}
    return s["median"], f"{s['quartile1']} to {s['quartile3']}"


def show(rows: list[dict]) -> None:
    """One cell, for the terminal."""
    print(f"\n{cell_title(rows[0])}")
    for row in ranked(rows):
        median, spread = milliseconds(row)
        growth = f"  +{row['memory_growth'] / 1e6:.0f} MB" if row.get("memory_growth") is not None else ""
        print(f"  {row['peer']:<24} {median:>8} ms ({spread})  {rate(row):>12}  {share(row):>5}  "
              f"error {row['error']:.0e}{growth}")
    for row in rows:
        if "seconds" not in row:
            print(f"  {row['peer']:<24} {reason(row)}", flush=True)


def table(head: list[str], lines: list[list[str]], text_columns: int = 1) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, rule, *lines])


def cells_of(results: list[dict]) -> list[list[dict]]:
    cells: dict[str, list[dict]] = {}
    for row in results:
        cells.setdefault(cell_title(row), []).append(row)
    return list(cells.values())


def summary(cells: list[list[dict]]) -> str:
    """Turnout's best against the two best others."""
    lines = []
    for rows in cells:
        done = ranked(rows)
        own = next((r for r in done if r["peer"].startswith(OWN)), None)
        others = [r for r in done if not r["peer"].startswith(OWN)][:2]
        named = [f"{r['peer']} {share(r)}" for r in others] + ["-"] * (2 - len(others))
        factor = others[0]["seconds"]["median"] / own["seconds"]["median"] if own and others else None
        lines.append([cell_title(rows[0]), f"{own['peer']} {share(own)}" if own else "-", *named,
                      f"{factor:.2f} ×" if factor else "-"])
    return table(["case", "Turnout's best", "best peer", "second", "faster than the best peer"], lines, text_columns=4)


def detail(rows: list[dict]) -> str:
    lines = [[r["peer"], *milliseconds(r), rate(r), share(r), f"{r['error']:.0e}"] for r in ranked(rows)]
    return f"\n### {cell_title(rows[0])}\n\n" + table(
        ["peer", "ms", "quartiles", "rate", "share", "error"], lines)


def memory(cells: list[list[dict]]) -> str:
    cells = [rows for rows in cells if any(r.get("memory_growth") is not None for r in rows)]
    if not cells:
        return ""
    names = list(dict.fromkeys(r["peer"] for rows in cells for r in rows if r.get("memory_growth") is not None))
    lines = []
    for rows in cells:
        growth = {r["peer"]: r.get("memory_growth") for r in rows}
        lines.append([cell_title(rows[0])] + [
            "-" if growth.get(name) is None else f"{growth[name] / 1e6:.0f}" for name in names])
    return (
        "\n## Memory growth of a training step, MB\n\n"
        "Peak resident memory of the peer's own process in a step (the kernel's high-water mark, reset before it), less "
        "what was resident before and less the weights' gradients. Scratch that Turnout keeps between calls was given "
        "back before, so it counts; buffers that kt-kernel makes beforehand do not.\n\n"
        + table(["case", *names], lines))


def left_out(results: list[dict]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results:
        if "seconds" not in row:
            reasons.setdefault((row["peer"], reason(row)), []).append(cell_title(row))
    if not reasons:
        return ""
    lines = [[peer, why.replace("|", "\\|"), str(len(where)) if len(where) > 2 else "; ".join(where)]
             for (peer, why), where in reasons.items()]
    return "\n## Not timed\n\n" + table(["peer", "why", "cases"], lines, text_columns=3)


def markdown(report: dict) -> str:
    machine, limits, cells = report["machine"], report["limits"], cells_of(report["results"])
    words = ", ".join(" ".join(item) for item in machine["versions"].items())
    quartile_words = {name: f"{v['median'] / 1e9:.0f} ({v['quartile1'] / 1e9:.0f} to {v['quartile3'] / 1e9:.0f})"
                      for name, v in limits.items()}
    return (
        "# Expert layers side by side\n\n"
        f"- {machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"{machine['memory_gb']} GB; Turnout's kernels {machine['kernels']}\n"
        f"- {words}; commit {machine['commit']}\n"
        f"- {machine['date']}, {report['rounds']} rounds\n"
        f"- `{report['command']}`\n\n"
        f"Register peak fp32 {quartile_words['fp32_flops']}, bf16 {quartile_words['bf16_flops']} GF/s; reads "
        f"{quartile_words['read_bytes']} GB/s (median and quartiles of the whole run).\n\n"
        "All peers have the same weights and inputs; each was held against float64 before it was timed. In every round "
        "each peer has one turn, in an order that rotates, and the machine's limits are measured. A share is the rate "
        "of a turn over the limit of its round: the register peak (2 flops a multiply-add of the products, a step being "
        "three forwards), or for decode the read bandwidth (weights of the experts used). Times, rates and shares are "
        "medians. Packed weights are packed beforehand; a training step packs what it needs. Error: of the worst "
        "result, ‖difference‖ / ‖reference‖.\n\n"
        "## Shares of the limit\n\n" + summary(cells) + memory(cells) + "\n## Every peer\n"
        + "".join(detail(rows) for rows in cells if ranked(rows)) + left_out(report["results"]))
