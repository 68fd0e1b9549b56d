"""report.html in a real browser: nothing logged, nothing requested, every chart drawn, usable without a mouse."""

import json
import os
import pathlib
import struct
import subprocess

import pytest

from browser import open_browser
from program import ROOT, TINY, refuses, turnout

CHARTS = "document.querySelectorAll('.chart')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A small run with what a page must not stumble over: markup in the text, dropped choices."""
    folder = tmp_path_factory.mktemp("comparison")
    text = folder / "text"
    text.mkdir()
    for n in range(30):
        (text / f"page{n}.txt").write_text(f"</script><!-- {n} --> <b>points</b> & \u00fcber 'signals' are set. \t" * 20)
    done = turnout("compare", *TINY, "--text", text, "--tokens", 64 * 40, "--evaluations", 5, "--capacity", 0.9,
                   "--output", folder / "out")
    assert done.returncode == 0, done.stderr
    assert f"The report: {folder / 'out' / 'report.html'}" in done.stdout
    return folder / "out"


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    file = tmp_path_factory.mktemp("inspection") / "page.html"
    done = turnout("inspect", "--html", file)
    assert done.returncode == 0 and f"Written: {file}" in done.stdout, done.stderr
    return file


def show(page, file, **how):
    page.problems.clear()
    page.requests.clear()
    page.emulate(**how)
    page.open(file)


def expect_quiet(page, file):
    assert page.problems == []
    asked = [address for address in page.requests if not address.startswith(("data:", "blob:"))]
    assert asked == [file.as_uri()]


def charts_of(file):
    """Of a comparison: loss, throughput, two loads, router measures (what is 0 all along has none), two sweeps."""
    lines = [json.loads(line) for line in (file.parent / "telemetry.jsonl").read_text().splitlines()]
    layers = [line for line in lines if line["kind"] == "layer"]
    measures = "entropy", "max_over_mean", "logit_rms", "balance_loss", "dead_experts", "dropped"
    return 1 + 1 + 2 + sum(any(line[name] for line in layers) for name in measures) + 2


