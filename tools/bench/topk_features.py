"""Compare Φ from the rollout engine's top-K with the exact Φ, and measure the effect on ν and the shaped rewards.

    python tools/smollm2.py models/smollm2-135m
    python tools/bench/topk_features.py models/smollm2-135m gsm8k_train.jsonl

The transformers engine generates responses at temperature 1. Hidden states, exact Φ and top-K come from one forward
pass of the same model in float32, so the only difference is the mass that the top-K misses. Prints two Markdown tables:
the estimator `exploration.features_from_topk` for several K, and other ways to distribute the missing mass. Base
rewards are equal (w uniform), so ν depends only on Φ.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from megatron_g2rl.exploration import MAPPINGS, exploration_scores, features_from_topk
from megatron_g2rl.policy.head import score_tokens
from megatron_g2rl.records import Prompt
from megatron_g2rl.rollout.engine import RolloutRequest, Sampling
from megatron_g2rl.rollout.transformers import TransformersEngine

STRENGTH = 0.5
MEASURES = ("missing mass", "error of Φ", "cosine", "Pearson ν", "rank ν", "factor off by > 10%", "mean abs(Δ factor)")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", type=Path)
    p.add_argument("data", type=Path, help="JSON lines with a `problem`")
    p.add_argument("--prompts", type=int, default=12)
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--tokens", type=int, default=128, help="longest response")
    p.add_argument("--top", type=int, nargs="+", default=[1, 5, 20, 100])
    p.add_argument(
        "--keep", type=Path, help="file for hidden states and tokens; if it exists, it is read instead of generating"
    )
    a = p.parse_args()
    if not (a.keep and a.keep.exists()):
        drawn = draw(a)
        if a.keep:
            torch.save(drawn, a.keep)
    else:
        drawn = torch.load(a.keep)
    study(a, **drawn)


def draw(a: argparse.Namespace) -> dict:
    """Generate responses, and compute the hidden states that predict their tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    prompts = []
    with a.data.open() as lines:
        for position, line in enumerate(islice(lines, a.prompts)):
            message = [dict(role="user", content=json.loads(line)["problem"])]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            prompts.append(Prompt(position, text, tuple(tokenizer(text, add_special_tokens=False).input_ids), ""))
    engine = TransformersEngine(str(a.model), dtype=torch.float32, device=torch.device("cpu"))
    groups = engine.generate(RolloutRequest(prompts, Sampling(a.group_size, 1.0, a.tokens, 0, 0)))
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    hidden = []
    with torch.inference_mode():
        for group in groups:
            for response in group.responses:
                ids = torch.tensor([group.prompt.token_ids + response.token_ids])
                states = model.model(input_ids=ids).last_hidden_state[0]
                hidden.append(states[len(group.prompt.token_ids) - 1 : -1].clone())
    weight = model.get_output_embeddings().weight.detach()
    targets = [torch.tensor(r.token_ids) for group in groups for r in group.responses]
    return dict(hidden=hidden, targets=targets, weight=weight)


