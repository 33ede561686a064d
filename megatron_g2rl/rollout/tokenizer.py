"""Loads what a rollout engine needs in addition to weights: the tokenizer and its end-of-sequence tokens.

Both engines use these functions, so that they decode the same text; `endings` collects all that ends a response.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_g2rl.rollout.engine import RolloutError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint (folder or hub name).

    Raises:
        RolloutError: there is none, or its files are invalid.
    """
    from transformers import AutoTokenizer

    remedy = "copy tokenizer.json and tokenizer_config.json of the original model into the folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except Exception as error:  # any fault in a file: invalid JSON, a missing key, an unknown class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RolloutError(f"{model_path}: the tokenizer cannot be loaded ({reason}); {remedy}") from error
    # Without any file, transformers creates a tokenizer with an empty vocabulary.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise RolloutError(f"{model_path}: it has no tokenizer; {remedy}")
    if not tokenizer("1+1=2", add_special_tokens=False)["input_ids"]:
        raise RolloutError(f"{model_path}: the tokenizer encodes text to no tokens: its vocabulary is empty; {remedy}")
    return tokenizer


def end_token_sources(
    model_path: str, tokenizer: PreTrainedTokenizerBase, required: bool = True
) -> dict[int, list[str]]:
    """End-of-sequence tokens from generation_config.json and the tokenizer, with the origin of each.

    Args:
        model_path: Hugging Face checkpoint, folder or hub name.
        tokenizer: its tokenizer.
        required: whether it is an error if there is none.

    Raises:
        RolloutError: generation_config.json is invalid, or there is no such token: every response would be truncated
            at `rollout.max_response_tokens`.
    """
    from transformers import AutoConfig, GenerationConfig

    origin = "generation_config.json"
    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except Exception as error:
        # The file is optional: without it, the model's config.json names the token.
        if not isinstance(error, OSError) or (Path(model_path) / origin).exists():
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RolloutError(
                f"{model_path}: {origin} cannot be read ({reason}): copy it again, or remove it"
            ) from error
        origin = "config.json"
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        generation = GenerationConfig.from_model_config(config)
    configured = generation.eos_token_id
    listed = list(configured) if isinstance(configured, list | tuple) else [] if configured is None else [configured]
    if wrong := [token for token in listed if type(token) is not int or not 0 <= token < 2**31]:
        raise RolloutError(f"{model_path}: {origin} has eos_token_id {wrong[0]!r:.40}, which is not a token id")
    sources = {token: [origin] for token in sorted(set(listed))}
    if tokenizer.eos_token_id is not None:
        sources.setdefault(tokenizer.eos_token_id, []).append("tokenizer")
    if required and not sources:
        raise RolloutError(
            f"{model_path}: neither generation_config.json nor the tokenizer names an end-of-sequence token; "
            "set eos_token_id in generation_config.json"
        )
    return sources


def end_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End-of-sequence tokens, ascending; raises like `end_token_sources`."""
    return tuple(sorted(end_token_sources(model_path, tokenizer)))
