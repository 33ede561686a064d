"""Cluster profiles, as `g2rl launch --dry-run` and `--render` read them."""

from __future__ import annotations

import json
import os

from tools.fuzz.case import Work, as_argument, change_yaml
from tools.fuzz.values import change_text

PROFILES = (
    {
        "account": "me", "partition": "batch", "time": "04:00:00", "nodes": 2, "gpus_per_node": 8, "mem": 0,
        "exclusive": True, "container_image": "registry#g2rl:1", "container_mounts": ["HERE:HERE"],
        "folder": "HERE", "secrets": ["HF_TOKEN"], "environment": {"NCCL_SOCKET_IFNAME": "eth0"},
        "continuation": "requeue", "stop_before_end_s": 600,
    },
    {
        "account": "a", "time": "30", "nodes": 1, "ranks_per_node": 2, "cpus_per_rank": 4,
        "setup": ["module load x", "source y"], "sbatch": {"constraint": "h100", "gres": "gpu:2"},
        "srun": ["--cpu-bind=none"], "continuation": "chain",
        "segments": 3, "retries": 2, "stop_before_end_s": 60,
    },
    {
        "account": "a", "time": "1-00:00:00", "folder": "/remote/me", "tunnel": {"kind": "ssh", "host": "cluster",
        "job_folder": "/remote/jobs"}, "servers": {"nodes": 1, "command": "vllm serve m"},
    },
)  # fmt: skip


def make(work: Work) -> None:
    """`launch --dry-run` or `--render` with a changed profile; one in six uses nemo-run, if that is installed."""
    work.copy("config.yaml", "problems.jsonl", "model")
    profile = json.loads(json.dumps(work.random.choice(PROFILES)).replace("HERE", str(work.folder)))
    work.arguments = ["launch", "config.yaml", "--cluster", "cluster.yaml"]
    work.arguments += ["--render", "job.sh"] if work.random.random() < 0.2 else ["--dry-run"]
    work.arguments += work.random.choice(([], [], [], ["--nodes", "2"], ["--segments", "2"], ["--nodes", "1000000000"]))
    if work.random.random() < 1 / 6 and (python := os.environ.get("G2RL_LAUNCH_PYTHON")):
        work.environment["G2RL_LAUNCH_PYTHON"] = python
    if work.random.random() < 0.1:
        for random in work.changes(1):
            work.arguments.append(as_argument(change_text("run.name=a", random)))
    change_yaml(work, "cluster.yaml", profile)
