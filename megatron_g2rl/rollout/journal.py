"""Keeps finished groups on disk until a checkpoint makes them useless, so that a kill does not cost them.

After a kill a run goes on from its newest checkpoint and makes the steps since then once more. Their responses are
those of the journal: only what was in flight is drawn. One file for each step and rank, one line for each group:

    {"key": "...", "prompt": 17, "responses": [...], "xxh3": "..."}

A group that several replicas draw has one line for each of them, with `"first"`, the index of its first response.
`xxh3` is a checksum of the text before it; a line that is cut off or damaged is left out with a warning, and its group
is drawn again. Lines are handed to the kernel as groups finish and not forced to the disk: they survive the death of
the process, of any kind, and what the death of the machine takes away is drawn again.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch.distributed as dist
import xxhash

from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout.engine import Finished, OnGroup, RolloutEngine, Sampling, Stop, WrappedEngine

log = logging.getLogger(__name__)

_SEAL = b', "xxh3": "'
_HEAD, _KEY_SIZE = b'{"key": "', 32
_TOPS = {"top_ids": "<i4", "top_logprobs": "<f2"}
_LARGEST_VOCABULARY = 2**31
_ENDS = ("stop", "length")
_FILE = re.compile(r"(step|evaluation)_(?P<steps_done>\d+)\.rank_\d+\.jsonl")


class JournaledRollout(WrappedEngine):
    """A `RolloutEngine` that asks its engine only for the groups that its journal does not have."""

    def __init__(
        self, engine: RolloutEngine, folder: Path, fingerprint: str, vocab_size: int = _LARGEST_VOCABULARY
    ) -> None:
        """Wrap `engine`; all ranks do, with the same arguments, on a file system that they share.

        Args:
            engine: the engine over all ranks.
            folder: where the journal is; made when the first group is written.
            fingerprint: names everything but sampling and prompt that decides the responses of a step: model, data,
                algorithm and engine. Groups of another fingerprint are left alone.
            vocab_size: token ids of a group are below it.
        """
        super().__init__(engine)
        self._folder, self._fingerprint, self._vocab_size = folder, fingerprint, vocab_size
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self.replayed = 0
        """Complete groups taken from the journal since the start of this process."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        finished: Finished | None = None,
        parts: Sequence[range] | None = None,
        on_group: OnGroup | None = None,
        stop: Stop | None = None,
    ) -> list[ResponseGroup]:
        """Draw what the journal does not have and return all groups, in order; see `RolloutEngine`.

        Raises:
            RolloutStopped: `stop` said so; what was finished is in the journal.
            OSError: the journal cannot be read or written, for instance because the disk is full; on every rank.
            ValueError: `parts` are asked for; a journal is of complete groups.
        """
        if parts is not None:
            raise ValueError("a journal is of complete groups")
        keys = {self._key(prompt, sampling): prompt.id for prompt in prompts}
        known = self._read(sampling.step, keys, sampling.group_size)
        self.replayed += sum(None not in responses for responses in known.values())
        place = {prompt_id: key for key, prompt_id in keys.items()}

        def keep(group: ResponseGroup) -> None:
            self._append(sampling.step, place[group.prompt.id], group, sampling.group_size)
            if on_group:
                on_group(group)

        return self._engine.generate(
            prompts, sampling, finished={**known, **(finished or {})}, on_group=keep, stop=stop
        )

    def forget_before(self, step: int) -> None:
        """Remove what a checkpoint after `step` training steps has made useless: earlier steps and evaluations."""
        if self._rank:
            return
        for file in self._folder.glob("*.jsonl"):
            match = _FILE.fullmatch(file.name)
            if match and int(match["steps_done"]) < step:
                file.unlink(missing_ok=True)

    def _key(self, prompt: Prompt, sampling: Sampling) -> str:
        """Names what a group answers: another fingerprint, setting or wording of the prompt has another key."""
        asked = [self._fingerprint, astuple(sampling), prompt.id, prompt.token_ids]
        return xxhash.xxh3_128_hexdigest(json.dumps(asked).encode())

    def _append(self, step: int, key: str, group: ResponseGroup, group_size: int) -> None:
        path = self._folder / f"{_name(step)}.rank_{self._rank:05d}.jsonl"
        record = {"key": key, "prompt": group.prompt.id, "responses": [_fields(r) for r in group.responses]}
        if len(group.responses) < group_size:
            record["first"] = group.first
        line = _sealed(json.dumps(record)[:-1].encode())
        try:
            self._folder.mkdir(exist_ok=True)  # no parents: a run's folder that is gone stays gone
            with path.open("a+b") as file:
                if not _ends_a_line(file):
                    file.write(b"\n")  # a kill cut the last line off: this one must not be lost with it
                file.write(line)
        except OSError as error:
            # what a write says has no file name
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _read(self, step: int, wanted: Mapping[str, int], group_size: int) -> Finished:
        """What is finished of a step, by prompt id; rank 0 reads, so that all ranks see the same."""
        found: list[Finished | OSError] = [{}]
        if self._rank == 0:
            try:
                found = [self._read_files(step, wanted, group_size)]
            except OSError as error:
                found = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], OSError):
            raise found[0]
        return found[0]

    def _read_files(self, step: int, wanted: Mapping[str, int], group_size: int) -> Finished:
        found: dict[int, list[Response | None]] = {}
        for path in sorted(self._folder.glob(f"{_name(step)}.rank_*.jsonl")):
            for number, line in _records(path, wanted):
                try:
                    record = json.loads(line)
                    drawn = tuple(_response(fields, self._vocab_size) for fields in record["responses"])
                    first = _first(record, len(drawn), group_size)
                    group = found.setdefault(wanted[record["key"]], [None] * group_size)
                    for index, response in enumerate(drawn, first):
                        group[index] = group[index] or response
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    log.warning("%s:%d is no group of responses (%s); they are drawn again", path, number, error)
        return {prompt_id: tuple(group) for prompt_id, group in found.items()}


