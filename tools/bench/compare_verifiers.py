"""Compare our verifier, math-verify alone and mathruler (the sympy grader of prm800k) on the same answers.

    pip install --no-deps --target FOLDER mathruler==0.1.0 pylatexenc==2.11
    PYTHONPATH=.:FOLDER python tools/bench/compare_verifiers.py verifier_more.jsonl \
        verifier_cases.jsonl --pairs 2000

Cases are JSONL rows with gold, output (or output_parts) and expected (true or false; null is skipped). The generated
pairs are those of tools/bench/verifier_pairs.py. All three get the content of the last box and run in the same
`RewardPool`, which kills a verifier that misses the deadline. mathruler rejects powers in braces to avoid hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from megatron_g2rl.rewards import RewardPool, verify_math
from megatron_g2rl.rewards.boxed import last_boxed

sys.path.insert(0, os.getcwd())


def reward_of_ours(response: str, answer: str) -> float:
    """Reward of this package's verifier."""
    return 1.0 if verify_math(response, answer) else -1.0


def reward_of_math_verify(response: str, answer: str) -> float:
    """Reward of math-verify, used as documented; its timeouts are disabled in favor of the pool's deadline."""
    from math_verify import parse, verify

    parsed = parse(f"\\boxed{{{last_boxed(response)}}}", parsing_timeout=None)
    return 1.0 if verify(parse(f"\\boxed{{{answer}}}", parsing_timeout=None), parsed, timeout_seconds=None) else -1.0


def reward_of_mathruler(response: str, answer: str) -> float:
    """Reward of mathruler; an exception counts as incorrect."""
    from mathruler.grader import grade_answer

    try:
        return 1.0 if grade_answer(last_boxed(response) or "", answer) else -1.0
    except Exception:
        return -1.0


VERIFIERS = {"ours": "reward_of_ours", "math-verify": "reward_of_math_verify", "mathruler": "reward_of_mathruler"}


def read_cases(path: Path) -> list[tuple[str, str, bool]]:
    """(response, reference, whether it is correct) of the labeled rows."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [row["output"] or "".join(text * count for text, count in row["output_parts"]) for row in rows]
    return [
        (text, row["gold"], row["expected"])
        for row, text in zip(rows, texts, strict=True)
        if row["expected"] is not None
    ]


def generate_pairs(count: int) -> list[tuple[str, str, bool]]:
    """Generated cases in the same form, from the property test's generator with a fixed seed."""
    from tools.bench.verifier_pairs import draw_pair

    random = Random(0)
    drawn = [draw_pair(random) for _ in range(count)]
    return [(f"\\boxed{{{pair.found}}}", pair.gold, pair.equal) for pair in drawn]


def main() -> None:
    """Print a table with a row for each set of cases and verifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--deadline-s", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    sets = {path.name: read_cases(path) for path in options.files} | {"generated": generate_pairs(options.pairs)}
    table = Table(title=f"{options.workers} workers, deadline {options.deadline_s:g} s")
    for column in (
        "cases",
        "verifier",
        "all",
        "false accepts",
        "false rejects",
        "timed out",
        "crashed",
        "per s",
    ):
        table.add_column(column, justify="left" if column in ("cases", "verifier") else "right")
    for name, cases in sets.items():
        for verifier, function in VERIFIERS.items():
            path = f"tools.bench.compare_verifiers:{function}"
            with RewardPool(path, options.workers, options.deadline_s) as pool:
                pool.score([("\\boxed{\\frac{1}{2}}", "0.5")] * options.workers)  # warm-up: imports
                result = pool.score([(text, gold) for text, gold, _ in cases])
            verdicts = [reward > 0 for reward in result.rewards]
            false_positives = sum(
                verdict and not correct for verdict, (_, _, correct) in zip(verdicts, cases, strict=True)
            )
            false_negatives = sum(
                correct and not verdict for verdict, (_, _, correct) in zip(verdicts, cases, strict=True)
            )
            timed_out, crashed = sum(result.timed_out), sum(result.died)
            rate = f"{len(cases) / result.seconds:.0f}"
            table.add_row(
                name, verifier, *map(str, (len(cases), false_positives, false_negatives, timed_out, crashed)), rate
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
