"""Runs many cases: distributes them over processes, keeps the files of failures, and prints the final tables."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from megatron_g2rl.config.terminal import table_console
from megatron_g2rl.distributed.orphans import adopt_orphans
from tools.fuzz.seeds import Seeds
from tools.fuzz.targets import TARGETS, target_of
from tools.fuzz.verdicts import Verdict, run_case

KEPT_TEXT = 4000
"""Characters of output kept in a verdict."""


def run(arguments: argparse.Namespace, seeds: Seeds, folder: Path, scratch: Path) -> list[Verdict]:
    """Run the cases given on the command line in forked processes; the verdicts in the order of their numbers."""
    chosen = {*arguments.targets.split(",")}
    numbers = range(arguments.first, arguments.first + arguments.cases)
    numbers = [number for number in numbers if target_of(arguments.seed, number) in chosen]
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    context = multiprocessing.get_context("fork")
    queue, workers = context.Queue(), []
    for worker in range(arguments.processes):
        task = (seeds, arguments.seed, numbers[worker :: arguments.processes], folder, scratch / f"{worker}")
        workers.append(context.Process(target=_work, args=(queue, deadline, *task)))
        workers[-1].start()
    verdicts: list[Verdict] = []
    running = len(workers)
    while running:
        verdict = queue.get()
        if isinstance(verdict, str):
            running -= 1
            if verdict:
                raise RuntimeError(f"a worker of the fuzzer failed:\n{verdict}")
            continue
        verdicts.append(verdict)
        _show_progress(len(verdicts), len(numbers), verdict, arguments.seed)
    for process in workers:
        process.join()
    return sorted(verdicts, key=lambda verdict: verdict.number)


def _work(queue, deadline: float, seeds: Seeds, seed: int, numbers: list[int], folder: Path, scratch: Path) -> None:
    error = ""
    try:
        adopt_orphans()
        seen: Counter[str] = Counter()
        for number in numbers:
            if time.monotonic() > deadline:
                break
            verdict = run_case(seeds, seed, number, scratch)
            if verdict.failure:
                seen[verdict.failure] += 1
                if seen[verdict.failure] <= 2:
                    verdict = _kept(seeds, seed, verdict, folder, scratch)
            outcome = replace(verdict.outcome, text=verdict.outcome.text[-KEPT_TEXT:])
            queue.put(replace(verdict, outcome=outcome))
    except BaseException:
        import traceback

        error = traceback.format_exc()
    queue.put(error)


def _kept(seeds: Seeds, seed: int, verdict: Verdict, folder: Path, scratch: Path) -> Verdict:
    """Reduce a failing case to the single change that makes it fail, if there is one, and keep its folder."""
    for number in range(verdict.changes) if 1 < verdict.changes and verdict.outcome.seconds < 10 else ():
        smaller = run_case(seeds, seed, verdict.number, scratch, frozenset({number}))
        if smaller.failure == verdict.failure:
            break
    else:
        if verdict.changes > 1:
            run_case(seeds, seed, verdict.number, scratch)  # restores its folder
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{seed}-{verdict.number}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(scratch, target, symlinks=True, ignore=_no_pipes)
    return verdict


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_fifo()]


def show_case(seeds: Seeds, seed: int, number: int, folder: Path) -> int:
    """Run one case, print its output and where its files are, and return the exit code."""
    adopt_orphans()
    verdict = run_case(seeds, seed, number, folder / f"{seed}-{number}")
    print((folder / f"{seed}-{number}" / "command.txt").read_text())
    print(verdict.outcome.text)
    print(f"{verdict.target}: {verdict.failure or 'no failure'}; its files are in {folder}/{seed}-{number}/work")
    return 1 if verdict.failure else 0


def _show_progress(done: int, cases: int, verdict: Verdict, seed: int) -> None:
    if verdict.failure:
        print(f"--seed {seed} --case {verdict.number} ({verdict.target}): {verdict.failure}", flush=True)
    elif done % 100 == 0 or sys.stderr.isatty() and done % 10 == 0:
        print(f"{done} of {cases} cases", file=sys.stderr, flush=True)


def report(verdicts: list[Verdict], seed: int, folder: Path, seconds: float) -> int:
    """Print the results per target, and each kind of failure once; return the number of failures."""
    console = table_console(160)
    table = Table("target")
    for name in ("cases", "exit 0", "exit 1", "exit 2", "failures", "seconds per case", "slowest, s", "memory, MiB"):
        table.add_column(name, justify="right")
    for target in (*TARGETS, "all"):
        cases = [verdict for verdict in verdicts if target in (verdict.target, "all")]
        if not cases:
            continue
        times, codes = [verdict.outcome.seconds for verdict in cases], Counter(v.outcome.code for v in cases)
        failed = sum(bool(verdict.failure) for verdict in cases)
        mean = sum(times) / len(cases)
        cells = [len(cases), codes[0], codes[1], codes[2], failed, f"{mean:.2f}", f"{max(times):.1f}"]
        table.add_row(target, *map(str, cells), f"{max(verdict.memory for verdict in cases) / 2**20:.0f}")
    console.print(table)
    kinds: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.failure:
            kinds.setdefault(verdict.failure, []).append(verdict)
    for failure, cases in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        numbers = ", ".join(str(verdict.number) for verdict in cases[:6])
        console.print(f"{len(cases)} x {failure} (--seed {seed} --case {numbers})", markup=False, highlight=False)
    failed = sum(map(len, kinds.values()))
    ending = f"; files and output are in {folder}" if failed else ""
    counts = f"{len(verdicts)} cases of seed {seed}, {failed} failures, {seconds:.0f} s"
    console.print(f"{counts}{ending}", highlight=False, soft_wrap=True)
    return failed
