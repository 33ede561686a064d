"""Times the score head with Φ, without Φ, and with Φ made token by token, side by side in one run.

    python tools/bench/bench_head.py                       # Qwen3-0.6B's head: V=151,936, H=1,024
    python tools/bench/bench_head.py --tokens 4096 --device cuda --dtype bfloat16

The three ways take turns, so that a noisy machine is noisy for all of them; the table gives medians and their ratios to
the head without Φ. Peak memory is what each way allocates beyond its inputs (the process's high-water mark on a CPU,
measured in a process of its own).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_g2rl.policy.head import score_tokens

WAYS = ("without", "phi", "per_token")
NAMES = dict(without="without Φ", phi="with Φ (ours)", per_token="Φ token by token")


def inputs(a: argparse.Namespace) -> tuple:
    g = torch.Generator().manual_seed(0)
    dtype, device = getattr(torch, a.dtype), a.device
    hidden = torch.randn(a.tokens, a.hidden, generator=g).to(device, dtype)
    weight = (torch.randn(a.vocabulary, a.hidden, generator=g) * 0.02).to(device, dtype)
    targets = torch.randint(0, a.vocabulary, (a.tokens,), generator=g).to(device)
    response = (torch.arange(a.tokens) * a.responses // a.tokens).to(device)
    return hidden, weight, targets, response


@torch.no_grad()
def per_token(hidden, weight, targets, response, responses, chunk):
    """The definition: phi_t = W^T (e(y_t) - p_t) for each token, a second vocabulary product; then the mean."""
    total = torch.zeros(responses, hidden.shape[1], device=hidden.device)
    logprobs, entropy = torch.empty(2, len(targets), device=hidden.device)
    for at in torch.arange(len(targets), device=hidden.device).split(chunk):
        table = torch.log_softmax((hidden[at] @ weight.t()).float(), -1)
        p = table.exp()
        logprobs[at] = table.gather(1, targets[at, None]).squeeze(1)
        entropy[at] = -(p * table).sum(1)
        phi = weight[targets[at]].float() - (p.to(weight.dtype) @ weight).float()
        total.index_add_(0, response[at], phi)
    return logprobs, entropy, total / torch.bincount(response, minlength=responses)[:, None]


def call(way: str, data: tuple, a: argparse.Namespace):
    if way == "per_token":
        return per_token(*data, a.responses, a.chunk)
    return score_tokens(*data, a.responses, features=way == "phi", chunk_tokens=a.chunk)


def seconds(way: str, data: tuple, a: argparse.Namespace) -> float:
    start = time.perf_counter()
    call(way, data, a)
    if a.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident_kb(field: str) -> int:
    """Resident memory now (VmRSS) or its high-water mark (VmHWM), Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def peak_mb(way: str, a: argparse.Namespace) -> float:
    """MiB beyond the inputs."""
    if a.device == "cuda":
        data = inputs(a)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(way, data, a)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--vocabulary", type=int, default=151_936)
    p.add_argument("--hidden", type=int, default=1_024)
    p.add_argument("--tokens", type=int, default=1_024)
    p.add_argument("--responses", type=int, default=8)
    p.add_argument("--chunk", type=int, default=256)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    a = p.parse_args()
    data = inputs(a)
    if a.peak_of:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident_kb("VmRSS")
        call(a.peak_of, data, a)
        sys.stdout.write(f"{(resident_kb('VmHWM') - before) / 1024:.0f}\n")
        return
    times = {way: [] for way in WAYS}
    for way in WAYS:
        seconds(way, data, a)  # warm-up
    for _ in range(a.repeats):
        for way in WAYS:
            times[way].append(seconds(way, data, a))
    expected, found = call("per_token", data, a)[2], call("phi", data, a).features
    table = Table(title=f"V={a.vocabulary:,} H={a.hidden:,} T={a.tokens:,} R={a.responses} {a.dtype} on {a.device}")
    for column in ("way", "median s", "ratio", "range of ratios", "peak MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in WAYS:
        ratios = [x / y for x, y in zip(times[way], times["without"], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        medians = (f"{statistics.median(times[way]):.3f}", f"{statistics.median(ratios):.3f}")
        table.add_row(NAMES[way], *medians, spread, f"{peak_mb(way, a):.0f}")
    console = Console()
    console.print(table)
    console.print(f"Φ, largest difference between ours and token by token: {(found - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
