"""Runs the head's Triton kernel in Triton's interpreter on random cases and prints the errors against float64 as JSON.

A process of its own: triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_g2rl.policy.head import score_tokens, triton_score  # noqa: E402
from megatron_g2rl.policy.head.prior import ExpectedCounts  # noqa: E402

TILES = triton_score.KernelTiles(tokens=16, columns=32, depth=16, warps=4, stages=1)


def runs_of(tokens: int, responses: int, kind: str, draw: random.Random) -> list[tuple[int, int]]:
    """(response, length): `short` puts many responses into a tile, `long` lets them straddle tiles."""
    runs, left = [], tokens
    while left:
        length = min(left, draw.randint(1, 2) if kind == "short" else draw.randint(5, 45))
        runs.append((draw.randrange(responses), length))
        left -= length
    return runs


def case(seed: int) -> dict:
    """Largest errors of one random case, and what it was."""
    draw = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    tokens, size, vocabulary = draw.randint(1, 70), draw.choice((8, 16, 24, 40)), draw.randint(2, 110)
    responses, padding = draw.choice((1, 3, 64)), draw.choice((0, 5))
    temperature, deterministic = draw.choice((1.0, 0.7)), bool(seed // 3 % 2)
    kind, priors = draw.choice(("short", "long")), draw.choice(("near", "off", "broken", "masked"))
    runs = runs_of(tokens, responses, kind, draw)
    hidden = torch.randn(tokens, size, generator=g).to(dtype)
    weight = (torch.randn(vocabulary + padding, size, generator=g) * draw.choice((0.3, 2.0))).to(dtype)
    weight[vocabulary:] = 100.0
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    a = torch.rand(tokens, generator=g) + 0.1
    if priors == "masked":
        a.zero_()
    owner = torch.tensor([row for row, length in runs for _ in range(length)])

    table = torch.log_softmax(hidden.double() @ weight[:vocabulary].double().t() / temperature, -1)
    logprobs, p = table.gather(1, targets[:, None]).squeeze(1), table.exp()
    expected = torch.zeros(responses, vocabulary, dtype=torch.float64).index_add_(0, owner, a[:, None] * p)

    prior = logprobs.float() + 1e-3 * torch.randn(tokens, generator=g)
    some = torch.rand(tokens, generator=g) < 0.3
    if priors == "off":
        prior[some] += torch.randn(int(some.sum()), generator=g)
    elif priors == "broken":
        wrong = torch.tensor([300.0, -300.0, 5.0, -40.0, torch.nan, torch.inf, -torch.inf])
        prior[some] += wrong[torch.randint(0, len(wrong), (int(some.sum()),), generator=g)]
    balance = torch.zeros(responses, vocabulary + padding)
    counts = ExpectedCounts(balance, owner, a, runs, torch.no_grad)
    tolerance = draw.choice((1e-5, 1e-2))
    where = dict(temperature=temperature, vocab_start=0, group=None, deterministic=deterministic, tiles=TILES)
    result = triton_score.sweep_from_prior(
        hidden, weight[:vocabulary], targets, prior, counts, tolerance=tolerance, **where
    )
    without = triton_score.sweep_from_prior(
        hidden, weight[:vocabulary], targets, prior, None, tolerance=tolerance, **where
    )
    deviation = (prior.double() - logprobs).expm1().abs()
    left = torch.where(deviation <= tolerance, deviation, 0.0)
    allowed = torch.zeros(responses, dtype=torch.float64).index_add_(0, owner, a * left)
    excess = (balance[:, :vocabulary].double() + expected).abs().sum(1) - allowed
    entropy = -(p * table).sum(1)
    return dict(
        what=f"{seed}: {dtype} {priors} {kind} T={tokens} V={vocabulary} R={responses} {deterministic=}",
        priors=priors,
        logprobs=float((result.logprobs - logprobs).abs().max() / (1 + logprobs.abs().max())),
        entropy=float((result.entropy - entropy).abs().max() / (1 + entropy.abs().max())),
        without=float((without.logprobs - logprobs).abs().max() / (1 + logprobs.abs().max())),
        counts=float(excess.max() / (1 + expected.sum(1).max())),
        padding=float(balance[:, vocabulary:].abs().sum()),
        swept_again=int(result.swept_again),
        above=int((~(deviation <= tolerance)).sum()),
    )


def shard(rank: int, folder: str) -> None:
    """Two ranks, each with a part of the vocabulary, the second with one true row; errors of rank 0 go to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    g = torch.Generator().manual_seed(5)
    tokens, size, vocabulary, rows = 40, 16, 37, 36
    hidden, weight = torch.randn(tokens, size, generator=g), torch.randn(2 * rows, size, generator=g)
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    owner = torch.arange(tokens) * 3 // tokens
    table = torch.log_softmax(hidden.double() @ weight[:vocabulary].double().t() / 0.8, -1)
    logprobs = table.gather(1, targets[:, None]).squeeze(1)
    prior = logprobs.float()
    prior[3::7] = torch.tensor([0.5, -200.0, 100.0, torch.nan, 3.0, torch.inf])
    scores = score_tokens(
        hidden,
        weight[rank * rows : (rank + 1) * rows],
        targets,
        owner,
        3,
        temperature=0.8,
        vocab_start=rank * rows,
        vocab_size=vocabulary,
        tp_group=dist.group.WORLD,
        prior_logprobs=prior,
        prior_tolerance=1e-6,
        kernel="triton",
    )
    phi = weight[targets].double() - table.exp() @ weight[:vocabulary].double()
    expected = torch.stack([phi[owner == i].mean(0) for i in range(3)])
    entropy = -(table.exp() * table).sum(1)
    errors = dict(
        logprobs=float((scores.logprobs - logprobs).abs().max()),
        entropy=float((scores.entropy - entropy).abs().max()),
        features=float((scores.features - expected).abs().max()),
    )
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))


def shards() -> list[dict]:
    """Errors of both ranks."""
    triton_score.kernel_tiles = lambda *which, **options: TILES
    torch.cuda.get_device_capability = lambda device: (9, 0)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [multiprocessing.get_context("fork").Process(target=shard, args=(rank, folder)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


if __name__ == "__main__":
    cases = shards() if sys.argv[1] == "shards" else [case(seed) for seed in range(int(sys.argv[1]))]
    json.dump(cases, sys.stdout)
