"""A Base model as Qwen ships them: its chat template ends a turn with another token than the end-of-sequence one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from megatron_g2rl.data.tiny_model import TinyModel, make_random_model
from megatron_g2rl.rollout.tokenizer import load_tokenizer

TURN_END, DOCUMENT_END = "<|im_end|>", "<|endoftext|>"
QWEN_TEMPLATE = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""".strip()
"""What Qwen3's template does with text messages, without tools."""


def make_chatml_model(folder: Path, eagerness: float = 0.0) -> Path:
    """Write a random model with that tokenizer.

    Args:
        folder: destination.
        eagerness: approximate logit margin of the turn's end over every other token.
    """
    size = TinyModel(hidden=64, layers=2, mlp_hidden=64, vocabulary=160, tied=False)
    make_random_model(folder, "qwen3", size=size)
    tokenizer = load_tokenizer(str(folder))
    marks = [DOCUMENT_END, "<|im_start|>", TURN_END]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in marks]})
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.eos_token = DOCUMENT_END
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(DOCUMENT_END)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text()) | {"eos_token_id": end}
        (folder / name).write_text(json.dumps(settings))
    if eagerness:
        _prefer(folder, tokenizer.convert_tokens_to_ids(TURN_END), eagerness)
    return folder


def _prefer(folder: Path, token: int, eagerness: float) -> None:
    """Make `token` the most probable everywhere: one dimension is large for every token, and the head reads it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding[:, 0], head[:, 0] = 10.0, 0.0
    head[token, 0] = eagerness / torch.tensor(embedding.shape[1]).sqrt()
    save_file(tensors, file, metadata={"format": "pt"})
