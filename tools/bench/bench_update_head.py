"""Time forward and backward of the update head against plain logits and the strongest available alternatives.

    python tools/bench/bench_update_head.py
    python tools/bench/bench_update_head.py --vocabulary 151936 --tokens 128 --only plain logits
    python tools/bench/bench_update_head.py --dtype bfloat16 --device cuda --tokens 8192 --vocabulary 151936

Alternatives that are not installed are skipped and listed. To use all of them without changing the environment:

    pip install --no-deps --target ALTERNATIVES liger-kernel cut-cross-entropy verl triton
    PYTHONPATH=ALTERNATIVES python tools/bench/bench_update_head.py

All compute the log-probs of the targets and gradients of hidden states and weight; ours and verl's also compute the
entropy, and the last two rows include it in the loss. Ours is measured twice: with the given memory, which at these
sizes keeps all logits for the backward pass, and with so little that the backward pass recomputes them. First, every
gradient is compared with float64 at a small size.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from turns import peak_mb, ratio, show, take_turns

from megatron_g2rl.config.ledger import head_chunk_tokens
from megatron_g2rl.policy.head import token_logprobs
from megatron_g2rl.policy.head.tiles import CPU_TILE, update_tiles

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""(hidden, weight, targets) -> (log-probs, entropy or None)."""


def load(name: str, *path: str):
    """Import a module from its file, because its package needs more than is installed; None if it does not exist."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    file = Path(spec.submodule_search_locations[0], *path)
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location("_".join((name, *path)).removesuffix(".py"), file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(chunk: int, h, w, y):
    return token_logprobs(h, w, y, chunk_tokens=chunk, with_entropy=True)


def plain_torch(h, w, y):
    return -F.cross_entropy((h @ w.t()).float(), y, reduction="none"), None


def plain_entropy(h, w, y):
    table = torch.log_softmax((h @ w.t()).float(), -1)
    return table.gather(1, y[:, None]).squeeze(1), -(table.exp() * table).sum(1)


def torch_linear(options, h, w, y):
    # The chunked path has no reduction="none"; sum is what the benchmark differentiates.
    return -F.linear_cross_entropy(h, w, y, reduction="sum", options=options)[None], None


def megatron_head() -> Head | None:
    """megatron's vocab_parallel_cross_entropy in a group of one rank."""
    if importlib.util.find_spec("megatron") is None:
        return None
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    return lambda h, w, y: (-vocab_parallel_cross_entropy((h @ w.t()).float()[:, None], y[:, None]).squeeze(1), None)


