"""The report in a real browser: it renders without a console message and sends no network request."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import pytest

from megatron_g2rl.report import write_report

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

    def open_page(page):
        log = tmp_path / f"{page.stem}.netlog"
        switches = [*SWITCHES, f"--user-data-dir={tmp_path / page.stem}.profile", f"--log-net-log={log}"]
        done = subprocess.run([CHROMIUM, *switches, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        # Requests of the browser itself (time, accounts) have no page as their initiator.
        asked = {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}
        return done.stdout, console, asked

    return open_page


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs with every kind of file."""
    draw = random.Random(0)
    names = ["reward/pass_rate", "policy/entropy", "mismatch/kl", "time/step_s", "time/update_s"]
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        steps = [{"step": i} | {name: draw.random() for name in names} for i in range(30)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        text = "<script>console.log(1)</script><img src=http://127.0.0.1:9/x.png>"
        (folder / "responses.jsonl").write_text(json.dumps(dict(step=0, prompt=text, response=text, reward=1)) + "\n")
    return folders


def test_the_report_renders_without_console_messages_and_without_the_network(browse, runs, tmp_path):
    page = tmp_path / "report.html"
    write_report(runs, page)
    dom, console, asked = browse(page)
    assert "Pass rate" in dom and dom.count('role="img"') >= 6
    assert console == []
    assert not asked


def test_the_browser_harness_detects_console_messages_and_requests(browse, tmp_path):
    page = tmp_path / "control.html"
    page.write_text("<script>console.error('seen')</script><img src='http://127.0.0.1:9/x.png'>")
    _, console, asked = browse(page)
    assert any("seen" in line for line in console)
    assert "http://127.0.0.1:9/x.png" in asked
