"""Check everything that is specific to a GPU, each step building on the previous ones; stop at the first failure.

    python tools/gpu_check                       # one GPU, within ten minutes
    python tools/gpu_check --device cpu          # the same steps on a CPU, small
    torchrun --nproc-per-node 2 tools/gpu_check --tensor-parallel 2

Prints a table of measured and allowed values, and exits with code 1 at the first value that is not allowed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]

from steps import STEPS, Check  # noqa: E402


def main() -> int:
    """Run the steps and return the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="gpu_check")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    p.add_argument("--tensor-parallel", type=int, default=1, help="tensor-parallel size of the policy and of vLLM")
    arguments = p.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0").items():
        os.environ.setdefault(name, value)
    first, began = os.environ["RANK"] == "0", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        check = Check(arguments, Path(folder))
        if first:
            print(f"{'step':<10} {'what':<58} {'measured':>14} {'allowed':>12}", flush=True)
        for step in STEPS:
            start = time.monotonic()
            try:
                rows = step(check)
            except BaseException:
                traceback.print_exc()
                return _failed(step.__name__, first)
            for row in rows:
                if first:
                    print(f"{step.__name__:<10} {row.what:<58} {row.measured:>14} {row.allowed:>12}", flush=True)
                if not row.good:
                    return _failed(step.__name__, first)
            if first:
                print(f"{step.__name__:<10} {'seconds':<58} {time.monotonic() - start:>14.1f}", flush=True)
        check.close()
    if first:
        print(f"all steps passed in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _failed(step: str, first: bool) -> int:
    if first:
        print(f"FAILED: {step}. The steps after it were not run; docs/dev/gpu.md describes what to check.", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
