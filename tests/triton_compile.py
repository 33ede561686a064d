"""Compiles the head's Triton kernel for three generations of GPUs, without one, and prints the resources as JSON.

`python tests/triton_compile.py table` prints the table of docs/internals/head.md instead. A process of its own: another
test may have imported triton for its interpreter.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_g2rl.policy.head.triton_kernel import sweep_tiles
from megatron_g2rl.policy.head.triton_score import kernel_tiles

HIDDEN = 2560
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VARIANTS = {
    "sums and counts": dict(SUMS=1, COUNTS=True, ORDERED=False),
    "counts of some": dict(SUMS=0, COUNTS=True, ORDERED=True),
}
"""The sweep over all tokens, and the one over those with a wrong prior; the others compute a part of these."""
CASES = (
    ("bf16", False, "sums and counts"),
    ("bf16", False, "counts of some"),
    ("bf16", True, "sums and counts"),
    ("fp32", False, "sums and counts"),
)
ARGUMENTS = dict(
    hidden="*{}", weight="*{}", prior="*fp32", token_weights="*fp32", run="*i32", run_row="*i32", order="*i32",
    count="*i32", first_sum="*fp32", second_sum="*fp32", counts="*fp32", tokens="i32", rows="i32",
    counts_stride="i32", scale="fp32",
)  # fmt: skip
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "atom.global", "red.global")


def compile_kernel(capability: int, dtype: str, deterministic: bool, variant: str) -> dict:
    """Resources and instructions of one specialization."""
    tiles = kernel_tiles(
        DTYPES[dtype], divmod(capability, 10), deterministic=deterministic, ordered=VARIANTS[variant]["ORDERED"]
    )
    constants = dict(SIZE=HIDDEN, BLOCK_T=tiles.tokens, BLOCK_V=tiles.columns, BLOCK_H=tiles.depth)
    constants |= dict(DETERMINISTIC=deterministic, PRECISION="ieee", WIDEN=False, **VARIANTS[variant])
    signature = {name: kind.format(dtype) for name, kind in ARGUMENTS.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    signature |= dict.fromkeys(constants, "constexpr")
    options = dict(num_warps=tiles.warps, num_stages=tiles.stages)
    source = ASTSource(sweep_tiles, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = resource_usage(kernel.asm["cubin"])
    found = {name: len(re.findall(rf"\b{re.escape(name)}", kernel.asm["ptx"])) for name in INSTRUCTIONS}
    mode = "deterministic" if deterministic else "atomic"
    return dict(
        name=f"sm_{capability} {dtype} {mode} {variant}",
        tile=f"{tiles.tokens} x {tiles.columns} x {tiles.depth}",
        threads=32 * tiles.warps,
        shared=kernel.metadata.shared,
        instructions=found,
        **usage,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and local memory, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return dict(registers=registers, stack=stack, local=local)


def main() -> None:
    cases = [(capability, *case) for capability, case in itertools.product((80, 90, 100), CASES)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: compile_kernel(*case), cases))
    if sys.argv[1:] != ["table"]:
        json.dump(results, sys.stdout)
        return
    for r in results:
        if r["name"].endswith("sums and counts"):
            used = ", ".join(name for name in INSTRUCTIONS[:3] if r["instructions"][name]) or "fma"
            kilobytes = f"{r['shared'] / 1024:.0f} KiB"
            cells = (r["name"].removesuffix(" sums and counts"), r["tile"], r["threads"], r["registers"], kilobytes)
            sys.stdout.write("| " + " | ".join(map(str, (*cells, r["stack"], used))) + " |\n")


if __name__ == "__main__":
    main()
