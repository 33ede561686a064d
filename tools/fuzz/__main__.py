"""Fuzz the commands with thousands of hostile inputs; none may cause a traceback, hang, signal or memory exhaustion.

    python -m tools.fuzz --cases 3000 --seed 1                     # all targets
    python -m tools.fuzz --cases 300 --targets models,datasets     # of the same cases, those of two targets
    python -m tools.fuzz --seed 1 --case 271                       # one case again, with its output

A case is a folder of valid files with one to three changes, and a command that reads them. The command runs in a fork
of a process that has imported everything. Seed and case number determine a case completely. A failure is an uncaught
exception, a signal, more than 60 s, more than 4 GiB, a leftover process, or an exit code without a message. The files
of failures are kept in a folder that is printed at the end. Exit code 1 if there are failures.
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
# Set before torch is imported. One thread, because only the forking thread survives in a fork.
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
    """Run the cases and return the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="fuzz")
    p.add_argument("--cases", type=int, default=300, help="run the cases 0 to N-1 (default: 300)")
    p.add_argument("--first", type=int, default=0, help="number of the first case instead of 0")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--processes", type=int, default=1, help="number of cases that run in parallel")
    p.add_argument("--minutes", type=float, default=None, help="start no new case after this time")
    p.add_argument("--targets", default=",".join(TARGETS), help="run only the cases of these targets (default: all)")
    p.add_argument("--case", type=int, default=None, help="run only this case and show its output")
    p.add_argument("--folder", type=Path, default=None, help="folder for failures (default: a temporary one)")
    arguments = p.parse_args()
    if unknown := {*arguments.targets.split(",")} - {*TARGETS}:
        p.error(f"unknown targets {', '.join(sorted(unknown))}; choose from {', '.join(TARGETS)}")
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
