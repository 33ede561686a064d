"""A trainer whose start fails half way closes what it had opened, the latest first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_g2rl.config import Config
from megatron_g2rl.training import trainer
from megatron_g2rl.training.trainer import Trainer

STAGES = ("Policy", "make_engine", "PeriodicEvaluation", "RunSaver", "Tracker", "dump_config")


class Part:
    """Stands for a collaborator; its name is listed when it is closed."""

    def __init__(self, name: str, closed: list[str]):
        self.close = lambda: closed.append(name)
        self.architecture = SimpleNamespace(vocab_size=10)
        self.best = None
        self.rest = self.wake = self.sleep = lambda: None
        self.hf_weights, self.load_weights = lambda: None, lambda weights: None


@pytest.fixture
def closed(monkeypatch) -> list[str]:
    """Names of the closed parts; all parts of a trainer are replaced by `Part`."""
    names: list[str] = []

    def prepare(config, runtime, folder, opened):
        opened.callback(names.append, "rewards")
        lock = SimpleNamespace(check=lambda: None)
        parts = dict(prompts=None, rewards=None, contents={}, endings=None, checkpoint=None, evaluators=[object()])
        return SimpleNamespace(lock=lock, model_path=Path("model"), **parts)

    monkeypatch.setattr(trainer, "prepare", prepare)
    monkeypatch.setattr(trainer, "Updates", lambda config, policy: None)
    monkeypatch.setattr(trainer, "JournaledRollout", lambda *arguments: Part("rollout", names))
    for name in STAGES:
        monkeypatch.setattr(trainer, name, lambda *a, name=name, **k: Part(name, names))
    monkeypatch.setattr(trainer, "dump_config", lambda config: "")
    monkeypatch.setattr(trainer, "end_on_signals", lambda: None)
    monkeypatch.setattr(trainer, "StopRequest", lambda *arguments: None)
    monkeypatch.setattr(trainer.policy_runtime, "stop", lambda: names.append("process groups"))
    return names


def start(folder: Path) -> Trainer:
    config = Config(model={"path": "m"}, data={"source": "d"}, run={"name": "r", "directory": str(folder)})
    (folder / "r").mkdir()
    display = SimpleNamespace(begin=lambda *arguments: None, phase=lambda name: None)
    return Trainer(config, SimpleNamespace(rank=0, device=torch.device("cpu")), display)


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ("Policy", ["rewards"]),
        ("make_engine", ["rewards"]),
        ("PeriodicEvaluation", ["rollout", "rewards"]),
        ("RunSaver", ["rollout", "rewards"]),
        ("Tracker", ["RunSaver", "rollout", "rewards"]),
        ("dump_config", ["Tracker", "RunSaver", "rollout", "rewards"]),
    ],
)
def test_what_was_opened_before_the_failure_is_closed(failing, expected, closed, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError(f"{failing} fails")

    monkeypatch.setattr(trainer, failing, fail)
    with pytest.raises(RuntimeError, match=f"{failing} fails"):
        start(tmp_path)
    assert closed == expected


def test_a_trainer_that_has_started_closes_everything_and_leaves_the_process_groups(closed, tmp_path):
    running = start(tmp_path)
    assert closed == []
    running.close()
    assert closed == ["Tracker", "RunSaver", "rollout", "rewards", "process groups"]