def heads(a: argparse.Namespace, chunk: int) -> tuple[dict[str, Head], list[str]]:
    """(name -> head, names of those that are not installed)."""
    candidates: dict[str, Head | None] = {"token_logprobs (ours)": functools.partial(ours, chunk)}
    # Memory for little more than the current tiles.
    candidates["token_logprobs (ours), logits recomputed"] = functools.partial(ours, -(-CPU_TILE // a.vocabulary))
    candidates["logits, torch cross_entropy"] = plain_torch
    candidates["logits, megatron vocab_parallel_cross_entropy"] = megatron_head()
    chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    candidates["torch linear_cross_entropy, chunked"] = chunked and functools.partial(torch_linear, chunked())
    liger = load("liger_kernel", "chunked_loss", "fused_linear_ppo.py")
    candidates["Liger chunked log-prob (torch)"] = liger and (
        lambda h, w, y: (liger._ChunkedSelectiveLogProbFunction.apply(h, w, y, None, 1.0, 4096), None)
    )
    verl = load("verl", "utils", "experimental", "torch_functional.py")
    candidates["verl FusedLinearForPPO (torch)"] = verl and (
        lambda h, w, y: verl.FusedLinearForPPOFunction.apply(h, w, y, 1.0, 512)
    )
    cce = compiled_cce() if a.compiled else None
    candidates["cut-cross-entropy, torch_compile"] = cce
    if a.device == "cuda" and importlib.util.find_spec("liger_kernel") and importlib.util.find_spec("triton"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        candidates["Liger fused linear cross entropy (Triton)"] = lambda h, w, y: (-fused(w, h, y)[None], None)
    if a.device == "cuda" and importlib.util.find_spec("cut_cross_entropy") and importlib.util.find_spec("triton"):
        from cut_cross_entropy import linear_cross_entropy

        candidates["cut-cross-entropy (Triton)"] = lambda h, w, y: (
            -linear_cross_entropy(h, w, y, reduction="none"),
            None,
        )
    with_entropy = {
        "token_logprobs (ours), entropy in the loss": candidates["token_logprobs (ours)"],
        "logits, log_softmax, entropy in the loss": plain_entropy,
    }
    missing = [name for name, head in candidates.items() if head is None]
    return {name: head for name, head in (candidates | with_entropy).items() if head is not None}, missing


def compiled_cce() -> Head | None:
    """cut-cross-entropy's pure torch implementation, which its package imports only together with triton."""
    if importlib.util.find_spec("cut_cross_entropy") is None or importlib.util.find_spec("triton") is None:
        return None
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, y: (-linear_cross_entropy(h, w, y, reduction="none", impl="torch_compile"), None)


def inputs(a: argparse.Namespace, tokens: int, vocabulary: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, a.hidden, generator=g), torch.randn(vocabulary, a.hidden, generator=g) * 0.02
    targets = torch.randint(0, vocabulary, (tokens,), generator=g).to(a.device)
    return [x.to(a.device, dtype).requires_grad_() for x in (hidden, weight)] + [targets]


def gradients(name: str, head: Head, data: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    logprobs, entropy = head(*data)
    loss = -logprobs.sum()
    if name.endswith("entropy in the loss"):
        loss = loss - 0.01 * entropy.sum()
    return torch.autograd.grad(loss, data[:2])


def errors(a: argparse.Namespace, candidates: dict[str, Head]) -> dict[str, float]:
    """Relative error of the weight gradient against plain float64, at 64 tokens and 1,000 vocabulary rows."""
    small = inputs(a, 64, 1000, getattr(torch, a.dtype))
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in small]
    result = {}
    for name, head in candidates.items():
        kind = name if name.endswith("entropy in the loss") else "log-probs"
        expected = gradients(kind, plain_double, exact)[1]
        result[name] = float((gradients(name, head, small)[1].double() - expected).norm() / expected.norm())
    return result


def plain_double(h, w, y):
    table = torch.log_softmax(h @ w.t(), -1)
    return table.gather(1, y[:, None]).squeeze(1), -(table.exp() * table).sum(1)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--vocabulary", type=int, default=50_000)
    p.add_argument("--hidden", type=int, default=1_024)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--memory-mb", type=int, default=256, help="policy.head_memory_mb")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--processor-seconds", action="store_true", help="measure CPU time instead of wall time (one thread, busy CPU)"
    )
    p.add_argument(
        "--compiled", action="store_true", help="also measure cut-cross-entropy's torch_compile (compiles first)"
    )
    p.add_argument(
        "--only", nargs="*", help="names, or parts of names, of the rows to measure; ours are always measured"
    )
    a = p.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # some imports print
        candidates, missing = heads(a, head_chunk_tokens(a.memory_mb, a.vocabulary))
    if a.only:
        candidates = {
            name: head for name, head in candidates.items() if any(part in name for part in ["ours", *a.only])
        }
    data = inputs(a, a.tokens, a.vocabulary, getattr(torch, a.dtype))
    ways = {name: functools.partial(gradients, name, head, data) for name, head in candidates.items()}
    error = errors(a, candidates)
    times = take_turns(ways, a.repeats, a.device, time.process_time if a.processor_seconds else time.perf_counter)
    base = next(iter(candidates))
    tiles = update_tiles(a.tokens, a.vocabulary, head_chunk_tokens(a.memory_mb, a.vocabulary), torch.device(a.device))
    kept = min(1, tiles.kept / (a.tokens * a.vocabulary))
    rows = [(n, *ratio(times, n, base), f"{peak_mb(ways[n], a.device):.0f}", f"{error[n]:.0e}") for n in candidates]
    seconds = "median CPU s" if a.processor_seconds else "median s"
    show(
        f"V={a.vocabulary:,} H={a.hidden:,} T={a.tokens:,} {a.dtype}; ours with {a.memory_mb} MiB: {kept:.0%} kept",
        ("forward and backward", seconds, "ratio to ours", "peak MiB beyond inputs", "error of the weight gradient"),
        rows,
        a.device,
        f"Not measured here: {', '.join(missing)}." if missing else "",
    )


if __name__ == "__main__":
    main()
