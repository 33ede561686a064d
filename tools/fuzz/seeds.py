"""The valid files that cases start from: a small model, problems, and the results of a run and a conversion."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.fuzz.forking import run_forked

CONFIG: dict[str, dict[str, Any]] = {
    "run": {"name": "run", "directory": "runs"},
    "model": {"path": "model"},
    "data": {"source": "problems.jsonl", "max_prompt_tokens": 64, "system_prompt": ""},
    "rollout": {"engine": "transformers", "max_response_tokens": 8},
    "reward": {"workers": 1},
    "algorithm": {"drop_uniform_groups": False, "kl_coefficient": 0},
    "policy": {"device": "cpu", "precision": "fp32"},
    "trainer": {
        "steps": 1,
        "prompts_per_step": 2,
        "group_size": 2,
        "responses_per_update": 4,
        "tokens_per_microbatch": 256,
    },
}
"""A run that takes about a second."""
BOUNDS = {
    "rollout.engine": "transformers",
    "rollout.max_response_tokens": 8,
    "policy.device": "cpu",
    "trainer.ranks": 1,
    "trainer.steps": 1,
    "trainer.prompts_per_step": 2,
    "trainer.group_size": 2,
    "trainer.responses_per_update": 4,
    "trainer.epochs_per_step": 1,
    "algorithm.dynamic_sampling_rounds": 0,
    "reward.workers": 1,
}
"""Upper bounds of the keys that make a run longer or larger: a long run is valid, but takes too long for a case."""
ROWS = [{"problem": f"1+{i}=?", "answer": str(1 + i)} for i in range(8)]
RUN_OVERRIDES = ("trainer.steps=2", "checkpoint.every_steps=1", "evaluation.source=test.jsonl",
                 "evaluation.prompts=2", "evaluation.responses_per_prompt=2", "evaluation.every_steps=1")  # fmt: skip


def environment_of(folder: Path) -> dict[str, str | None]:
    """Environment of a command in `folder`: it writes only there, and cannot reach the network."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name in ("ssh", "rsync"):
        (bin_folder / name).write_text("#!/bin/sh\necho no network >&2\nexit 255\n")
        (bin_folder / name).chmod(0o755)
    return {
        "HOME": str(home),
        "TMPDIR": str(folder / "tmp"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_STATE_HOME": str(home / "state"),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "G2RL_LAUNCH_PYTHON": None,
    }


class Seeds:
    """Folders that cases copy; created once."""

    def __init__(self, folder: Path):
        """Create them in `folder`, which is empty.

        Raises:
            RuntimeError: a valid command failed.
        """
        from megatron_g2rl.data.tiny_model import TinyModel, make_random_model

        self.folder, self.work = folder, folder / "work"
        self.work.mkdir(parents=True)
        size = TinyModel(hidden=64, layers=2, heads=2, key_value_heads=1, mlp_hidden=96)
        self.model = make_random_model(self.work / "model", "qwen3", size=size)
        self.rows = ROWS
        self.write_rows("problems.jsonl", ROWS)
        self.write_rows("test.jsonl", [{"problem": f"2+{i}=?", "answer": str(2 + i)} for i in range(4)])
        (self.work / "config.yaml").write_text(json.dumps(CONFIG))
        self._run(["train", "config.yaml", *RUN_OVERRIDES], keep_journal=True)
        self.run = self.work / "runs" / "run"
        self._run(["convert", "hf-to-megatron", "model", "converted"])
        self.converted = self.work / "converted"

    def write_rows(self, name: str, rows: Sequence[dict]) -> None:
        """Write problems as JSON lines."""
        (self.work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _run(self, arguments: list[str], *, keep_journal: bool = False) -> None:
        outcome = run_forked(
            arguments,
            self.work,
            self.folder / "output.txt",
            limit_s=300,
            environment=environment_of(self.folder),
            before=_keep_journal if keep_journal else None,
        )
        if outcome.code:
            raise RuntimeError(f"g2rl {' '.join(arguments)} failed ({outcome.code}):\n{outcome.text[-4000:]}")


def _keep_journal() -> None:
    from megatron_g2rl.rollout.journal import JournaledRollout

    JournaledRollout.forget_before = lambda self, step: None
