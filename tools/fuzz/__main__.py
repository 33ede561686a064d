"""Hostile inputs, thousands of them: no command may answer one with a traceback, a hang, a signal or a full memory.

    python -m tools.fuzz --cases 3000 --seed 1                     # all targets
    python -m tools.fuzz --cases 300 --targets models,datasets     # of the same cases, those of two targets
    python -m tools.fuzz --seed 1 --case 271                       # one case again, with what it printed

A case is a folder of valid files with one to three changes, and a command that reads it, run in a fork of a process
that has everything imported. Its number and the seed decide all of it. A failure is an exception that is not caught, a
signal, more than 60 s, more than 4 GiB, a process that is left over, or an exit code without a message. Failures are
kept in a folder that the table names. Exit code 1 where there are any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# Before torch is imported. One thread: a fork has no other one.
for _name, _value in dict(
    OMP_NUM_THREADS="1",
    TORCHDYNAMO_DISABLE="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
).items():
    os.environ.setdefault(_name, _value)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

from tools.fuzz import campaign  # noqa: E402
from tools.fuzz.forking import preload  # noqa: E402
from tools.fuzz.seeds import Seeds  # noqa: E402
from tools.fuzz.targets import TARGETS  # noqa: E402


def main() -> int:
    """Run the cases; the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="fuzz")
    p.add_argument("--cases", type=int, default=300, help="numbers 0 to N-1 (default: 300)")
    p.add_argument("--first", type=int, default=0, help="begin with this number instead of 0")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--processes", type=int, default=1, help="cases at once")
    p.add_argument("--minutes", type=float, default=None, help="begin no further case after this time")
    p.add_argument("--targets", default=",".join(TARGETS), help="leave out the cases of others (default: all)")
    p.add_argument("--case", type=int, default=None, help="run this case alone and show what it printed")
    p.add_argument("--folder", type=Path, default=None, help="keeps failures (default: a temporary one)")
    arguments = p.parse_args()
    if unknown := {*arguments.targets.split(",")} - {*TARGETS}:
        p.error(f"unknown targets {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="fuzz_"))).absolute()
    began = time.monotonic()
    preload()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz_seeds_"))
    try:
        seeds = Seeds(scratch / "seeds")
        if arguments.case is not None:
            return campaign.show_case(seeds, arguments.seed, arguments.case, folder)
        verdicts = campaign.run(arguments, seeds, folder, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    failed = campaign.report(verdicts, arguments.seed, folder, time.monotonic() - began)
    if not failed and arguments.folder is None:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
