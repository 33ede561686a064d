"""The journal of finished groups: what it restores, what it rejects, and that a resumed step is bitwise equal."""

from __future__ import annotations

import errno
import json
import logging
import random

import numpy as np
import pytest
import torch
import xxhash
from random_models import write_random_model

from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout import transformers as transformers_engine
from megatron_g2rl.rollout.engine import RolloutRequest, RolloutStopped, Sampling
from megatron_g2rl.rollout.journal import JournaledRollout
from megatron_g2rl.rollout.transformers import TransformersEngine

DRAWS = random.Random(0)
PROMPTS = [Prompt(place, "", (place, 5), "") for place in (3, 1, 4, 15)]
SAMPLING = Sampling(group_size=2, temperature=0.7, max_response_tokens=8, run_seed=5, step=2)


def response(sampling: Sampling, prompt: Prompt, index: int) -> Response:
    """Numbers that only an exact copy preserves, and non-ASCII text."""
    draws = random.Random(f"{sampling}{prompt}{index}")
    logprobs = tuple(-draws.expovariate(1) for _ in range(5))
    numbers = np.random.default_rng(draws.getrandbits(32))
    top = [None, None]
    if sampling.top_logprobs:
        shape = (5, sampling.top_logprobs)
        top = [numbers.integers(2**31, size=shape, dtype=np.int32), -numbers.exponential(4, shape).astype(np.float16)]
    ids = tuple(draws.choices(range(99), k=5))
    return Response(ids, logprobs, 'Φ\n"\ud800', "stop", draws.getrandbits(63), *top)


class Engine:
    """Records the prompts that it draws, and can be stopped after some."""

    def __init__(self):
        self.drawn = []

    def generate(self, request):
        sampling = request.sampling
        groups = []
        for prompt in request.prompts:
            if prompt.id in request.finished:
                groups.append(ResponseGroup(prompt, request.finished[prompt.id]))
                continue
            if request.stop and request.stop():
                raise RolloutStopped
            self.drawn.append(prompt.id)
            groups.append(
                ResponseGroup(prompt, tuple(response(sampling, prompt, i) for i in range(sampling.group_size)))
            )
            request.on_group(groups[-1])
        return groups


def ask(folder, prompts=PROMPTS, sampling=SAMPLING, fingerprint="a", stop=None):
    """Groups, and the prompts drawn for them, as in a new process."""
    engine = Engine()
    rollout = JournaledRollout(engine, folder, fingerprint)
    groups = rollout.generate(RolloutRequest(prompts, sampling, stop=stop))
    return groups, engine.drawn


def stop_after(count: int):
    calls = iter(range(1000))
    return lambda: next(calls) >= count


def changed(**changes) -> Sampling:
    return Sampling(**(vars(SAMPLING) | changes))


def only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_finished_groups_are_restored_bitwise_and_only_the_others_are_drawn(tmp_path):
    expected, drawn = ask(tmp_path / "undisturbed")
    assert drawn == [3, 1, 4, 15]
    with pytest.raises(RolloutStopped):
        ask(tmp_path / "run", stop=stop_after(2))
    groups, drawn = ask(tmp_path / "run")
    assert groups == expected and drawn == [4, 15]
    groups, drawn = ask(tmp_path / "run", PROMPTS[::-1])
    assert groups == expected[::-1] and drawn == []


def test_the_top_k_is_restored_bitwise(tmp_path):
    expected, drawn = ask(tmp_path, sampling=changed(top_logprobs=3))
    groups, again = ask(tmp_path, sampling=changed(top_logprobs=3))
    assert groups == expected and drawn and not again
    pairs = zip([r for g in groups for r in g.responses], [r for g in expected for r in g.responses], strict=True)
    for found, other in pairs:
        for name in ("top_ids", "top_logprobs"):
            values = getattr(found, name)
            assert values.shape == (5, 3) and values.tobytes() == getattr(other, name).tobytes()


