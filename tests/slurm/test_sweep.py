"""A sweep on a real Slurm: killed while submitting and started again, it completes every run once, two at a time."""

from __future__ import annotations

import re
import signal
import threading
from collections import Counter

from quickstart_model import quickstart_model
from slurm_jobs import CONFIG, SMALL, ended, metrics, read

SWEEP = """
config: {config}
cluster: site.yaml
concurrency: 2
name: seed{{run.seed}}
overrides: {overrides}
grid:
  run.seed: [0, 1, 2, 3]
"""


def test_a_killed_and_restarted_sweep_completes_every_run_once_and_at_most_two_at_a_time(g2rl, nemo_run, tmp_path):
    overrides = [
        *SMALL,
        f"model.path={quickstart_model()}",
        f"run.directory={tmp_path}",
        "trainer.steps=2",
        "checkpoint.every_steps=1",
    ]
    (tmp_path / "many.yaml").write_text(SWEEP.format(config=CONFIG, overrides=overrides))
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], len(read("squeue", "--noheader", "--states=RUNNING,COMPLETING").splitlines()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        killed = g2rl("sweep", "many.yaml", nodes=1, stop_before_end_s=30)
        for line in killed.stdout:
            if line.startswith("seed1: job "):
                killed.kill()  # while the third is submitted
        assert killed.wait() == -signal.SIGKILL, "it was over before it could be killed"
        code, output = ended(g2rl("sweep", "many.yaml", "--wait", nodes=1, stop_before_end_s=30))
    finally:
        done.set()
        watcher.join()
    assert code == 0 and "4 finished" in output, output
    assert most[0] == 2
    for seed in range(4):
        assert len(metrics(tmp_path / f"seed{seed}")) == 2
        assert re.search(rf"seed{seed} .* finished .* 2/2 .* 0/3 ", output), output
    names = read("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobName").splitlines()
    assert {name: times for name, times in Counter(names).items() if name.startswith("seed")} == {
        f"seed{seed}": 1 for seed in range(4)
    }
