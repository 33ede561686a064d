"""Sweep files, as `g2rl sweep --dry-run` reads them."""

from __future__ import annotations

from tools.fuzz.case import Work, change_yaml

SWEEPS = (
    {
        "config": "config.yaml", "cluster": "cluster.yaml", "concurrency": 2,
        "name": "lr{optimizer.learning_rate}_seed{run.seed}", "overrides": ["trainer.steps=1"],
        "grid": {"optimizer.learning_rate": [1e-4, 3e-4], "run.seed": [0, 1]},
    },
    {
        "config": "config.yaml", "cluster": "cluster.yaml", "concurrency": 1,
        "runs": [{"run.seed": 0}, {"run.seed": 1, "algorithm.kl_coefficient": 0.1}, {"data.template": "plain"}],
    },
    {"config": "config.yaml", "grid": {"run.seed": list(range(20))}},
)  # fmt: skip


def make(work: Work) -> None:
    """`sweep --dry-run` of a changed sweep."""
    work.copy("config.yaml", "problems.jsonl", "model")
    (work.folder / "cluster.yaml").write_text("account: a\ntime: 60\n")
    work.arguments = ["sweep", "sweep.yaml", "--dry-run"]
    work.arguments += work.random.choice(([], ["--cluster", "cluster.yaml"], ["--retry-failed"]))
    change_yaml(work, "sweep.yaml", work.random.choice(SWEEPS))