@pytest.mark.parametrize(
    "asked",
    [
        dict(fingerprint="b"),
        dict(sampling=changed(temperature=0.8)),
        dict(sampling=changed(top_p=0.9)),
        dict(sampling=changed(top_k=3)),
        dict(sampling=changed(min_p=0.1)),
        dict(sampling=changed(group_size=3)),
        dict(sampling=changed(step=3)),
        dict(sampling=changed(stream="eval")),
        dict(sampling=changed(run_seed=6)),
        dict(sampling=changed(top_logprobs=2)),
        dict(prompts=[Prompt(p.id, "", (*p.token_ids, 1), "") for p in PROMPTS]),
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_groups_of_another_run_setting_step_or_prompt_text_are_ignored(tmp_path, asked):
    ask(tmp_path)
    assert ask(tmp_path, **asked)[1] == [3, 1, 4, 15]
    assert ask(tmp_path)[1] == [] and ask(tmp_path, **asked)[1] == []


@pytest.mark.parametrize("damage", ["cut off", "bit", "garbage"])
def test_a_corrupt_line_is_reported_skipped_and_drawn_again(tmp_path, damage, caplog):
    expected, _ = ask(tmp_path)
    lines = only_file(tmp_path).read_bytes().splitlines(keepends=True)
    if damage == "cut off":
        lines[3] = lines[3][: len(lines[3]) // 2]
    elif damage == "bit":
        middle = lines[1].index(b"logprobs") + 20
        lines[1] = lines[1][:middle] + bytes([lines[1][middle] ^ 1]) + lines[1][middle + 1 :]
    else:
        lines[0] = b"\xff\x00\n"
    only_file(tmp_path).write_bytes(b"".join(lines))
    lost = {"cut off": 3, "bit": 1, "garbage": 0}[damage]
    with caplog.at_level(logging.WARNING):
        groups, drawn = ask(tmp_path)
    assert f"rank_00000.jsonl:{lost + 1} is truncated or corrupt" in caplog.text
    assert groups == expected and drawn == [PROMPTS[lost].id]
    assert ask(tmp_path)[1] == []  # what is drawn again is not appended to a truncated line


@pytest.mark.parametrize(("stream", "step", "position"), [("train", 2, 2), ("eval", 2, -3)])
def test_journals_of_runs_that_counted_evaluations_as_negative_steps_are_replayed(tmp_path, stream, step, position):
    ask(tmp_path, sampling=changed(stream=stream, step=step))
    keys = [json.loads(line)["key"] for line in only_file(tmp_path).read_text().splitlines()]
    identities = [json.dumps(["a", [2, 0.7, 8, 5, position, 0], p.id, list(p.token_ids)]) for p in PROMPTS]
    assert keys == [xxhash.xxh3_128_hexdigest(identity.encode()) for identity in identities]


def test_every_line_is_json_that_other_tools_read(tmp_path):
    expected, _ = ask(tmp_path)
    records = [json.loads(line) for line in only_file(tmp_path).read_text().splitlines()]
    assert [record["prompt"] for record in records] == [3, 1, 4, 15]
    assert tuple(records[0]["responses"][0]["logprobs"]) == expected[0].responses[0].logprobs


def test_files_of_all_ranks_are_read_and_those_of_earlier_steps_deleted(tmp_path):
    ask(tmp_path, PROMPTS[:2])
    only_file(tmp_path).rename(tmp_path / "step_00000002.rank_00007.jsonl")
    assert ask(tmp_path)[1] == [4, 15]
    for step in (0, 1, 3):
        ask(tmp_path, sampling=changed(step=step))
    for step in (0, 2, 3):
        ask(tmp_path, sampling=changed(step=step, stream="eval"))
    (tmp_path / "notes.jsonl").write_text("")
    JournaledRollout(Engine(), tmp_path, "a").forget_before(2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "evaluation_00000002.rank_00000.jsonl",
        "evaluation_00000003.rank_00000.jsonl",
        "notes.jsonl",
        "step_00000002.rank_00000.jsonl",
        "step_00000002.rank_00007.jsonl",
        "step_00000003.rank_00000.jsonl",
    ]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_g2rl.rollout.journal._ends_a_line", full)
    with pytest.raises(OSError, match="No space left on device.*step_00000002.rank_00000.jsonl") as error:
        ask(tmp_path)
    assert error.value.errno == errno.ENOSPC


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_random_model(tmp_path_factory.mktemp("model"), head_dim=16, eos_token_id=list(range(40)))


def test_a_stopped_step_resumes_bitwise_equal_with_a_real_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_engine, "ROWS_PER_PASS", 9)  # two groups of four per pass
    lengths = [3, 17, 3, 60, 8, 21, 33, 5]
    prompts = [Prompt(i, "", tuple(DRAWS.choices(range(512), k=n)), "") for i, n in enumerate(lengths)]
    sampling = Sampling(group_size=4, temperature=0.7, max_response_tokens=24, run_seed=5, step=2)
    engine = TransformersEngine(model, dtype=torch.float32, device=torch.device("cpu"))
    undisturbed = engine.generate(RolloutRequest(prompts, sampling))
    rollout = JournaledRollout(engine, tmp_path, "a")
    with pytest.raises(RolloutStopped):
        rollout.generate(RolloutRequest(prompts, sampling, stop=stop_after(60)))  # a pass takes about 24 tokens
    # as after a kill between the two groups of a pass
    lines = only_file(tmp_path).read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    only_file(tmp_path).write_bytes(b"".join(lines[:3]))
    resumed = JournaledRollout(engine, tmp_path, "a")
    assert resumed.generate(RolloutRequest(prompts, sampling)) == undisturbed  # tokens and log-probs, bitwise
    assert len(only_file(tmp_path).read_bytes().splitlines()) == 8  # three were not drawn again