@pytest.mark.parametrize("which", ["comparison", "inspection"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_and_nothing_else_happens(page, request, which, scheme):
    file = request.getfixturevalue(which)
    file = file / "report.html" if file.is_dir() else file
    show(page, file, scheme=scheme)
    assert page.evaluate(f"{CHARTS}.length") == (charts_of(file) if which == "comparison" else 6)
    drawn = "c.querySelectorAll('.main-svg .trace path, .main-svg .hm image').length"
    assert page.evaluate(f"[...{CHARTS}].every(c => {drawn} > 0)")
    assert page.evaluate("document.documentElement.dataset.scheme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    expect_quiet(page, file)
    if folder := os.environ.get("TURNOUT_SCREENSHOTS"):
        page.emulate(scheme=scheme, height=page.evaluate("document.documentElement.scrollHeight"))
        page.screenshot(pathlib.Path(folder) / f"{which}-{scheme}.png")


def test_the_page_of_a_layer(page, comparison, tmp_path):
    file = tmp_path / "layer.html"
    done = turnout("inspect", "--checkpoint", comparison / "moe", "--layer", 1, "--text", comparison.parent / "text" / "page0.txt",
                   "--step", 3, "--html", file)
    assert done.returncode == 0, done.stderr
    show(page, file)
    assert page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") \
        == ["layer", "step", "capacity", "takers", "configuration"]
    written = page.evaluate("document.getElementById('configuration').textContent")
    assert str(comparison / "moe") in written and "processor" in written
    assert "Weights: the probabilities, divided by their sum." in page.evaluate("document.getElementById('step').textContent")
    expect_quiet(page, file)


def test_the_page_of_a_step_tells_what_the_policy_asks(page, tmp_path):
    for policy, words in ("threshold", "0.3926 > 0.4."), ("random", "< 0.3926 / 0.4."), ("all", "Second expert: all."):
        file = tmp_path / f"{policy}.html"
        assert turnout("inspect", "--step", 3, "--policy", policy, "--threshold", 0.4, "--html", file).returncode == 0
        show(page, file)
        assert words in page.evaluate("document.getElementById('step').textContent")
        expect_quiet(page, file)


def test_each_chart_has_words_and_numbers_for_those_who_do_not_see_it(page, comparison):
    show(page, comparison / "report.html")
    assert page.evaluate(f"[...{CHARTS}].every(c => c.getAttribute('role') === 'img' && c.getAttribute('aria-label').length > 20)")
    assert page.evaluate(f"[...{CHARTS}].every(c => c.closest('figure').querySelector('details table td'))")
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.caption.textContent.length > 0)")
    assert page.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert headings[0] == 1 and all(b - a <= 1 for a, b in zip(headings, headings[1:]))
    assert page.evaluate("document.documentElement.lang") == "en"


def test_the_keyboard_reaches_everything(page, comparison):
    show(page, comparison / "report.html")
    page.key("Tab", 9)
    assert page.evaluate("document.activeElement.className") == "skip"
    page.evaluate("document.querySelector('input[value=tokens]').focus()")
    title = "document.querySelector('#loss-chart .xtitle').textContent"
    assert page.evaluate(title) == "training tokens"
    page.key("ArrowRight", 39)
    page.wait(f"{title} === 'training FLOPs'")
    page.key("ArrowRight", 39)
    page.wait(f"{title} === 'seconds in training steps'")
    page.evaluate("document.getElementById('scheme').focus()")
    before = page.evaluate("document.documentElement.dataset.scheme")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    page.wait(f"document.documentElement.dataset.scheme !== '{before}'")
    expect_quiet(page, comparison / "report.html")


def test_its_data_are_those_of_the_files_beside_it(page, comparison):
    show(page, comparison / "report.html")
    held = json.loads(page.evaluate("document.getElementById('data').textContent"))
    report = json.loads((comparison / "compare.json").read_text())
    for key in "results", "models", "training", "text":
        assert held[key] == report[key]
    lines = [json.loads(line) for line in (comparison / "telemetry.jsonl").read_text().splitlines()]
    assert held["telemetry"] == lines
    drawn = page.evaluate("document.getElementById('loss-chart').data.map(trace => trace.y)")
    points = [json.loads(line) for line in (comparison / "curves.jsonl").read_text().splitlines()]
    assert drawn == [[p["bits_per_byte"] for p in points if p["model"] == model] for model in ("dense", "moe")]
    assert len(held["layers"]) == 2 and all(len(layer["takers"]) == 4 for layer in held["layers"])
    # Markup of the text arrives as text.
    assert page.evaluate("document.querySelectorAll('main b').length") == 0
    assert page.evaluate("document.querySelector('#takers').textContent.includes('points')")


def test_colours_of_the_loads_end_where_nearly_all_cells_lie(page, comparison):
    show(page, comparison / "report.html")
    maps = page.evaluate(f"[...{CHARTS}].flatMap(c => c.data).filter(t => t.type === 'heatmap')"
                         ".map(t => ({z: t.z, end: t.zmax, marks: t.colorbar.ticktext}))")
    lines = [json.loads(line) for line in (comparison / "telemetry.jsonl").read_text().splitlines()]
    loads = [line["load"] for line in lines if line["kind"] == "layer"]
    cells = sorted(rows * len(load) / sum(load) for load in loads for rows in load)
    assert sorted(cell for entry in maps for row in entry["z"] for cell in row) == pytest.approx(cells)
    [end] = {entry["end"] for entry in maps}
    assert end >= 2 and sum(cell <= end for cell in cells) >= 0.98 * len(cells)
    assert end == 2 or sum(cell <= end - 0.5 for cell in cells) < 0.99 * len(cells)
    assert {entry["marks"][-1] for entry in maps} == {f"≥ {end:g}" if cells[-1] > end else f"{end:g}"}


def test_it_fits_paper_and_narrow_screens(page, comparison):
    file = comparison / "report.html"
    show(page, file, width=380, height=800)
    assert page.evaluate("document.documentElement.scrollWidth <= 380")
    show(page, file, scheme="dark")
    printed = page.call("Page.printToPDF", printBackground=False)["data"]
    assert len(printed) > 20000
    expect_quiet(page, file)


def test_the_main_chart_becomes_a_picture(comparison, tmp_path):
    picture = tmp_path / "chart.png"
    done = subprocess.run([ROOT / "scripts" / "picture.sh", comparison / "report.html", picture], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 675)
    assert len(content) > 15000, "a blank picture is smaller"


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    target = tmp_path / "missing" / "page.html"
    assert str(target) in refuses("inspect", "--html", target)
    assert list(tmp_path.iterdir()) == []
