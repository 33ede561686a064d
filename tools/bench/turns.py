"""Side-by-side measurements: variants alternate, ratios are computed per round, memory is the high-water mark.

Imported by the benchmarks in this folder; needs only torch.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Ways = Mapping[str, Callable[[], object]]


def synchronize(device: str) -> None:
    """Wait for the device's work."""
    if device != "cpu":
        torch.cuda.synchronize()


def take_turns(
    ways: Ways, repeats: int, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one warm-up round.

    With `time.process_time` as the clock, these are CPU seconds, which vary less for one thread on a busy CPU.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            synchronize(device)
            start = clock()
            way()
            synchronize(device)
            if turn:
                times[name].append(clock() - start)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> tuple[str, str]:
    """(median of `name`, median and range of its ratios to `base` in the same round), as text."""
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return f"{statistics.median(times[name]):.4g}", "1" if name == base else spread


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def peak_mb(way: Callable[[], object], device: str = "cpu") -> float:
    """MiB that a call needs beyond the memory in use before it (on a CPU: resident memory of this process, Linux)."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier calls would hide this call's
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_kb("VmRSS")
    way()
    return (_status_kb("VmHWM") - before) / 1024


def peak_in_own_process(name: str) -> float:
    """`peak_mb` of one variant, measured in a new process (this script with --peak-of), whose allocator is cold."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--peak-of", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def processor(device: str) -> str:
    """Name of the device or CPU, with cores and threads."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def show(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], device: str = "cpu", notes: str = ""
) -> None:
    """Write a Markdown table with machine, date and command, in the form of docs/dev/performance.md."""
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    lines = [
        f"`{command}` ({title}; {processor(device)}, torch {torch.__version__}, {datetime.date.today():%d %B %Y}):",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    sys.stdout.write("\n".join([*lines, *(["", notes] if notes else []), ""]) + "\n")
    sys.stdout.flush()
