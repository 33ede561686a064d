"""Tokens per second of both rollout engines and of plain `transformers.generate`, side by side in one process.

    OMP_NUM_THREADS=1 python tools/bench/bench_rollout.py

A random Qwen3-architecture model (hidden 128, 4 layers, vocabulary 512) generates 8 responses to each of 8 prompts. The
contenders alternate and the best of the rounds is printed, so that other processes on the machine affect all equally.
No response ends early unless `--ending` is given: then about one token in 32 ends one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_g2rl.records import Prompt
from megatron_g2rl.rollout.engine import RolloutEngine, RolloutRequest, Sampling
from megatron_g2rl.rollout.transformers import TransformersEngine
from megatron_g2rl.rollout.vllm import VllmEngine

VOCABULARY = 512
PROMPTS = 8
GROUP = 8


def make_model(folder: str, end_tokens: int) -> None:
    """Write a random model whose first `end_tokens` tokens end a response."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=list(range(end_tokens)),
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder)


def engine_tokens(engine: RolloutEngine, prompts: list[Prompt], sampling: Sampling) -> int:
    """Generate once; the number of tokens."""
    groups = engine.generate(RolloutRequest(prompts, sampling))
    return sum(len(response.token_ids) for group in groups for response in group.responses)


def generate_tokens(model: torch.nn.Module, prompts: list[Prompt], sampling: Sampling, end_tokens: int) -> int:
    """Generate once with `transformers.generate`; the number of tokens up to and including the first end token."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    rows = [prompt.token_ids for prompt in prompts for _ in range(sampling.group_size)]
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_response_tokens,
        eos_token_id=list(range(end_tokens)),
        pad_token_id=0,
    )[:, width:]
    ends = (output < end_tokens).cumsum(-1)
    return int((ends - (output < end_tokens).long() == 0).sum())


def main(
    response_tokens: Annotated[int, typer.Option(help="Longest response.")] = 64,
    rounds: Annotated[int, typer.Option(help="Number of rounds; the best one counts.")] = 5,
    ending: Annotated[bool, typer.Option(help="Let about one token in 32 end a response.")] = False,
) -> None:
    """Measure and print the table."""
    end_tokens = 16 if ending else 1  # of 512: a near-uniform model samples one of 16 every 32nd time
    sampling = Sampling(GROUP, 1.0, response_tokens, run_seed=0, step=0)
    draws = random.Random(0)
    console = Console()
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        make_model(folder, end_tokens)
        vllm = VllmEngine(
            folder,
            dtype=torch.float32,
            tensor_parallel=1,
            max_model_tokens=1024 + response_tokens,
            kv_cache_mb=512,
            gpu_memory_fraction=0.5,
            enforce_eager=True,
            seed=0,
        )
        transformers = TransformersEngine(folder, dtype=torch.float32, device=torch.device("cpu"))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        vllm.load_weights(model.named_parameters())
        table = Table("prompt tokens", "transformers.generate", "transformers engine", "vllm engine", title="tokens/s")
        for name, lengths in {
            "8": [8] * PROMPTS,
            "20 to 160": list(range(20, 180, 20)),
            "1000": [1000] * PROMPTS,
        }.items():
            prompts = [
                Prompt(index, "", tuple(draws.choices(range(end_tokens, VOCABULARY), k=length)), "")
                for index, length in enumerate(lengths)
            ]
            contenders: list[Callable[[], int]] = [
                lambda prompts=prompts: generate_tokens(model, prompts, sampling, end_tokens),
                lambda prompts=prompts: engine_tokens(transformers, prompts, sampling),
                lambda prompts=prompts: engine_tokens(vllm, prompts, sampling),
            ]
            table.add_row(name, *(f"{rate:,.0f}" for rate in best_rates(contenders, rounds)))
        vllm.close()
    console.print(table)


def best_rates(contenders: list[Callable[[], int]], rounds: int) -> list[float]:
    """Tokens per second of each contender: the best of its rounds, after one warm-up round."""
    best = [0.0] * len(contenders)
    for turn in range(rounds + 1):
        for index, contender in enumerate(contenders):
            start = time.perf_counter()
            rate = contender() / (time.perf_counter() - start)
            if turn:
                best[index] = max(best[index], rate)
    return best


if __name__ == "__main__":
    typer.run(main)
