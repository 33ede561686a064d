"""Time the score head with Φ, without Φ, from a prior, and with Φ token by token, side by side in one run.

    python tools/bench/bench_head.py                       # Qwen3-0.6B's head: V=151,936, H=1,024
    python tools/bench/bench_head.py --tokens 4096 --device cuda --dtype bfloat16

The prior is the exact log-prob with noise of `--mismatch` nats, as a rollout engine would report it. The variants
alternate, so that noise of the machine affects all of them equally; the table shows medians and their ratios to the
head without Φ. Peak memory is what each variant allocates beyond its inputs (on a CPU the process's high-water mark,
measured in a separate process).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time

import torch
from turns import peak_in_own_process, peak_mb, ratio, show, take_turns

from megatron_g2rl.config.ledger import head_chunk_tokens
from megatron_g2rl.policy.head import score_tokens

NAMES = dict(
    without="head: log-probs and entropy",
    phi="with Φ, exact sweep",
    prior_without="from a prior: log-probs and entropy",
    prior="from a prior, with Φ",
    per_token="Φ token by token: a second product with the vocabulary",
)


def inputs(a: argparse.Namespace) -> tuple:
    g = torch.Generator().manual_seed(0)
    dtype, device = getattr(torch, a.dtype), a.device
    hidden = torch.randn(a.tokens, a.hidden, generator=g).to(device, dtype)
    weight = (torch.randn(a.vocabulary, a.hidden, generator=g) * 0.02).to(device, dtype)
    targets = torch.randint(0, a.vocabulary, (a.tokens,), generator=g).to(device)
    response = (torch.arange(a.tokens) * a.responses // a.tokens).to(device)
    return hidden, weight, targets, response


@torch.no_grad()
def per_token(hidden, weight, targets, response, responses, chunk):
    """By definition: phi_t = W^T (e(y_t) - p_t) for each token, a second product with the vocabulary; then the mean."""
    total = torch.zeros(responses, hidden.shape[1], device=hidden.device)
    logprobs, entropy = torch.empty(2, len(targets), device=hidden.device)
    for at in torch.arange(len(targets), device=hidden.device).split(chunk):
        table = torch.log_softmax((hidden[at] @ weight.t()).float(), -1)
        p = table.exp()
        logprobs[at] = table.gather(1, targets[at, None]).squeeze(1)
        entropy[at] = -(p * table).sum(1)
        phi = weight[targets[at]].float() - (p.to(weight.dtype) @ weight).float()
        total.index_add_(0, response[at], phi)
    return logprobs, entropy, total / torch.bincount(response, minlength=responses)[:, None]


def call(way: str, data: tuple, a: argparse.Namespace):
    chunk = head_chunk_tokens(a.memory_mb, a.vocabulary)
    if way == "per_token":
        return per_token(*data, a.responses, chunk)
    options = dict(prior_logprobs=a.prior, prior_tolerance=a.tolerance) if way.startswith("prior") else {}
    return score_tokens(*data, a.responses, features=way in ("phi", "prior"), chunk_tokens=chunk, **options)


def reported_logprobs(data: tuple, a: argparse.Namespace) -> torch.Tensor:
    """Log-probs of the targets with the noise of another implementation."""
    options = dict(features=False, chunk_tokens=head_chunk_tokens(a.memory_mb, a.vocabulary))
    exact = score_tokens(*data, a.responses, **options).logprobs
    return exact + a.mismatch * torch.randn(len(exact), generator=torch.Generator().manual_seed(1)).to(exact)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--vocabulary", type=int, default=151_936)
    p.add_argument("--hidden", type=int, default=1_024)
    p.add_argument("--tokens", type=int, default=1_024)
    p.add_argument("--responses", type=int, default=8)
    p.add_argument("--memory-mb", type=int, default=256, help="policy.head_memory_mb")
    p.add_argument("--mismatch", type=float, default=1e-4, help="standard deviation of the prior's error, nats")
    p.add_argument("--tolerance", type=float, default=1e-3, help="exploration.prior_tolerance")
    p.add_argument("--repeats", type=int, default=4)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--processor-seconds", action="store_true", help="measure CPU time instead of wall time (one thread, busy CPU)"
    )
    p.add_argument(
        "--ways", nargs="*", choices=NAMES, default=list(NAMES), help="variants to measure, including `without`"
    )
    p.add_argument("--peak-of", choices=NAMES, help=argparse.SUPPRESS)
    a = p.parse_args()
    data = inputs(a)
    a.prior = reported_logprobs(data, a)
    ways = {name: functools.partial(call, name, data, a) for name in NAMES}
    if a.peak_of:
        sys.stdout.write(f"{peak_mb(ways[a.peak_of], a.device):.0f}\n")
        return
    ways = {name: ways[name] for name in a.ways}
    times = take_turns(ways, a.repeats, a.device, time.process_time if a.processor_seconds else time.perf_counter)
    peak = peak_in_own_process if a.device == "cpu" else lambda name: peak_mb(ways[name], a.device)
    rows = [(NAMES[name], *ratio(times, name, "without"), f"{peak(name):.0f}") for name in ways]
    notes = ""
    if {"phi", "per_token"} <= ways.keys():
        difference = (ways["per_token"]()[2] - ways["phi"]().features).abs().max()
        notes = f"Φ, largest difference between ours and token by token: {difference:.1e}."
    if {"phi", "prior"} <= ways.keys():
        exact, prior = ways["phi"](), ways["prior"]()
        error = ((prior.features - exact.features).norm(dim=1) / exact.features.norm(dim=1)).max()
        notes += f"{' ' if notes else ''}Φ from a prior that errs by {a.mismatch:g} nats: relative error {error:.1e}, "
        notes += f"{prior.swept_again} of {a.tokens} tokens swept again."
    seconds = "median CPU s" if a.processor_seconds else "median s"
    show(
        f"V={a.vocabulary:,} H={a.hidden:,} T={a.tokens:,} R={a.responses} {a.dtype}, {a.memory_mb} MiB",
        ("variant", seconds, "ratio to the head without Φ", "peak MiB beyond inputs"),
        rows,
        a.device,
        notes,
    )


if __name__ == "__main__":
    main()
