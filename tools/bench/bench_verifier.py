"""Verifications per second of the reward pool on real reference answers in realistic responses.

    python tools/bench/bench_verifier.py math500.jsonl gsm8k_test.jsonl

Each row of a file gives one response: half of them are correct but spelled differently from the reference, half contain
the answer of another row. So nearly every answer needs math-verify, and each problem occurs once: a training step, with
a group of responses per prompt, is faster because of the cache. CPU seconds include the start of the workers; on a busy
machine they show what an idle one would achieve.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_g2rl.rewards import RewardPool

REASONING = "Let us write $x_{1}=\\frac{a}{b}$ and substitute it into the second equation, which gives $y = 2x + 3$. "


def responses(path: Path, reasoning_sentences: int) -> list[tuple[str, str]]:
    """(response text, reference answer) for each row of a JSONL file."""
    golds = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    items = []
    for row, gold in enumerate(golds):
        respelled = gold.replace("\\frac", "\\dfrac") if "\\frac" in gold else f"\\displaystyle {gold}"
        answer = golds[row - 1] if row % 2 else respelled
        items.append((REASONING * reasoning_sentences + f"Therefore the answer is $\\boxed{{{answer}}}$.", gold))
    return items


def children_cpu_seconds() -> float:
    """CPU seconds of all worker processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print a table with a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline-s", type=float, default=5.0)
    parser.add_argument(
        "--reasoning-sentences", type=int, default=60, help="sentences per response, of about 100 characters each"
    )
    options = parser.parse_args()
    table = Table(title=f"{options.workers} workers, {os.cpu_count()} cores")
    for column in ("file", "all", "correct", "timed out", "crashed", "CPU s", "per CPU s", "per s"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for path in options.files:
        items = responses(path, options.reasoning_sentences)
        before = children_cpu_seconds()
        with RewardPool("megatron_g2rl.rewards:math_reward", options.workers, options.deadline_s) as pool:
            result = pool.score(items)
        cpu = children_cpu_seconds() - before
        correct, timeouts = sum(reward > 0 for reward in result.rewards), sum(result.timed_out)
        counts = (len(items), correct, timeouts, sum(result.died))
        rates = (f"{cpu:.1f}", f"{len(items) / cpu:.0f}", f"{len(items) / result.seconds:.0f}")
        table.add_row(path.name, *map(str, counts), *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
