"""Runs rendered job scripts with bash, and stand-ins for Slurm's commands and for g2rl."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from g2rl_launch.job import Job
from g2rl_launch.profile import Profile

HOSTILE = [
    "a b",
    "it's",
    'say "no"',
    "$HOME",
    "$(touch x)",
    "`id`",
    "two\nlines",
    "back\\slash\\n",
    "*",
    "",
    "é;&|<>!#~%j",
]

PROGRAM = """
import json, os, pathlib, sys
run = pathlib.Path(os.environ["G2RL_RUN"])
calls = run / "calls"
number = len(calls.read_text().split()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(f"{number} ")
plan = json.loads(os.environ["PLAN"])
code, step = plan[min(number, len(plan) - 1)]
(run / "seen.json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
if step:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
if "JOURNAL" in os.environ:
    (run / "rollouts").mkdir(exist_ok=True)
    with (run / "rollouts" / "step_0.rank_0.jsonl").open("a") as file:
        file.write("{}\\n")
print(os.environ.get("REPORT", f"attempt {number} reports a reason: code {code}").replace(" / ", "\\n"))
sys.exit(code)
"""


SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] && touch {0}/requeued && echo "$@"
"""
"""Knows no jobs; `run_script` repeats a job for which a requeue was requested."""


def command(folder: Path, name: str, text: str) -> None:
    """A command on the PATH of job scripts."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


def job(folder: Path, plan: list, arguments=("train",), **settings) -> Job:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    program = shlex.join([sys.executable, str(folder / "program.py")])
    command(folder, "g2rl", f'#!/bin/bash\nexec {program} "$@"\n')
    command(folder, "srun", SRUN)
    command(folder, "scontrol", SCONTROL.format(shlex.quote(str(folder))))
    environment = {"PLAN": json.dumps(plan), **settings.pop("environment", {})}
    return Job("run", folder / "run", folder, tuple(arguments), Profile(environment=environment, **settings))


def run_script(
    folder: Path, text: str, name: str = "job.sh", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Run a job script as Slurm runs job 7, with the requeues it requests; returns its output and the attempts'."""
    cwd = cwd or folder
    (cwd / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"SLURM_JOB_ID": "7", "PATH": f"{folder}/bin:{os.environ['PATH']}"} | variables
    for restart in range(20):
        environment["SLURM_RESTART_COUNT"] = str(restart)
        done = subprocess.run(["bash", name], env=environment, capture_output=True, text=True, timeout=300, cwd=cwd)
        if not (folder / "requeued").exists():
            break
        (folder / "requeued").unlink()
    done.stdout += log(folder)
    return done


def outcome(folder: Path) -> str:
    return (folder / "run" / "launch" / "outcome").read_text().strip()


def log(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted((folder / "run" / "launch").glob("log-*.out")))


def calls(folder: Path) -> int:
    return len((folder / "run" / "calls").read_text().split())


def reason(folder: Path) -> str:
    return (folder / "run" / "launch" / "reason").read_text()


def fake_scontrol(folder: Path, message: str) -> None:
    """`scontrol show job` prints this; `scontrol requeue` ends the program that writes its process id to `folder`/pid.

    It waits for that file: the program may still be starting.
    """
    text = f"""#!/bin/bash
if [ "$1" = requeue ]; then
    echo "$@"
    until [ -s {folder}/pid ]; do sleep 0.1; done
    kill $(cat {folder}/pid)
    exit
fi
echo "JobId=7 {message} "
"""
    command(folder, "scontrol", text)
