"""From a job to a submitted one: the request that nemo-run gets, and the Python that has nemo-run."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import megatron_g2rl
from g2rl_launch.job import RANK, Job, prologue
from g2rl_launch.runs import hint_of
from g2rl_launch.sbatch import (
    container_names,
    continuation_options,
    cpus_per_task,
    render,
    servers_text,
    srun_options,
    tasks_per_node,
)
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.errors import UserError

REQUIREMENTS = ("nemo-run>=0.11,<0.12", "leptonai<0.40", "invoke", "pydantic>=2.7", "pyyaml", "rich")
"""What the launch environment holds; a newer leptonai breaks nemo-run's import."""


def request_of(job: Job, launch_id: str, dry_run: bool = False) -> dict[str, Any]:
    """What `nemo.hand_over` is to do for a job, as plain data.

    Args:
        job: what runs.
        launch_id: what its attempts have in common.
        dry_run: make the script only.
    """
    profile = job.profile
    request = {"name": job.name, "executor": profile.executor, "segments": 1, "dry_run": dry_run}
    if profile.executor == "local":
        return request | {"script": render(job, launch_id)}
    slurm = dict(
        account=profile.account or "",
        partition=profile.partition,
        qos=profile.qos,
        time=profile.time,
        nodes=profile.all_nodes,
        ntasks_per_node=tasks_per_node(profile),
        cpus_per_task=cpus_per_task(profile),
        gpus_per_node=profile.gpus_per_node,
        mem=profile.mem,
        exclusive=profile.exclusive or None,
        container_image=profile.container_image,
        container_mounts=list(profile.container_mounts),
        container_env=container_names(job) if profile.container_image else None,
        srun_args=srun_options(profile),
        additional_parameters=_more_options(job),
    )
    return request | {
        "segments": profile.segments,
        "slurm": {name: value for name, value in slurm.items() if value is not None},
        "tunnel": profile.tunnel.model_dump(mode="json"),
        "packager": profile.packager,
        "setup": "\n".join(["set +exv", prologue(job, launch_id), servers_text(job)]),
        "script": rank_script(job),
    }


def rank_script(job: Job) -> str:
    """What nemo-run starts for each rank: arguments stand in the text, quoted once, whatever the launcher does."""
    if job.profile.packager == "git":
        where = 'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"'  # the copy of HEAD
    else:
        where = f"cd {shlex.quote(str(job.folder))} || exit 1"
    return f"{where}\nset -- {job.rank_line()}\n{RANK}"


def submit(request: dict[str, Any]) -> dict[str, Any]:
    """Let nemo-run do what a request says; its answer.

    Raises:
        UserError: there is no nemo-run, or it refused.
    """
    python = launch_python()
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        packages = [str(Path(file).parents[1]) for file in (megatron_g2rl.__file__, __file__)]
        path = os.pathsep.join(filter(None, [*packages, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
        local = request["executor"] == "local" and not request["dry_run"]
        done = subprocess.run(
            [python, "-m", "g2rl_launch.nemo", str(asked), str(answer)],
            env=environment,
            text=True,
            start_new_session=local,  # Ctrl-C is ours to hand on: nemo-run would kill what saves
            stdout=None if local else subprocess.PIPE,
            stderr=None if local else subprocess.STDOUT,
        )
        if done.returncode or not answer.is_file():
            said = (done.stdout or "").strip().splitlines()
            raise UserError("\n".join(["the job is not submitted:", *said[-20:]]))
        found = json.loads(answer.read_text())
        if "error" in found:
            raise UserError(f"the job is not submitted:\n{found['error']}{hint_of(found['error'])}")
        return found


def launch_python() -> str:
    """The Python that imports nemo_run: this one, $G2RL_LAUNCH_PYTHON, or that of `g2rl launch --install`.

    Raises:
        ConfigError: there is none.
    """
    if importlib.util.find_spec("nemo_run"):
        return sys.executable
    own = os.environ.get("G2RL_LAUNCH_PYTHON")
    if own:
        if not Path(own).is_file():
            raise ConfigError(
                f"nemo-run is not installed: G2RL_LAUNCH_PYTHON={own} is no file. Unset it and call "
                "`g2rl launch --install`, or write the job script with --render FILE"
            )
        return own
    installed = launch_venv() / "bin" / "python"
    if installed.is_file():
        return str(installed)
    raise ConfigError(
        "nemo-run is not installed. `g2rl launch --install` puts it into an environment of its own; or set "
        "G2RL_LAUNCH_PYTHON to a Python that has it; or write the job script with --render FILE and sbatch it"
    )


def launch_venv() -> Path:
    """Folder of the environment that `install` makes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "g2rl" / "launch"


def install() -> Path:
    """Make the launch environment; its folder.

    Raises:
        UserError: pip failed; its last lines.
    """
    folder = launch_venv()
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()[-10:]
            raise UserError("\n".join([f"{shlex.join(command)} failed:", *said]))
    return folder


def _more_options(job: Job) -> dict[str, Any]:
    found = {name: True if value is None else value for name, value in continuation_options(job)}
    found |= {
        name: True if value is None else value for name, value in job.profile.sbatch.items() if value is not False
    }
    return {name.replace("-", "_"): value for name, value in found.items()} | {"job_name": job.name}
