"""Progress of a run for the user: a live display on a terminal, plain log lines elsewhere.

with make_display("quickstart", rank=0) as display:
    display.begin("training", done=0, total=60)
    display.phase("rollout")
    display.show(1, metrics)
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.highlighter import NullHighlighter
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

WARM_START = "warm start"
TRAINING = "training"

PLAIN_EVERY = {WARM_START: 20}
"""Units of a stage per plain line; 1 for a stage that is not listed."""

SHOWN = (
    ("loss", "warm_start/loss", "{:.4f}"),
    ("reward", "reward/mean", "{:+.3f}"),
    ("pass rate", "reward/pass_rate", "{:.1%}"),
    ("entropy", "policy/entropy", "{:.3f} nats"),
    ("length", "response_length/mean", "{:.0f} tokens"),
    ("ν", "exploration/novelty_mean", "{:.3f}"),
    ("negative pairs", "geometry/negative_fraction", "{:.1%}"),
    ("speed", "throughput/response_tokens_per_s", "{:.0f} tokens/s"),
)
"""Label, metric and format of the numbers in the display."""

CURVES = {WARM_START: ("loss", "warm_start/loss"), TRAINING: ("pass rate", "reward/pass_rate")}
"""Label and metric of the sparkline of each stage."""

_BARS = "▁▂▃▄▅▆▇█"


class Display:
    """Base class that shows nothing: the display of ranks other than 0."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, stage: str, done: int, total: int) -> None:
        """Start a stage of the run, of whose `total` units `done` are already finished."""

    def phase(self, name: str | None) -> None:
        """Set the current phase; None: no named phase."""

    def show(self, done: int, values: Mapping[str, float]) -> None:
        """Report a finished unit of the stage with its metrics; `done` counts the finished units."""


class PlainLines(Display):
    """One log line per unit."""

    def begin(self, stage: str, done: int, total: int) -> None:
        self.stage, self.total = stage, total

    def show(self, done: int, values: Mapping[str, float]) -> None:
        if (done - 1) % PLAIN_EVERY.get(self.stage, 1) == 0 or done == self.total:
            log.info(plain_line(self.stage, done, self.total, values))


