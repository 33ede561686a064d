"""What the user sees of a run: plain lines without a terminal, a display that fits any terminal, nothing elsewhere."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from megatron_g2rl.tracking.progress import (
    TRAINING,
    WARM_START,
    Display,
    LiveDisplay,
    PlainLines,
    make_display,
    sparkline,
)

VALUES = {
    "reward/mean": -0.25,
    "reward/pass_rate": 0.375,
    "policy/entropy": 0.5,
    "response_length/mean": 28.4,
    "exploration/novelty_mean": 0.93,
    "geometry/negative_fraction": 0.508,
    "update/loss": 0.01,
    "update/gradient_norm": 0.9,
    "time/step_s": 2.0,
    "throughput/response_tokens_per_s": 1370.7,
}


def terminal(width: int = 100, height: int = 25) -> Console:
    return Console(force_terminal=True, file=io.StringIO(), width=width, height=height, color_system=None)


def drawn(display: LiveDisplay) -> str:
    """One frame of the display, without control codes."""
    console = display.console
    with console.capture() as picture:
        console.print(display.render())
    return picture.get()


@pytest.fixture
def training():
    display = LiveDisplay("quickstart", terminal())
    display.begin(TRAINING, 2, 10)
    display.phase("rollout")
    display.show(3, VALUES)
    display.show(4, VALUES | {"reward/pass_rate": 0.5})
    return display


def test_without_a_terminal_there_is_one_line_per_step(caplog):
    caplog.set_level(logging.INFO)
    with make_display("run", rank=0, console=Console(file=io.StringIO())) as display:
        display.begin(TRAINING, 0, 2)
        display.phase("rollout")
        display.show(1, VALUES)
        display.show(2, {name: VALUES[name] for name in VALUES if not name.startswith(("exploration", "update"))})
    assert caplog.messages == [
        "step 1/2 | pass 37.5% | reward -0.250 | entropy 0.500 | tokens 28 | nu 0.930 | negative 50.8% | loss +0.0100"
        " | grad 0.900 | 2.0 s (1371 tokens/s)",
        "step 2/2 | pass 37.5% | reward -0.250 | entropy 0.500 | tokens 28 | 2.0 s (1371 tokens/s)",
    ]


def test_the_warm_up_logs_a_line_every_twenty_steps_and_at_its_end(caplog):
    caplog.set_level(logging.INFO)
    display = PlainLines()
    display.begin(WARM_START, 0, 45)
    for done in range(1, 46):
        display.show(done, {"warm_start/loss": 1 / done})
    assert [line.split(" | ")[0] for line in caplog.messages] == [f"warm start {n}/45" for n in (1, 21, 41, 45)]


def test_other_ranks_and_dumb_terminals_have_no_display(monkeypatch):
    assert type(make_display("run", rank=1, console=terminal())) is Display
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_display("run", rank=0, console=terminal())) is PlainLines


def test_the_display_shows_every_documented_item(training):
    training._unit_s.clear()
    training._unit_s.extend([3.0, 5.0])
    picture = drawn(training)
    for part in ["quickstart", "training 4/10", "now rollout 0 s", "left 0:24", "reward -0.250", "pass rate 50.0%"]:
        assert part in picture
    for part in ["entropy 0.500 nats", "length 28 tokens", "ν 0.930", "negative pairs 50.8%", "speed 1371 tokens/s"]:
        assert part in picture
    assert "pass rate ▁█" in picture


def test_the_warm_up_uses_the_same_display():
    display = LiveDisplay("quickstart", terminal())
    display.begin(WARM_START, 0, 300)
    display.show(1, {"warm_start/loss": 2.5})
    assert "warm start 1/300" in drawn(display) and "loss 2.5000" in drawn(display)
    display.begin(TRAINING, 0, 10)
    assert "2.5" not in drawn(display) and "left" not in drawn(display)


@pytest.mark.parametrize("width", [1, 2, 7, 20, 40, 79, 300])
def test_no_line_is_wider_than_the_terminal(training, width):
    training.console = terminal(width)
    assert max(map(len, drawn(training).splitlines())) <= width


def test_a_narrow_terminal_omits_no_number(training):
    training.console = terminal(40)
    picture = drawn(training)
    assert all(part in picture for part in ["reward -0.250", "entropy 0.500 nats", "speed 1371 tokens/s"])


def test_a_terminal_without_unicode_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with make_display("run", 0, Console(force_terminal=True, file=stream, width=60, color_system=None)) as display:
        display.begin(TRAINING, 0, 3)
        display.show(1, VALUES)
        display.show(2, VALUES)
    assert b"nu 0.930" in stream.buffer.getvalue()


def test_log_lines_are_complete_while_the_display_is_drawn_and_handlers_are_restored():
    root, console = logging.getLogger(), terminal(60)
    own = logging.StreamHandler(io.StringIO())
    root.addHandler(own)
    try:
        with pytest.raises(RuntimeError), LiveDisplay("run", console) as display:
            display.begin(TRAINING, 0, 2)
            logging.getLogger("megatron_g2rl").warning("resumed [bold] after 3 steps")
            assert own not in root.handlers
            raise RuntimeError
        assert own in root.handlers and own.stream.getvalue() == ""
        assert not [h for h in root.handlers if type(h).__name__ == "RichHandler"]
    finally:
        root.removeHandler(own)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "resumed [bold] after 3 steps" in [line.strip("\r ") for line in plain.split("\n")]
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor must come back"


def test_stderr_decides_whether_there_is_a_terminal():
    code = (
        "from megatron_g2rl.tracking.progress import make_display\n"
        "with make_display('run', 0) as display:\n"
        "    display.begin('warm start', 0, 2); display.show(1, {'warm_start/loss': 1.0})\n"
        "    raise SystemExit(type(display).__name__ == 'LiveDisplay')"
    )
    # FORCE_COLOR makes rich treat any stream as a terminal
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    piped = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment, timeout=60)
    assert piped.returncode == 0 and b"\x1b[" not in piped.stderr
    master, slave = pty.openpty()
    on_terminal = subprocess.run([sys.executable, "-c", code], stderr=slave, env=environment, timeout=60)
    os.close(slave)
    assert on_terminal.returncode == 1 and b"warm start" in os.read(master, 100_000)
    os.close(master)


@pytest.mark.parametrize("width, bars", [(4, "▁▃▆█"), (2, "▁█"), (1, "▁"), (9, "▁▃▆█")])
def test_a_curve_fits_its_width(width, bars):
    assert sparkline([0.0, 1.0, 2.0, 3.0], width) == bars
