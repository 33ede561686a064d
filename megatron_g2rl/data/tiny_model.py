"""Small generated models: the quickstart's, with its own tokenizer, and randomly initialized ones for tests.

The tokenizer has one token per printable ASCII character and per word of the task, so nothing is downloaded
and a problem takes few tokens. A model's folder is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_g2rl.data.tasks import Task
from megatron_g2rl.records import Prompt

Architecture = Literal["qwen3", "llama", "qwen2"]
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}

UNKNOWN, PAD, END = "<unknown>", "<pad>", "<end>"
SPECIAL_TOKENS = (PAD, END, UNKNOWN, "<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """Size of a small model."""

    hidden: int = 128
    """Width of the residual stream."""
    layers: int = 4
    """Transformer layers."""
    heads: int = 4
    """Attention heads."""
    key_value_heads: int = 2
    """Key and value heads (grouped-query attention)."""
    head_size: int = 32
    """Width of one head; vLLM's CPU attention supports 32 and above."""
    mlp_hidden: int = 384
    """Width of the gated MLP."""
    vocabulary: int = 128
    """Rows of the embedding; as in released models, it can exceed the tokenizer's number of tokens."""
    max_tokens: int = 1024
    """Maximum sequence length."""
    initial_std: float = 0.06
    """Standard deviation of the initial weights; at this width, the usual 0.02 learns about half as fast."""
    tied: bool = True
    """Whether the output head uses the embedding weights."""


def make_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Tokenizer with a chat template and one token per item of `words` and per printable ASCII character.

    Text outside ASCII becomes the unknown token.
    """
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_model(folder: Path, *, task: Task, seed: int, size: TinyModel = TinyModel()) -> Path:
    """Write the quickstart's model for `task`: an untrained Qwen3 (float32 safetensors) and its tokenizer.

    Returns:
        `folder`, usable as `model.path`.
    """
    return make_random_model(folder, "qwen3", seed=seed, size=size, words=task.words)


def make_random_model(
    folder: Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    size: TinyModel = TinyModel(),
    words: Sequence[str] = (),
    noise: float = 0.0,
) -> Path:
    """Write a randomly initialized model of a family (float32 safetensors) and its tokenizer.

    Args:
        noise: standard deviation of noise added to norm weights and biases, which are otherwise all 1 and all 0, so
            that a test that compares two implementations depends on them.

    Raises:
        ValueError: the tokenizer has more tokens than `size.vocabulary`.
    """
    tokenizer = make_tokenizer(words)
    if len(tokenizer) > size.vocabulary:
        raise ValueError(f"a vocabulary of {size.vocabulary} rows cannot hold the tokenizer's {len(tokenizer)} tokens")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(architecture, size, tokenizer)
        with torch.no_grad():
            for parameter in model.parameters():
                if noise and parameter.dim() == 1:
                    parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _model(architecture: Architecture, size: TinyModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config_class, model_class = FAMILIES[architecture]
    config = config_class(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp_hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_size,
        max_position_embeddings=size.max_tokens,
        initializer_range=size.initial_std,
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = model_class(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def demonstrations(
    task: Task, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[tuple[Prompt, list[int]]]:
    """Worked examples for the SFT warm-up: training problems generated with `seed`, in the tokenizer's chat template.

    Returns:
        Pairs of a prompt and the token ids of one correct response with end token. Only the response enters the loss.
    """
    problems = [task.problem(index, seed) for index in range(count)]
    chats = [[{"role": "user", "content": text}] for text, _ in problems]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    solutions = [task.demonstration(index, seed) for index in range(count)]
    responses = tokenizer(solutions, add_special_tokens=False)["input_ids"]
    rows = zip(texts, prompts, problems, responses, strict=True)
    return [
        (Prompt(index, text, tuple(prompt), answer), [*response, tokenizer.eos_token_id])
        for index, (text, prompt, (_, answer), response) in enumerate(rows)
    ]


def mixed_demonstrations(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[tuple[Prompt, list[int]]]:
    """`count` worked examples of several tasks, which take turns; otherwise as `demonstrations`."""
    columns = [demonstrations(task, tokenizer, -(-count // len(tasks)), seed) for task in tasks]
    return [example for row in zip(*columns, strict=True) for example in row][:count]
