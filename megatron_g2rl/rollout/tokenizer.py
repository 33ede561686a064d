"""Reads what a sampler needs besides weights: the tokenizer and the tokens that end a response.

Both engines use these functions, so that they stop at the same tokens and write the same text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_g2rl.rollout.engine import RolloutError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_megatron_folder(model_path: str) -> bool:
    """Whether the weights are in megatron's format, which no sampler reads: it starts without and is sent them."""
    return (Path(model_path) / "megatron").is_dir()


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint (folder or hub name).

    Raises:
        RolloutError: there is none, or its files are broken.
    """
    from transformers import AutoTokenizer

    remedy = "copy tokenizer.json and tokenizer_config.json of the original model into the folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except Exception as error:  # whatever is wrong in a file: broken JSON, a missing key, an unknown class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RolloutError(f"{model_path}: the tokenizer cannot be loaded ({reason}); {remedy}") from error
    # Without any file transformers makes a tokenizer that knows no word.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise RolloutError(f"{model_path}: there is no tokenizer in it; {remedy}")
    return tokenizer


def end_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response, ascending: those of generation_config.json, and the tokenizer's end token.

    Raises:
        RolloutError: the checkpoint names none; every response would be cut at `rollout.max_response_tokens`.
    """
    from transformers import AutoConfig, GenerationConfig

    named = f"{model_path}: generation_config.json"
    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except Exception as error:
        # The file is optional: the model's configuration then names the token.
        if not isinstance(error, OSError) or (Path(model_path) / "generation_config.json").exists():
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RolloutError(f"{named} cannot be read ({reason}): copy it again, or remove it") from error
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        generation = GenerationConfig.from_model_config(config)
    configured = generation.eos_token_id
    listed = list(configured) if isinstance(configured, list | tuple) else [] if configured is None else [configured]
    if wrong := [token for token in listed if type(token) is not int or not 0 <= token < 2**31]:
        raise RolloutError(f"{named} names {wrong[0]!r:.40} as eos_token_id: no token id")
    ids = set(listed)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise RolloutError(
            f"{model_path}: neither generation_config.json nor the tokenizer names an end-of-sequence token; "
            "set eos_token_id in generation_config.json"
        )
    return tuple(sorted(ids))
