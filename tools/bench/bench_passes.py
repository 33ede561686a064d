"""Time complete old-log-prob and update passes of a small model, with the tiled head and with plain logits.

    python tools/bench/bench_passes.py

A random Qwen3-architecture model runs through `Policy` as in training, with all features enabled. The plain head
computes the logits of all response tokens of a micro-batch together, in float32, with autograd through log_softmax; it
computes no Φ unless the row states it. All rows alternate in one process. The plain head replaces ours in the same
model, so that everything else is equal.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile

import torch
from turns import peak_mb, ratio, show, take_turns

from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig
from megatron_g2rl.policy import head, runtime
from megatron_g2rl.policy.packing import TokenSequence
from megatron_g2rl.policy.policy import Policy

OURS = (head.score_tokens, head.token_logprobs)


def write_model(folder: str, a: argparse.Namespace) -> None:
    """A random model in Hugging Face's format."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=a.vocabulary,
        hidden_size=a.hidden,
        intermediate_size=3 * a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64,
        num_key_value_heads=a.hidden // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def plain_table(hidden, weight, targets, temperature, vocab_size):
    table = torch.log_softmax((hidden @ weight[:vocab_size].t()).float() / temperature, -1)
    return table, table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(1)


@torch.no_grad()
def plain_score(hidden, weight, targets, response_index, num_responses, *, features, temperature, vocab_size, **others):
    """The score head by definition, with a second product with the vocabulary for Φ."""
    chosen = response_index >= 0
    table, logprobs, entropy = plain_table(hidden[chosen], weight, targets[chosen], temperature, vocab_size)
    results = torch.zeros(2, len(targets), device=hidden.device)
    results[0, chosen], results[1, chosen] = logprobs, entropy
    if not features:
        return head.TokenScores(*results, None)
    owner = response_index[chosen]
    phi = weight[targets[chosen]].float() - (table.exp().to(weight.dtype) @ weight[:vocab_size]).float()
    total = torch.zeros(num_responses, hidden.shape[1], device=hidden.device).index_add_(0, owner, phi)
    return head.TokenScores(*results, total / torch.bincount(owner, minlength=num_responses)[:, None])


def plain_update(hidden, weight, targets, *, temperature, vocab_size, **others):
    """The update head by autograd."""
    return plain_table(hidden, weight, targets, temperature, vocab_size)[1:]


def build(folder: str, a: argparse.Namespace) -> Policy:
    settings = PolicyConfig(precision=a.precision, device=a.device, head_memory_mb=a.memory_mb, layer_spec=a.layer_spec)
    return Policy(
        folder,
        settings,
        OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup_updates=0),
        runtime.start(settings, seed=1),
        temperature=1.0,
        tokens_per_microbatch=a.tokens_per_microbatch,
        total_updates=1000,
    )


def sequences(a: argparse.Namespace) -> list[TokenSequence]:
    g = torch.Generator().manual_seed(1)
    draw = lambda n: tuple(torch.randint(0, a.vocabulary, (n,), generator=g).tolist())  # noqa: E731
    return [TokenSequence(draw(a.prompt_tokens), draw(a.response_tokens)) for _ in range(a.responses)]


def loss(logprobs, entropy, batch):
    return -(logprobs * logprobs.detach().exp()).sum() - 0.01 * entropy.sum(), {}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--vocabulary", type=int, default=50_000)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--responses", type=int, default=16)
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--response-tokens", type=int, default=96)
    p.add_argument("--tokens-per-microbatch", type=int, default=1024)
    p.add_argument("--memory-mb", type=int, default=256, help="policy.head_memory_mb")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--layer-spec", default="auto", choices=("auto", "te", "torch"))
    p.add_argument("--device", default="cpu")
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29622")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        write_model(folder, a)
        policy = build(folder, a)
    batch = sequences(a)

    def with_heads(heads, call):
        head.score_tokens, head.token_logprobs = heads
        return call()

    plain = (plain_score, plain_update)
    score = functools.partial(policy.score, batch)
    update = functools.partial(policy.update, batch, loss)
    ways = {
        "old-log-prob pass with Φ (ours)": lambda: with_heads(OURS, lambda: score(features=True)),
        "old-log-prob pass without Φ (ours)": lambda: with_heads(OURS, lambda: score(features=False)),
        "old-log-prob pass, plain logits, no Φ": lambda: with_heads(plain, lambda: score(features=False)),
        "old-log-prob pass, plain logits, Φ token by token": lambda: with_heads(plain, lambda: score(features=True)),
        "update pass with the optimizer (ours)": lambda: with_heads(OURS, update),
        "update pass, plain logits": lambda: with_heads(plain, update),
    }
    ours, theirs = (with_heads(heads, lambda: score(features=True)) for heads in (OURS, plain))
    difference = max((x - y).abs().max() for x, y in zip(ours.logprobs, theirs.logprobs, strict=True))
    times = take_turns(ways, a.repeats, a.device)
    bases = {"old-log-prob": "old-log-prob pass with Φ (ours)", "update": "update pass with the optimizer (ours)"}
    rows = [(n, *ratio(times, n, bases[n.split()[0]]), f"{peak_mb(ways[n], a.device):.0f}") for n in ways]
    tokens = a.responses * (a.prompt_tokens + a.response_tokens)
    show(
        f"Qwen3 architecture, {a.layers} layers, H={a.hidden}, V={a.vocabulary:,}, {tokens:,} tokens of "
        f"{a.responses} responses, {a.precision}, {a.layer_spec} layers, {a.memory_mb} MiB",
        ("pass", "median s", "ratio to ours", "peak MiB beyond the memory before"),
        rows,
        a.device,
        f"Largest difference of log-probs between both heads: {difference:.1e}",
    )
    runtime.stop()


if __name__ == "__main__":
    main()
