"""Journal of finished groups on disk, kept until a checkpoint supersedes them, so that a kill does not lose them.

After a kill, a run resumes from its latest checkpoint and repeats the steps since then. It takes their responses from
the journal and generates only those that were in flight. One file per step and rank, one line per group:

    {"key": "...", "prompt": 17, "responses": [...], "xxh3": "..."}

A group that several replicas generate has one line per replica, with `"first"`, the index of its first response.
`xxh3` is a checksum of the preceding text; a truncated or corrupt line is skipped with a warning, and its group is
generated again. Lines are written as groups finish, without fsync: they survive any death of the process; what a crash
of the machine loses is generated again.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megatron_g2rl.distributed.collectives import on_first_rank, own_rank
from megatron_g2rl.records import Prompt, Response, ResponseGroup, Stream, stream_position
from megatron_g2rl.rollout.engine import Finished, RolloutEngine, RolloutRequest, Sampling, WrappedEngine

log = logging.getLogger(__name__)

_SEAL = b', "xxh3": "'
_HEAD, _KEY_SIZE = b'{"key": "', 32
_TOPS = {"top_ids": "<i4", "top_logprobs": "<f2"}
_LARGEST_VOCABULARY = 2**31
_ENDS = ("stop", "length")
_STEMS: dict[Stream, str] = {"train": "step", "eval": "evaluation"}
_FILE = re.compile(rf"({'|'.join(_STEMS.values())})_(?P<steps_done>\d+)\.rank_\d+\.jsonl")


class JournaledRollout(WrappedEngine):
    """A `RolloutEngine` that requests from its engine only what the journal does not have."""

    def __init__(
        self, engine: RolloutEngine, folder: Path, fingerprint: str, vocab_size: int = _LARGEST_VOCABULARY
    ) -> None:
        """Wrap `engine`; all ranks do so with the same arguments, on a shared file system.

        Args:
            engine: the engine that spans all ranks.
            folder: folder of the journal; created when the first group is written.
            fingerprint: identifies everything other than sampling settings and prompt that determines the responses:
                model, data, algorithm and engine. Groups with another fingerprint are ignored.
            vocab_size: upper bound of token ids, exclusive.
        """
        super().__init__(engine)
        self._folder, self._fingerprint, self._vocab_size = folder, fingerprint, vocab_size
        self._rank = own_rank()

    def generate(self, request: RolloutRequest) -> list[ResponseGroup]:
        """Generate what the journal does not have and return all groups, in order; see `RolloutEngine`.

        Raises:
            RolloutStopped: `stop` returned True; finished groups are in the journal.
            OSError: the journal cannot be read or written, for example on a full disk; raised on every rank.
            ValueError: `parts` is given; a journal holds complete groups.
        """
        if request.parts is not None:
            raise ValueError("a journal holds complete groups only: pass parts=None")
        sampling = request.sampling
        keys = {self._key(prompt, sampling): prompt.id for prompt in request.prompts}
        known = self._read(sampling, keys)
        key_of = {prompt_id: key for key, prompt_id in keys.items()}

        def keep(group: ResponseGroup) -> None:
            self._append(sampling, key_of[group.prompt.id], group)
            if request.on_group:
                request.on_group(group)

        return self._engine.generate(replace(request, finished={**known, **request.finished}, on_group=keep))

    def forget_before(self, step: int) -> None:
        """Remove steps and evaluations that a checkpoint after `step` training steps supersedes."""
        if self._rank:
            return
        for file in self._folder.glob("*.jsonl"):
            match = _FILE.fullmatch(file.name)
            if match and int(match["steps_done"]) < step:
                file.unlink(missing_ok=True)

    def _key(self, prompt: Prompt, sampling: Sampling) -> str:
        """Key of a group: it differs for another fingerprint, sampling setting or prompt text."""
        settings = [
            sampling.group_size,
            sampling.temperature,
            sampling.max_response_tokens,
            sampling.run_seed,
            stream_position(sampling.stream, sampling.step),
            sampling.top_logprobs,
        ]
        limits = [sampling.top_p, sampling.top_k, sampling.min_p]
        if limits != [1.0, 0, 0.0]:
            settings.append(limits)
        identity = [self._fingerprint, settings, prompt.id, prompt.token_ids]
        return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())

    def _append(self, sampling: Sampling, key: str, group: ResponseGroup) -> None:
        path = self._folder / f"{_name(sampling)}.rank_{self._rank:05d}.jsonl"
        record = {"key": key, "prompt": group.prompt.id, "responses": [_fields(r) for r in group.responses]}
        if len(group.responses) < sampling.group_size:
            record["first"] = group.first
        line = _sealed(json.dumps(record)[:-1].encode())
        try:
            self._folder.mkdir(exist_ok=True)  # no parents: a removed run folder is not recreated
            with path.open("a+b") as file:
                if not _ends_a_line(file):
                    file.write(b"\n")  # a kill truncated the last line: start a new one
                file.write(line)
        except OSError as error:
            # an error from write() has no file name
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _read(self, sampling: Sampling, wanted: Mapping[str, int]) -> Finished:
        """Finished responses of a step by prompt id; rank 0 reads and broadcasts, so that all ranks see the same."""
        return on_first_rank(lambda: self._read_files(sampling, wanted), f"reading {self._folder}")

    def _read_files(self, sampling: Sampling, wanted: Mapping[str, int]) -> Finished:
        group_size = sampling.group_size
        groups: dict[int, list[Response | None]] = {}
        for path in sorted(self._folder.glob(f"{_name(sampling)}.rank_*.jsonl")):
            for number, line in _records(path, wanted):
                try:
                    record = json.loads(line)
                    drawn = tuple(_response(fields, self._vocab_size) for fields in record["responses"])
                    first = _first(record, len(drawn), group_size)
                    group = groups.setdefault(wanted[record["key"]], [None] * group_size)
                    for index, response in enumerate(drawn, first):
                        group[index] = group[index] or response
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    log.warning("%s:%d is not a response group (%s); generating it again", path, number, error)
        return {prompt_id: tuple(group) for prompt_id, group in groups.items()}


def _first(record: Mapping[str, Any], count: int, group_size: int) -> int:
    """Index in the group of the first of the `count` responses of a line.

    Raises:
        ValueError: the responses are neither a complete group nor a part of one.
    """
    if "first" not in record:
        if count != group_size:
            raise ValueError(f"{count} responses, expected {group_size}")
        return 0
    first = record["first"]
    if type(first) is not int or not 0 <= first < first + count <= group_size:
        raise ValueError(f"{count} responses from index {first!r:.20} in a group of {group_size}")
    return first


def _name(sampling: Sampling) -> str:
    """File name stem: what the responses are for, and the number of completed steps."""
    return f"{_STEMS[sampling.stream]}_{sampling.step:08d}"


def _sealed(body: bytes) -> bytes:
    """Complete the line of a JSON object, given without its closing brace, with its checksum as the last entry."""
    return body + _SEAL + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'


def _records(path: Path, wanted: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of intact lines with a wanted key; other lines are not parsed, as they can be long."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            body, _, _ = line.rpartition(_SEAL)
            if _sealed(body) != line:
                log.warning("%s:%d is truncated or corrupt; generating its responses again", path, number)
            elif body[len(_HEAD) :][:_KEY_SIZE].decode("utf-8", "replace") in wanted:
                yield number, line


def _fields(response: Response) -> dict[str, Any]:
    """JSON fields of a response; top-K tables, if any, as base64 of the array bytes."""
    fields = {name: value for name, value in vars(response).items() if name not in _TOPS}
    for name, dtype in _TOPS.items() if response.top_ids is not None else ():
        values = getattr(response, name)
        fields[name] = [base64.b64encode(values.astype(dtype).tobytes()).decode(), *values.shape]
    return fields


def _response(fields: dict[str, Any], vocab_size: int) -> Response:
    """Inverse of `_fields`; checks that token ids are below `vocab_size`.

    Raises:
        ValueError, TypeError, KeyError: the fields are not those of a response.
    """
    fields = fields | {name: tuple(fields[name]) for name in ("token_ids", "logprobs")}
    for name in _TOPS.keys() & fields.keys():
        text, *shape = fields[name]
        fields[name] = np.frombuffer(base64.b64decode(text), _TOPS[name]).reshape(shape)
    response = Response(**fields)
    tokens, logprobs = response.token_ids, response.logprobs
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise ValueError("it has an invalid token id")
    if len(logprobs) != len(tokens) or not all(type(x) is float and x <= 0.01 for x in logprobs):
        raise ValueError("its log-probs do not match its tokens")
    if type(response.text) is not str or type(response.seed) is not int or response.finish_reason not in _ENDS:
        raise ValueError("its text, seed or finish_reason is invalid")
    return response


def _ends_a_line(file: BinaryIO) -> bool:
    """Whether a file, opened at its end, is empty or ends with a complete line."""
    if not file.tell():
        return True
    file.seek(-1, 2)
    return file.read(1) == b"\n"
