"""Numbers of a step: what is computed from its experience, the file they go to, and the line a person reads."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_g2rl.algorithm import rollout_mismatch
from megatron_g2rl.experience import Experience
from megatron_g2rl.exploration import geometry

log = logging.getLogger(__name__)


class Clock:
    """Seconds spent in each phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """`time/PHASE_s` of every phase, and start again."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}


def experience_metrics(experience: Experience, importance_cap: float | None) -> dict[str, float]:
    """Rewards, lengths, entropy, exploration, geometry, sampler mismatch of a step: means over responses or tokens."""
    e = experience
    lengths = torch.tensor([len(r.token_ids) for r in e.responses], dtype=torch.float32)
    cut = torch.tensor([r.finish_reason == "length" for r in e.responses], dtype=torch.float32)
    correct = e.rewards > 0
    metrics = {
        "reward/mean": e.rewards.mean(),
        "reward/pass_rate": correct.float().mean(),
        "reward/shaped_mean": e.shaped.mean(),
        "reward/groups_used": e.groups_kept / len(e.groups),
        "response/count": float(len(lengths)),
        "response/tokens_mean": lengths.mean(),
        "response/tokens_max": lengths.max(),
        "response/cut_share": cut.mean(),
        "policy/entropy": torch.cat(e.scored.entropy).mean(),
    }
    if e.scores is not None:
        metrics["exploration/score_mean"] = e.scores.mean()
        metrics["exploration/score_correct"] = e.scores[correct].mean()
        metrics["exploration/score_wrong"] = e.scores[~correct].mean()
        metrics |= _geometry_metrics(e)
    metrics |= _mismatch_metrics(e, importance_cap)
    return {name: float(value) for name, value in metrics.items()}


def _geometry_metrics(e: Experience) -> dict[str, float]:
    """Means over groups of the geometry of their features."""
    stats = [geometry(e.scored.features[e.group == i]) for i in range(len(e.groups))]
    mean = lambda name: sum(float(getattr(s, name)) for s in stats) / len(stats)  # noqa: E731
    names = ("mean_cosine", "negative_share", "orthogonal_share", "effective_rank")
    return {f"geometry/{name}": mean(name) for name in names}


def _mismatch_metrics(e: Experience, cap: float | None) -> dict[str, torch.Tensor]:
    trainer = torch.cat(e.scored.logprobs)[None]
    sampler = torch.cat([torch.tensor(r.logprobs) for r in e.responses])[None]
    found = rollout_mismatch(trainer, sampler, torch.ones_like(trainer, dtype=torch.bool), cap)
    return {f"mismatch/{name}": value for name, value in found.items()}


class MetricsFile:
    """metrics.jsonl of a run: one line a step, appended and flushed; a number that is not finite is written as null."""

    def __init__(self, path: Path, first_step: int):
        """Open for a run that goes on at `first_step`; lines of later steps, from before a kill, are removed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < first_step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    log.warning("%s: left out a broken line", path)
        path.write_text("".join(f"{line}\n" for line in kept))
        self.path = path
        self.last_step: int | None = json.loads(kept[-1])["step"] if kept else None
        """Step of the newest line found."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append the line of one step."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | clean) + "\n")


def progress_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One line for a person: what a step did and how long it took."""
    parts = [
        f"step {step + 1}/{steps}",
        f"pass {metrics['reward/pass_rate']:.1%}",
        f"reward {metrics['reward/mean']:+.3f}",
        f"entropy {metrics['policy/entropy']:.3f}",
        f"tokens {metrics['response/tokens_mean']:.0f}",
    ]
    if "exploration/score_mean" in metrics:
        parts += [f"nu {metrics['exploration/score_mean']:.3f}", f"negative {metrics['geometry/negative_share']:.1%}"]
    if "update/loss" in metrics:
        parts += [f"loss {metrics['update/loss']:+.4f}", f"grad {metrics['update/gradient_norm']:.3f}"]
    parts.append(f"{metrics['time/step_s']:.1f} s ({metrics['throughput/response_tokens_per_s']:.0f} tokens/s)")
    return " | ".join(parts)
