"""Generates with a plain transformers model: lightweight, starts immediately, meant for small models on a CPU.

Responses are sampled token by token with a KV cache, each prompt is prefilled once for its group, and finished
responses leave the batch. `transformers.generate` is not used: it samples a batch from one random stream, so that a
response would depend on its neighbors. Deliberately omitted: paged KV memory, continuous batching, and tensor
parallelism; use vLLM for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_g2rl.config import Config
from megatron_g2rl.config.run_files import is_megatron_folder
from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout.endings import Endings
from megatron_g2rl.rollout.engine import (
    GroupAssembly,
    RolloutError,
    RolloutRequest,
    RolloutStopped,
    Sampling,
    Stop,
)
from megatron_g2rl.rollout.sampling import choose, distribution, uniform
from megatron_g2rl.rollout.tokenizer import end_token_ids, load_tokenizer

ROWS_PER_PASS = 256
"""Largest batch of responses. Larger ones are hardly faster, and a kill loses the responses in flight."""
COMPACTION_FRACTION = 1 / 8
"""Finished rows leave the batch once they are this fraction of it: copying the cache is then cheaper."""

SPECIAL_IN_WINDOW = 8
"""Extra tokens in the stop-string search window, in addition to one per byte of the longest stop string."""


@dataclass(frozen=True)
class _Row:
    """One response to generate: prompt position, index in its group, and seed."""

    prompt: int
    index: int
    seed: int


def from_config(config: Config, model_path: str, device: torch.device, endings: Endings) -> TransformersEngine:
    """The engine of `rollout.engine=transformers`; arguments as of `rollout.make_engine`."""
    dtype = torch.bfloat16 if config.policy.precision == "bf16" else torch.float32
    return TransformersEngine(model_path, dtype=dtype, device=device, endings=endings)


class TransformersEngine:
    """A `RolloutEngine` over `AutoModelForCausalLM`."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory_mb: int = 2048,
        endings: Endings | None = None,
    ) -> None:
        """Load model and tokenizer.

        Args:
            model_path: Hugging Face checkpoint, folder or hub name, or a Megatron folder.
            dtype: dtype of weights and cache; log-probs are always float32.
            device: where the model runs.
            memory_mb: memory limit in MiB for cache and logits, which bounds the batch size.
            endings: what ends a response; None: the end-of-sequence tokens of the checkpoint.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        self._device = device
        options = dict(dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
        try:
            if is_megatron_folder(model_path):  # unreadable for transformers; `load_weights` streams them in
                config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
                self._model = AutoModelForCausalLM.from_config(config, **options)
            else:
                self._model = AutoModelForCausalLM.from_pretrained(model_path, **options)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # settings that only transformers reads are not validated
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"
            raise RolloutError(f"{model_path}: transformers cannot use config.json ({reason})") from error
        self._model.requires_grad_(False).eval().to(device)
        self._tokenizer = load_tokenizer(model_path)
        endings = endings or Endings(end_token_ids(model_path, self._tokenizer))
        self._end_ids = torch.tensor(endings.token_ids, dtype=torch.long, device=device)
        self._stop_strings = endings.strings
        # A token adds at least one byte, except special tokens, which are not decoded.
        self._stop_window = max((len(text.encode()) for text in endings.strings), default=0) + SPECIAL_IN_WINDOW
        self._memory_bytes = memory_mb << 20

    def generate(self, request: RolloutRequest) -> list[ResponseGroup]:
        """Generate `sampling.group_size` responses to each prompt, in the order of `prompts`; see `RolloutEngine`.

        Floating-point sums depend on which responses share a batch. Batches are therefore formed from all requested
        responses, finished or not: a batch that is completely finished is skipped, any other is generated completely,
        and a call that continues from the `finished` responses of another is bitwise equal to an uninterrupted one.

        Raises:
            RolloutStopped: `stop` returned True; the groups of the batch in flight are lost.
            ValueError: a prompt has no tokens.
        """
        prompts, sampling = request.prompts, request.sampling
        for prompt in prompts:
            if not prompt.token_ids:
                raise ValueError(f"prompt {prompt.id} ({prompt.source}) has no tokens; check data.template")
        assembly = GroupAssembly(request)
        requested = assembly.requested
        for rows in self._passes(prompts, requested.parts, sampling):
            if all((row.prompt, row.index) in requested.known for row in rows):
                continue
            for row, response in zip(rows, self._draw_rows(prompts, rows, sampling, request.stop), strict=True):
                if (row.prompt, row.index) not in requested.known:
                    assembly.add(row.prompt, row.index, response)
        return assembly.groups()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy new weights in, streamed as (Hugging Face name, full tensor); nothing is cached between calls.

        Raises:
            ValueError: an unknown name, a wrong shape, or a parameter that was not sent.
        """
        # both names of a tied matrix are accepted
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        filled = set()
        for name, tensor in weights:
            if name not in parameters:
                raise ValueError(f"weight {name!r} is not in {type(self._model).__name__}; try rollout.engine=vllm")
            target = parameters[name]
            if target.shape != tensor.shape:
                raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
            target.copy_(tensor)
            filled.add(id(target))
        missing = [name for name, target in parameters.items() if id(target) not in filled]
        if missing:
            raise ValueError(f"{len(missing)} weights were not sent and are stale: {', '.join(missing[:5])}")

    def sleep(self) -> None:
        """Move the weights to the host (no effect on a CPU)."""
        if self._device.type == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Move the weights back to the device."""
        self._model.to(self._device)

    def close(self) -> None:
        """Drop the model."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _passes(self, prompts: Sequence[Prompt], parts: Sequence[range], sampling: Sampling) -> Iterator[list[_Row]]:
        """Split all requested responses into batches that fit in memory.

        Prompts of similar length are batched together to reduce padding; a group is split only if it does not fit in
        memory.
        """
        groups = [
            [_Row(position, index, sampling.seed(prompt, index)) for index in parts[position]]
            for position, prompt in sorted(enumerate(prompts), key=lambda item: len(item[1].token_ids))
        ]
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0) + sampling.max_response_tokens
        top_bytes = 6 * sampling.top_logprobs * sampling.max_response_tokens
        size = max(1, min(ROWS_PER_PASS, self._memory_bytes // (self._row_bytes(longest) + top_bytes)))
        rows: list[_Row] = []
        for group in groups:
            if len(rows) + len(group) > size >= sampling.group_size:
                yield rows
                rows = []
            rows += group
            while len(rows) > size:
                yield rows[:size]
                rows = rows[size:]
        if rows:
            yield rows

    def _row_bytes(self, tokens: int) -> int:
        """Bytes of one response of `tokens` tokens, prompt included: keys, values and one row of logits."""
        config = self._model.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        cache = 2 * config.num_hidden_layers * kv_heads * head_size * self._model.dtype.itemsize * tokens
        return cache + 32 * config.vocab_size  # logits, scaled logits, log-probs, probabilities (4 bytes), sums (8)

    @torch.inference_mode()
    def _draw_rows(
        self, prompts: Sequence[Prompt], rows: list[_Row], sampling: Sampling, stop: Stop | None
    ) -> list[Response]:
        """Generate one batch of responses to completion."""
        if stop and stop():
            raise RolloutStopped
        batch = _Batch(self._model, self._device, [prompts[row.prompt].token_ids for row in rows], sampling)
        seeds = torch.tensor([row.seed for row in rows], device=self._device)
        tokens = torch.zeros(len(rows), sampling.max_response_tokens, dtype=torch.long, device=self._device)
        logprobs = torch.zeros(len(rows), sampling.max_response_tokens, device=self._device)
        lengths = torch.full((len(rows),), sampling.max_response_tokens, device=self._device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=self._device)
        shape = (len(rows), sampling.max_response_tokens, sampling.top_logprobs)
        top_ids = torch.zeros(shape, dtype=torch.int32, device=self._device)
        top_logprobs = torch.zeros(shape, dtype=torch.float16, device=self._device)
        alive = torch.arange(len(rows), device=self._device)
        for position in range(sampling.max_response_tokens):
            table = distribution(batch.logits, sampling)
            drawn, drawn_logprobs = choose(table, sampling, uniform(seeds[alive], position))
            if sampling.top_logprobs:
                top = table.topk(sampling.top_logprobs)
                top_ids[alive, position], top_logprobs[alive, position] = top.indices.int(), top.values.half()
            tokens[alive, position] = drawn
            logprobs[alive, position] = drawn_logprobs
            ends = torch.isin(drawn, self._end_ids) | self._ends_in_stop_string(tokens, alive, position)
            ending = alive[ends & ~ended[alive]]
            lengths[ending] = position + 1
            ended[ending] = True
            open_rows = (~ended[alive]).nonzero().squeeze(-1)
            if len(open_rows) == 0 or position + 1 == sampling.max_response_tokens:
                break
            if stop and stop():
                raise RolloutStopped
            if len(alive) - len(open_rows) >= max(1, COMPACTION_FRACTION * len(alive)):
                batch.keep(open_rows)
                alive, drawn = alive[open_rows], drawn[open_rows]
            batch.append(drawn)
        tops = _truncate(top_ids, lengths), _truncate(top_logprobs, lengths)
        return self._responses(rows, tokens, logprobs, lengths, ended, tops)

    def _ends_in_stop_string(
        self, tokens: Int[Tensor, "rows tokens"], alive: Int[Tensor, " alive"], position: int
    ) -> Bool[Tensor, " alive"]:
        """Which rows have a stop string in the text of their last tokens."""
        if not self._stop_strings:
            return torch.zeros(len(alive), dtype=torch.bool, device=self._device)
        last = tokens[alive, max(0, position + 1 - self._stop_window) : position + 1].tolist()
        texts = self._tokenizer.batch_decode(last, skip_special_tokens=True)
        stopped = [any(stop in text for stop in self._stop_strings) for text in texts]
        return torch.tensor(stopped, device=self._device)

    def _responses(
        self,
        rows: list[_Row],
        tokens: Int[Tensor, "rows tokens"],
        logprobs: Float[Tensor, "rows tokens"],
        lengths: Int[Tensor, " rows"],
        ended: Int[Tensor, " rows"],
        tops: tuple[list[np.ndarray | None], list[np.ndarray | None]],
    ) -> list[Response]:
        counts = lengths.tolist()
        ids = [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]
        values = [row[:count] for row, count in zip(logprobs.tolist(), counts, strict=True)]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        reasons = ["stop" if stopped else "length" for stopped in ended.tolist()]
        return [
            Response(tuple(row_ids), tuple(row_logprobs), text, reason, row.seed, top_ids, top_logprobs)
            for row, row_ids, row_logprobs, text, reason, top_ids, top_logprobs in zip(
                rows, ids, values, texts, reasons, *tops, strict=True
            )
        ]


def _truncate(table: Tensor, lengths: Int[Tensor, " rows"]) -> list[np.ndarray | None]:
    """Rows of a top-K table, each truncated to the length of its response; None for each row if K is 0."""
    if not table.shape[2]:
        return [None] * len(table)
    return [row[:count].cpu().numpy().copy() for row, count in zip(table, lengths.tolist(), strict=True)]


class _Batch:
    """Rows in flight: their cache, padding and next-token logits."""

    def __init__(
        self, model: torch.nn.Module, device: torch.device, prompts: list[tuple[int, ...]], sampling: Sampling
    ) -> None:
        """Prefill each distinct prompt once and copy its cache to every row."""
        from transformers import DynamicCache

        distinct = list(dict.fromkeys(prompts))
        width = max(len(prompt) for prompt in distinct)
        padding = torch.tensor([width - len(prompt) for prompt in distinct], device=device)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in distinct], device=device)
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._positions = width - padding
        # without padding no mask is needed, and attention uses its fast path
        self._mask: Tensor | None = None
        if padding.any():
            columns = torch.arange(width + sampling.max_response_tokens, device=device)
            self._mask = (columns >= padding.unsqueeze(-1)).long()
        self._width = width
        self._forward(ids, (torch.arange(width, device=device) - padding.unsqueeze(-1)).clamp(min=0))
        if len(distinct) < len(prompts):
            index_of = {prompt: position for position, prompt in enumerate(distinct)}
            self.keep(torch.tensor([index_of[prompt] for prompt in prompts], device=device))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these rows, in this order; a row may occur more than once."""
        self._cache.batch_select_indices(rows)
        self._positions = self._positions[rows]
        self.logits = self.logits[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]

    def append(self, tokens: Int[Tensor, " rows"]) -> None:
        """Append the next token to every row."""
        self._width += 1
        self._forward(tokens.unsqueeze(-1), self._positions.unsqueeze(-1))
        self._positions = self._positions + 1

    def _forward(self, ids: Int[Tensor, "rows new"], positions: Int[Tensor, "rows new"]) -> None:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None if self._mask is None else self._mask[:, : self._width],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits: Float[Tensor, "rows vocab"] = output.logits[:, -1]
