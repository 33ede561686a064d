"""Measure memory and time that a large data source costs one rank, up to the first prompts.

OMP_NUM_THREADS=1 python tools/bench/data_memory.py --rows 1000000 --characters 200 [--tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from pathlib import Path

import psutil

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.data.prompts import PromptStream, load_prompts
from megatron_g2rl.data.tiny_model import make_tokenizer
from megatron_g2rl.rollout.tokenizer import load_tokenizer
from megatron_g2rl.training.contents import rows_digest

WORDS = "a train leaves the station with some apples and costs how many more than before if each of them is".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--characters", type=int, default=200)
    parser.add_argument("--tokenizer", help="folder of a tokenizer with a chat template; default: the built-in one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write(file, arguments.rows, arguments.characters)
        before, start = memory(), time.perf_counter()
        prompts = load_prompts(DataConfig(source=str(file)), tokenizer)
        report("read", before, start)
        prompts.references(RewardConfig()).check(prompts.config)
        report("+ references", before, start)
        rows_digest(prompts)
        report("+ digest", before, start)
        stream = PromptStream(prompts, 0)
        for _ in range(100):
            stream.next(64)
        report("+ 100 draws of 64", before, start)


def write(file: Path, rows: int, characters: int) -> None:
    draw = random.Random(0)
    with file.open("w") as lines:
        for number in range(rows):
            text = f"{number}: " + " ".join(draw.choices(WORDS, k=characters // 4))
            lines.write(json.dumps({"problem": text[:characters], "answer": str(number)}) + "\n")


def memory() -> tuple[int, int]:
    """Memory of this process in bytes: unique (USS), and resident including pages mapped from files (RSS)."""
    info = psutil.Process().memory_full_info()
    return info.uss, info.rss


def report(what: str, before: tuple[int, int], start: float) -> None:
    unique, resident = (after - initial for after, initial in zip(memory(), before, strict=True))
    seconds = time.perf_counter() - start
    logging.info("%-20s %6.1f s, unique %+5.0f MB, resident %+5.0f MB", what, seconds, unique / 1e6, resident / 1e6)


if __name__ == "__main__":
    main()
