"""Measure how time and memory of the head's passes grow with tokens, vocabulary, hidden size, responses and TP ranks.

    python tools/bench/head_growth.py
    python tools/bench/head_growth.py --goal        # only peak memory at T=16,384 and V=151,936

Each table row changes one size of the base; all settings alternate in one run, and ratios are relative to the base.
Memory is each pass's high-water mark in a separate process, beyond its inputs. The tensor-parallel rows split the same
vocabulary over processes with one thread each.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import sys
import time

import torch
import torch.distributed as dist
from turns import peak_in_own_process, peak_mb, ratio, show, take_turns

from megatron_g2rl.config.ledger import head_chunk_tokens
from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.policy.head import score_tokens, token_logprobs

BASE = dict(T=512, V=32_768, H=256, R=8)
GOAL = dict(T=16_384, V=151_936, H=128, R=8)
"""The largest logits for which the 1.5 GB memory goal is defined; H is small to be fast."""
CHANGES = [{}, dict(T=1024), dict(T=2048), dict(V=65_536), dict(V=131_072), dict(H=512), dict(R=32), dict(R=128)]


def inputs(size: dict[str, int], ranks: int = 1, rank: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(size["T"], size["H"], generator=g), torch.randn(size["V"], size["H"], generator=g)
    rows = size["V"] // ranks
    weight = (weight[rank * rows : (rank + 1) * rows] * 0.02).clone()
    targets = torch.randint(0, size["V"], (size["T"],), generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def run(kind: str, data, size: dict[str, int], memory_mb: int, group=None, start: int = 0) -> None:
    options = dict(tp_group=group, vocab_start=start, chunk_tokens=head_chunk_tokens(memory_mb, len(data[1])))
    if kind == "score":
        score_tokens(*data, torch.arange(size["T"]) * size["R"] // size["T"], size["R"], **options)
    else:
        logprobs, entropy = token_logprobs(*data, with_entropy=True, **options)
        torch.autograd.grad(logprobs.sum() + entropy.sum(), data[:2])


def name_of(change: dict[str, int]) -> str:
    return ", ".join(f"{k}={v:,}" for k, v in change.items()) or "base"


def tensor_rank(rank: int, ranks: int, port: int, a: argparse.Namespace, results) -> None:
    """Time both passes with the vocabulary split over `ranks` processes; the first one reports the seconds."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    data, seconds = inputs(BASE, ranks, rank), {}
    for kind in ("score", "update"):
        times = []
        for turn in range(a.repeats + 1):
            dist.barrier()
            start = time.perf_counter()
            run(kind, data, BASE, a.memory_mb, dist.group.WORLD, rank * len(data[1]))
            if turn:
                times.append(time.perf_counter() - start)
        seconds[kind] = statistics.median(times)
    if rank == 0:
        results.put((ranks, seconds))
    dist.barrier()
    dist.destroy_process_group()


def tensor_rows(a: argparse.Namespace) -> list[tuple[str, ...]]:
    context, seconds = multiprocessing.get_context("spawn"), {}
    for index, ranks in enumerate((1, 2, 4)):
        results = context.Queue()
        processes = [
            context.Process(target=tensor_rank, args=(rank, ranks, a.port + index, a, results)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        seconds.update([results.get(timeout=120)])
        for process in processes:
            process.join()
    relative = lambda ranks, kind: f"{seconds[ranks][kind] / seconds[1][kind]:.2f}"  # noqa: E731
    return [(f"{r}", *(x for k in seconds[r] for x in (f"{seconds[r][k]:.3f}", relative(r, k)))) for r in seconds]


def show_goal(memory_mb: int) -> None:
    """Show peak memory of both passes at `GOAL`, and how much of it is gradients, which any implementation needs."""
    gradients = (GOAL["T"] + GOAL["V"]) * GOAL["H"] * 4 / 2**20
    rows = []
    for kind, part in (("score", 0.0), ("update", gradients)):
        peak = peak_in_own_process(f"{kind} goal")
        rows.append((kind, f"{peak:.0f}", f"{part:.0f}", f"{peak - part:.0f}"))
    table = GOAL["T"] * GOAL["V"] * 4 / 2**20
    show(
        f"{name_of(GOAL)}, float32, {memory_mb} MiB",
        ("pass", "peak MiB beyond inputs", "gradients of hidden states and weight", "remainder"),
        rows,
        notes=f"One float32 table of all logits would take {table:,.0f} MiB.",
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--goal", action="store_true", help="measure only the memory at the size of the goal, with the default budget"
    )
    p.add_argument("--memory-mb", type=int, help="policy.head_memory_mb; default: 64, with --goal that of the config")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--port", type=int, default=29_617, help="first of three rendezvous ports")
    p.add_argument("--peak-of", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.memory_mb is None:
        a.memory_mb = PolicyConfig().head_memory_mb if a.goal else 64
    settings = {name_of(c): BASE | c for c in CHANGES} | {"goal": GOAL}
    if a.peak_of:
        kind, name = a.peak_of.split(" ", 1)
        way = functools.partial(run, kind, inputs(settings[name]), settings[name], a.memory_mb)
        sys.stdout.write(f"{peak_mb(way):.0f}\n")
        return
    if a.goal:
        show_goal(a.memory_mb)
        return
    del settings["goal"]
    data = {name: inputs(size) for name, size in settings.items()}
    times = {
        kind: take_turns(
            {n: functools.partial(run, kind, data[n], s, a.memory_mb) for n, s in settings.items()}, a.repeats
        )
        for kind in ("score", "update")
    }
    rows = []
    for name in settings:
        cells = [(*ratio(times[kind], name, "base"), f"{peak_in_own_process(f'{kind} {name}'):.0f}") for kind in times]
        rows.append((name, *cells[0], *cells[1]))
    columns = ("s", "ratio", "peak MiB")
    header = ("changed", *(f"{kind}: {column}" for kind in ("score with Φ", "update") for column in columns))
    show(f"base {name_of(BASE)}, float32, {a.memory_mb} MiB", header, rows)
    show(
        "base, the vocabulary split over processes with one thread each",
        ("TP ranks", "score with Φ: s", "ratio", "update: s", "ratio"),
        tensor_rows(a),
    )


if __name__ == "__main__":
    main()