def _first(record: Mapping[str, Any], count: int, group_size: int) -> int:
    """The index of the first of the `count` responses of a line.

    Raises:
        ValueError: these are not a group, and not a part of one.
    """
    if "first" not in record:
        if count != group_size:
            raise ValueError(f"{count} responses, not {group_size}")
        return 0
    first = record["first"]
    if type(first) is not int or not 0 <= first < first + count <= group_size:
        raise ValueError(f"{count} responses from number {first!r:.20} on, of a group of {group_size}")
    return first


def _name(step: int) -> str:
    """What a file is called after: the steps done before; evaluations are the negative steps."""
    return f"step_{step:08d}" if step >= 0 else f"evaluation_{-1 - step:08d}"


def _sealed(body: bytes) -> bytes:
    """The line of a JSON object, given without its last brace: its checksum becomes the last entry."""
    return body + _SEAL + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'


def _records(path: Path, wanted: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
    """Numbers and undamaged lines of a file whose key is wanted; a long line that is not is not parsed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            body, _, _ = line.rpartition(_SEAL)
            if _sealed(body) != line:
                log.warning("%s:%d is cut off or damaged; its responses are drawn again", path, number)
            elif body[len(_HEAD) :][:_KEY_SIZE].decode("utf-8", "replace") in wanted:
                yield number, line


def _fields(response: Response) -> dict[str, Any]:
    """What a line says of a response; the most probable tokens, where there are any, as the bytes of their arrays."""
    fields = {name: value for name, value in vars(response).items() if name not in _TOPS}
    for name, dtype in _TOPS.items() if response.top_ids is not None else ():
        values = getattr(response, name)
        fields[name] = [base64.b64encode(values.astype(dtype).tobytes()).decode(), *values.shape]
    return fields


def _response(fields: dict[str, Any], vocab_size: int) -> Response:
    """A response from what `_fields` made of it, with token ids below `vocab_size`.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    fields = fields | {name: tuple(fields[name]) for name in ("token_ids", "logprobs")}
    for name in _TOPS.keys() & fields.keys():
        text, *shape = fields[name]
        fields[name] = np.frombuffer(base64.b64decode(text), _TOPS[name]).reshape(shape)
    response = Response(**fields)
    tokens, logprobs = response.token_ids, response.logprobs
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise ValueError("a token is no token id")
    if len(logprobs) != len(tokens) or not all(type(x) is float and x <= 0.01 for x in logprobs):
        raise ValueError("its log-probs are not those of its tokens")
    if type(response.text) is not str or type(response.seed) is not int or response.finish_reason not in _ENDS:
        raise ValueError("its text, seed or end is none")
    return response


def _ends_a_line(file: BinaryIO) -> bool:
    """Whether a file, opened at its end, is empty or ends with a whole line."""
    if not file.tell():
        return True
    file.seek(-1, 2)
    return file.read(1) == b"\n"
