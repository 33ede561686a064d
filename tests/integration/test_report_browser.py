"""The report in a real browser: it renders without a console message and sends no network request."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess

import pytest
from synthetic_runs import write_all

from megatron_g2rl.report import write_report
from megatron_g2rl.tracking.table import METRICS

pytestmark = pytest.mark.same_for_both

SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000 --dump-dom"
).split()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browse(tmp_path):
    """Opens a page; returns its DOM, its console messages and the requested addresses."""
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")

    def open_page(page, width=1440):
        log = tmp_path / f"{page.stem}.netlog"
        switches = [*SWITCHES, f"--user-data-dir={tmp_path / page.stem}.profile", f"--log-net-log={log}"]
        switches.append(f"--window-size={width},900")
        done = subprocess.run([CHROMIUM, *switches, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        # Requests of the browser itself (time, accounts) have no page as their initiator.
        asked = {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}
        return done.stdout, console, asked

    return open_page


def write_runs(folders, names):
    """Write runs with every kind of file and random values of these metrics."""
    draw = random.Random(0)
    for folder in folders:
        folder.mkdir()
        steps = [{"step": i} | {name: draw.random() for name in names} for i in range(30)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        text = "<script>console.log(1)</script><img src=http://127.0.0.1:9/x.png>"
        (folder / "responses.jsonl").write_text(json.dumps(dict(step=0, prompt=text, response=text, reward=1)) + "\n")
    return folders


@pytest.fixture
def runs(tmp_path):
    names = ["reward/pass_rate", "policy/entropy", "mismatch/kl", "time/step_s", "time/update_s"]
    return write_runs([tmp_path / "first", tmp_path / "second"], names)


MEASURE = """<script>
const page = document.documentElement;
const wide = [...document.querySelectorAll("table")].filter(t => t.scrollWidth > t.parentElement.clientWidth);
const boxes = wide.filter(t => getComputedStyle(t.parentElement).overflowX == "auto");
document.body.innerHTML = "MEASURED " + [page.clientWidth, page.scrollWidth, wide.length, boxes.length,
    document.querySelectorAll("table").length].join(" ") + ".";
</script>"""


@pytest.mark.parametrize(("width", "count"), [(1440, 4), (800, 4), (800, 8)])
def test_tables_fit_on_a_wide_screen_and_scroll_in_their_own_box_on_a_narrow_one(browse, tmp_path, width, count):
    names = [metric.name.replace("*", "8") for metric in METRICS]
    folders = write_runs([tmp_path / f"run_with_seed_{i}" for i in range(count)], names)
    page = tmp_path / "report.html"
    write_report(folders, page)
    text = page.read_text()
    page.write_text(re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text) + MEASURE)
    dom, _, _ = browse(page, width)
    inner, outer, wide, boxes, tables = map(int, re.search(r"MEASURED ([\d ]+)\.", dom)[1].split())
    assert width - 20 <= inner == outer <= width  # less a scroll bar; the page itself does not scroll sideways
    assert tables >= 6 and boxes == wide
    assert (wide == 0) == (width == 1440)


def test_the_report_renders_without_console_messages_and_without_the_network(browse, runs, tmp_path):
    page = tmp_path / "report.html"
    write_report(runs, page)
    dom, console, asked = browse(page)
    assert "Pass rate" in dom and dom.count('role="img"') == 5
    assert console == []
    assert not asked


SEEDS = """<script>
const lines = [...document.querySelectorAll(".seed")];
const shown = () => lines.filter(line => line.getClientRects().length).length;
const before = shown();
document.getElementById("seeds").click();
const after = shown(), page = document.documentElement;
const charts = [...document.querySelectorAll("figure > svg")].filter(c => c.getBoundingClientRect().width < 200);
document.body.innerHTML = "MEASURED " + [lines.length, before, after, page.clientWidth, page.scrollWidth,
    charts.length].join(" ") + ".";
</script>"""


def test_two_methods_with_five_seeds_are_bands_and_single_seeds_appear_on_demand(browse, tmp_path):
    folders, evaluations = write_all(tmp_path, ("none", "gradient"), 5)
    page = tmp_path / "report.html"
    write_report(folders, page, [evaluations])
    dom, console, asked = browse(page)
    assert "10 runs of 2 settings" in dom and "Accuracy by g2rl evaluate" in dom
    assert console == [] and not asked
    page.write_text(re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()) + SEEDS)
    for width in (1440, 500):
        dom, _, _ = browse(page, width)
        lines, before, after, inner, outer, small = map(int, re.search(r"MEASURED ([\d ]+)\.", dom)[1].split())
        assert lines >= 100 and before == 0 and after == lines
        assert width - 20 <= inner == outer <= width and small == 0


def test_the_browser_harness_detects_console_messages_and_requests(browse, tmp_path):
    page = tmp_path / "control.html"
    page.write_text("<script>console.error('seen')</script><img src='http://127.0.0.1:9/x.png'>")
    _, console, asked = browse(page)
    assert any("seen" in line for line in console)
    assert "http://127.0.0.1:9/x.png" in asked
