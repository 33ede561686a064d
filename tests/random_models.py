"""Small random models, written to disk by transformers itself: the common start of both sides of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

CLASSES = dict(qwen3="Qwen3", qwen3_moe="Qwen3Moe", qwen2="Qwen2", llama="Llama", mixtral="Mixtral")
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)


def write_random_model(
    folder: Path, family: str = "qwen3", *, seed: int = 0, noise: float = 0.0, **changes: Any
) -> str:
    """Write a model of `family` in float32 and a tokenizer with one word a token (`w0`, `w1`, ...); returns the folder.

    Args:
        folder: destination.
        family: a key of `CLASSES`.
        seed: seed of the weights.
        noise: added to norm weights and biases, which are otherwise all 1 and all 0 and would hide a mix-up.
        **changes: changes of the configuration.
    """
    settings = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
    )
    settings |= (EXPERTS if family == "qwen3_moe" else {}) | changes
    name = CLASSES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if noise and ("norm" in key or key.endswith("bias")):
                parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(settings["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return str(folder)


def largest_logprob_error(model: torch.nn.Module, groups: list, temperature: float) -> float:
    """Sampled log-probs against teacher forcing in transformers: one response at a time, no padding, no cache."""
    worst = 0.0
    for group in groups:
        start = len(group.prompt.token_ids)
        for response in group.responses:
            ids = torch.tensor([group.prompt.token_ids + response.token_ids])
            with torch.no_grad():
                reference = torch.log_softmax(model(ids).logits.float()[0] / temperature, -1)
            picked = reference[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0]
            worst = max(worst, (picked - torch.tensor(response.logprobs)).abs().max().item())
    return worst


def assert_most_probable(model: torch.nn.Module, groups: list, temperature: float, top: int, tolerance: float) -> None:
    """The `top` most probable tokens at each position against teacher forcing; near ties may be in either order.

    Args:
        model: the model that generated.
        groups: its responses.
        temperature: sampling temperature.
        top: how many tokens each position must have.
        tolerance: allowed error of a log-prob in nats; rounding to half precision is added to it.
    """
    for group in groups:
        start = len(group.prompt.token_ids)
        for response in group.responses:
            ids = torch.tensor([group.prompt.token_ids + response.token_ids])
            with torch.no_grad():
                table = torch.log_softmax(model(ids).logits.float()[0] / temperature, -1)[start - 1 : -1]
            assert response.top_ids.shape == response.top_logprobs.shape == (len(response.token_ids), top)
            assert (response.top_ids.dtype, response.top_logprobs.dtype) == ("int32", "float16")
            found = torch.from_numpy(response.top_ids).long()
            assert all(len(row.unique()) == top for row in found)
            reported, best = torch.from_numpy(response.top_logprobs).float(), table.topk(top).values
            # float16 has an 11-bit significand
            torch.testing.assert_close(reported, best, rtol=2.0**-11, atol=tolerance)
            torch.testing.assert_close(table.gather(-1, found), best, rtol=0, atol=2 * tolerance)