def study(a: argparse.Namespace, hidden: list, targets: list, weight: torch.Tensor) -> None:
    """Print both tables."""
    console, count = Console(width=200), len(targets)
    response = torch.repeat_interleave(torch.arange(count), torch.tensor([len(x) for x in targets]))
    hidden, targets = torch.cat(hidden), torch.cat(targets)
    start = time.perf_counter()
    exact = score_tokens(hidden, weight, targets, response, count)
    exact_s = time.perf_counter() - start
    start = time.perf_counter()
    score_tokens(hidden, weight, targets, response, count, features=False)
    without_s = time.perf_counter() - start
    best = [torch.log_softmax(h @ weight.t(), 1).topk(max(a.top), 1) for h in hidden.split(256)]
    ids, logprobs = torch.cat([x.indices for x in best]), torch.cat([x.values for x in best])
    novelty = scores(exact.features, a.group_size)
    spread = torch.stack([g.max() - g.min() for g in novelty.split(a.group_size)]).mean()
    console.print(
        f"{count} responses in groups of {a.group_size}, {len(targets)} tokens, V={weight.shape[0]}, "
        f"H={weight.shape[1]}; entropy {exact.entropy.mean():.2f} nats, ν {novelty.mean():.3f} on average, "
        f"{spread:.3f} between the least and the most novel response of a group"
    )
    row(console, "K", *MEASURES, "seconds")
    row(console, *["---"] * (len(MEASURES) + 2))
    for k in a.top:
        start = time.perf_counter()
        estimate = features_from_topk(
            ids[:, :k], logprobs[:, :k], targets, weight, response, count, target_logprobs=exact.logprobs
        )
        seconds = time.perf_counter() - start
        missing = 1 - known(ids[:, :k], logprobs[:, :k], targets, exact.logprobs)[1].sum(1)
        row(console, k, f"{missing.mean():.3f}", *compare(estimate, exact.features, a.group_size), f"{seconds:.2f}")
    console.print(
        f"Exact: {exact_s:.2f} s for the head with given hidden states, {exact_s - without_s:.2f} s of it for Φ; the "
        "forward pass for the hidden states comes on top.\n"
    )
    row(console, "missing mass is", "K", *MEASURES[1:])
    row(console, *["---"] * (len(MEASURES) + 1))
    for k in a.top:
        entries = known(ids[:, :k], logprobs[:, :k], targets, exact.logprobs)
        for name, phi in alternatives(*entries, targets, weight).items():
            mean = torch.zeros(count, weight.shape[1]).index_add_(0, response, phi)
            mean /= torch.bincount(response, minlength=count).clamp(min=1)[:, None]
            row(console, name, k, *compare(mean, exact.features, a.group_size))


def known(ids, logprobs, targets, target_logprobs):
    """(ids, probabilities) with the sampled token as the last column; its entry is 0 if the top-K contains it."""
    inside = (ids == targets[:, None]).any(1)
    sampled = (target_logprobs.exp() * ~inside)[:, None]
    return torch.cat([ids, targets[:, None]], 1), torch.cat([logprobs.exp(), sampled], 1)


def alternatives(ids, mass, targets, weight):
    """φ of each token under other rules for distributing the missing mass."""
    blocks = zip(ids.split(512), mass.split(512), strict=True)
    expected = torch.cat([torch.einsum("tk,tkh->th", m, weight[i]) for i, m in blocks])
    total = mass.sum(1, keepdim=True)
    missing, sampled = (1 - total).clamp(min=0), weight[targets]
    return {
        "dropped": sampled - expected,
        "given to the known entries": sampled - expected / total,
        "given to the mean row": sampled - expected - missing * weight.mean(0),
        "given to all sampled tokens, known rows included": sampled - expected - missing * sampled.mean(0),
        "given to the sampled token": sampled - expected - missing * sampled,
    }


def scores(features, group_size):
    """ν of every response for equal rewards."""
    return torch.cat([exploration_scores(g, torch.zeros(len(g))) for g in features.split(group_size)])


def compare(estimate, exact, group_size) -> list[str]:
    """The measures of one estimate, except the missing mass."""
    error = (estimate - exact).norm(dim=1) / exact.norm(dim=1)
    cosine = torch.cosine_similarity(estimate, exact, dim=1)
    pairs = list(
        zip(scores(estimate, group_size).split(group_size), scores(exact, group_size).split(group_size), strict=True)
    )
    pearson = torch.tensor([correlation(x, y) for x, y in pairs])
    ranks = torch.tensor([correlation(rank(x), rank(y)) for x, y in pairs])
    factors = [[1 + STRENGTH * MAPPINGS["centered"](x, x * 0) for x in pair] for pair in pairs]
    change = torch.cat([x - y for x, y in factors])
    relative = change / torch.cat([y for _, y in factors])
    return [
        f"{error.mean():.3f} (worst {error.max():.3f})",
        f"{cosine.mean():.4f} (worst {cosine.min():.4f})",
        f"{pearson.mean():.3f}",
        f"{ranks.mean():.3f}",
        f"{(relative.abs() > 0.1).float().mean():.0%}",
        f"{change.abs().mean():.3f}",
    ]


def rank(x):
    return x.argsort().argsort().float()


def correlation(x, y) -> float:
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def row(console: Console, *cells: object) -> None:
    console.print("| " + " | ".join(str(cell) for cell in cells) + " |", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
