"""Runs `g2rl train` in forked processes, in a folder of which a test makes one part unusable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools.fuzz.forking import Outcome, preload, run_forked

SCORE = "reward.function=mine:score"
SECONDS = 300.0
"""Limit in seconds for the message, which usually takes three; no case reaches a training step."""

CONFIG = """
run: {name: run, directory: runs}
model: {path: model}
data: {source: problems.jsonl, max_prompt_tokens: 64, system_prompt: ""}
# an untrained model ends no response by itself
rollout: {engine: transformers, max_response_tokens: 8, incomplete_responses: scored}
reward: {workers: 1}
algorithm: {drop_uniform_groups: false, kl_coefficient: 0}
policy: {device: cpu, precision: fp32}
trainer: {steps: 1, prompts_per_step: 2, group_size: 2, responses_per_update: 4, tokens_per_microbatch: 256}
"""


@dataclass
class Place:
    """A working folder with a configuration, a model and problems that train without an error."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    """Called in the process of the command, before the command."""
    closing: ExitStack = field(default_factory=ExitStack)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def change_model(self, **settings: object) -> None:
        file = self.folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def make_place(folder: Path, model: Path) -> Place:
    """A folder with a copy of `model`."""
    shutil.copytree(model, folder / "model")
    made = Place(folder)
    made.write("config.yaml", CONFIG)
    rows = [{"problem": f"1+{i}=?", "answer": str(1 + i)} for i in range(8)]
    made.write("problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return made


def train(place: Place, *overrides: str, config: str = "config.yaml") -> Outcome:
    """Run `g2rl train` in a forked process."""
    preload()
    outcome = run_forked(
        ["train", config, *overrides],
        place.folder,
        place.folder.parent / f"{place.folder.name}.out",
        limit_s=SECONDS,
        environment=place.environment,
        before=place.before,
    )
    if outcome.stopped:
        pytest.fail(f"no message after {SECONDS} s:\n{outcome.text[-4000:]}")
    return outcome


def assert_one_message(outcome: Outcome, code: int, expected: tuple[str, ...]) -> None:
    assert outcome.code == code, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    for words in expected:
        assert words in outcome.text, (words, outcome.text)