class LiveDisplay(Display):
    """A few lines at the bottom of the terminal, redrawn four times per second; log lines appear above them."""

    def __init__(self, run: str, console: Console):
        self.run, self.console = run, console
        self.stage, self.done, self.total = "starting", 0, 0
        self.values: Mapping[str, float] = {}
        self._phase: str | None = None
        self._phase_start = self._unit_end = time.monotonic()
        self._unit_s: deque[float] = deque(maxlen=20)
        self._curve: list[float] = []
        self._replaced: list[logging.Handler] = []
        self._handler = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, highlighter=NullHighlighter()
        )
        self._live = Live(
            console=console, get_renderable=self.render, refresh_per_second=4, redirect_stdout=sys.stdout.isatty()
        )

    def __enter__(self) -> LiveDisplay:
        root = logging.getLogger()
        # These write to the terminal directly and would corrupt the display.
        self._replaced = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
        for handler in self._replaced:
            root.removeHandler(handler)
        root.addHandler(self._handler)
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._phase = None
        self._live.stop()
        root = logging.getLogger()
        root.removeHandler(self._handler)
        for handler in self._replaced:
            root.addHandler(handler)

    def begin(self, stage: str, done: int, total: int) -> None:
        self.stage, self.done, self.total = stage, done, total
        self.values, self._curve = {}, []
        self._unit_s.clear()
        self._unit_end = time.monotonic()
        self.phase(None)

    def phase(self, name: str | None) -> None:
        if name != self._phase:
            self._phase, self._phase_start = name, time.monotonic()

    def show(self, done: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._unit_s.append(now - self._unit_end)
        self._unit_end, self.done, self.values = now, done, dict(values)
        if self.stage in CURVES and CURVES[self.stage][1] in values:
            self._curve.append(values[CURVES[self.stage][1]])

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds of the stage, from the last 20 units; None before the first."""
        if not self._unit_s:
            return None
        pace = sum(self._unit_s) / len(self._unit_s)
        return max(pace * (self.total - self.done) - (time.monotonic() - self._unit_end), 0.0)

    def render(self) -> RenderableType:
        """The current display, for a console of any width."""
        ascii_only = self.console.options.ascii_only
        counted = f"{self.done}/{self.total}" if self.total else ""
        facts = [(self.run, ""), (self.stage, counted)]
        if self._phase:
            facts.append(("now", f"{self._phase} {time.monotonic() - self._phase_start:.0f} s"))
        if self.seconds_left is not None:
            facts.append(("left", _duration(self.seconds_left)))
        numbers = [
            ("nu" if ascii_only and label == "ν" else label, form.format(self.values[name]))
            for label, name, form in SHOWN
            if name in self.values
        ]
        width = self.console.width
        parts: list[RenderableType] = _facts(facts, "bold", width)
        if self.total:
            bar = Table.grid()
            bar.add_row(ProgressBar(total=self.total, completed=self.done, width=min(width, 80)))
            parts.append(bar)
        parts += _facts(numbers, "dim", width)
        if len(self._curve) > 1 and not ascii_only:
            label = CURVES[self.stage][0]
            bars = sparkline(self._curve, max(min(width, 80) - len(label) - 1, 1))
            parts.append(Text.assemble((label, "dim"), " ", (bars, "green"), no_wrap=True, overflow="crop"))
        return Group(*parts)


def make_display(run: str, rank: int, console: Console | None = None) -> Display:
    """The display of this rank: empty on ranks other than 0, live if stderr is a terminal, else plain lines.

    Args:
        run: name of the run.
        rank: rank of this process.
        console: output; by default stderr.
    """
    if rank != 0:
        return Display()
    terminal = sys.stderr.isatty() if console is None else console.is_terminal
    console = console or Console(stderr=True)
    return LiveDisplay(run, console) if terminal and not console.is_dumb_terminal else PlainLines()


def plain_line(stage: str, done: int, total: int, values: Mapping[str, float]) -> str:
    """One log line about a finished unit of a stage."""
    if stage == TRAINING:
        return _training_line(done, total, values)
    if stage == WARM_START:
        return f"warm start {done}/{total} | loss {values['warm_start/loss']:.4f} nats per token"
    return " | ".join([f"{stage} {done}/{total}", *(f"{name} {value:.4g}" for name, value in values.items())])


def sparkline(values: list[float], width: int) -> str:
    """`values` as a sparkline of at most `width` characters, scaled to their range; longer series are averaged."""
    width = min(width, len(values))
    bounds = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in means)


def _training_line(done: int, total: int, metrics: Mapping[str, float]) -> str:
    parts = [
        f"step {done}/{total}",
        f"pass {metrics['reward/pass_rate']:.1%}",
        f"reward {metrics['reward/mean']:+.3f}",
        f"entropy {metrics['policy/entropy']:.3f}",
        f"tokens {metrics['response_length/mean']:.0f}",
    ]
    if "exploration/novelty_mean" in metrics:
        parts.append(f"nu {metrics['exploration/novelty_mean']:.3f}")
        if "geometry/negative_fraction" in metrics:
            parts.append(f"negative {metrics['geometry/negative_fraction']:.1%}")
    if "update/loss" in metrics:
        parts += [f"loss {metrics['update/loss']:+.4f}", f"grad {metrics['update/gradient_norm']:.3f}"]
    parts.append(f"{metrics['time/step_s']:.1f} s ({metrics['throughput/response_tokens_per_s']:.0f} tokens/s)")
    return " | ".join(parts)


def _facts(facts: list[tuple[str, str]], style: str, width: int) -> list[RenderableType]:
    """Labels and values, wrapped to the width between them; one is split only if it is wider than a line."""
    lines: list[Text] = []
    for label, value in facts:
        fact = Text.assemble((label, style), " " if value else "", value)
        if lines and len(lines[-1]) + 3 + len(fact) <= width:
            lines[-1].append("   ").append_text(fact)
        else:
            lines.append(fact)
    return list(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
