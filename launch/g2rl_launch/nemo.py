"""Hands jobs to nemo-run, in whichever environment has it: `python -m g2rl_launch.nemo REQUEST ANSWER`.

nemo-run's pins do not go together with vLLM's, so this module runs in an environment of its own, reads a request (JSON,
made by `request_of` in `submission`), imports nemo_run alone, and writes an answer. Its template makes the job script;
what counts attempts and decides how a run goes on stands in the request's `setup` and works without nemo-run.
"""

from __future__ import annotations

import getpass
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import invoke
import nemo_run
from nemo_run.config import get_nemorun_home
from nemo_run.core.execution.slurm import SlurmJobDetails

from g2rl_launch.ssh import Ssh
from megatron_g2rl.errors import UserError


@dataclass(kw_only=True)
class LaunchDetails(SlurmJobDetails):
    """Sends what ranks say to the log of their attempt, which `attempts.sh` names and `g2rl logs` shows."""

    @property
    def srun_stdout(self) -> Path:
        """Shell text, expanded where the job runs."""
        return Path('"$G2RL_SRUN_LOG"')


class Session:
    """What nemo-run asks of a connection, by way of `ssh`.

    Its own library (fabric) would check no host key, ask for passwords, and not know all of the user's configuration;
    rsync, which it starts with the address instead of the Host, would not find the host's key.
    """

    is_connected = True

    def __init__(self, ssh: Ssh, port: int | None):
        self.ssh, self.host, self.user, self.port = ssh, ssh.host, ssh.user, port
        # For rsync's --rsh='ssh -i ...', which rsync takes apart.
        key = [f'"{Path(ssh.identity).expanduser()}"'] if ssh.identity else []
        self.connect_kwargs = {"key_filename": key}

    def run(self, command: str, **options: Any) -> invoke.Result:
        """Run a command there."""
        return self.local(shlex.join([*self.ssh.words(), command]), **options)

    def local(self, command: str, **options: Any) -> invoke.Result:
        """Run a command here."""
        return invoke.Context().run(command, in_stream=False, **options)

    def close(self) -> None:
        """Nothing: the connection ends with the process."""


class SSHTunnel(nemo_run.SSHTunnel):
    """nemo-run's, with the session made by `ssh`; nemo-run knows it by this name."""

    def __post_init__(self):
        super().__post_init__()
        self.session = Session(Ssh(self.host, self.user, self.identity), self.port)


def hand_over(request: dict[str, Any]) -> dict[str, Any]:
    """Submit, or with `dry_run` only make, the jobs of a request; the answer has their ids, or the script's text."""
    task = nemo_run.Script(inline=request["script"])
    with nemo_run.Experiment(
        request["name"], skip_status_at_exit=True, enable_goodbye_message=False, log_level="ERROR"
    ) as experiment:
        for number in range(request["segments"]):
            experiment.add(task, executor=_executor(request), name=f"segment{number}" if number else "run")
        if request["dry_run"]:
            experiment.dryrun(log=False, delete_exp_dir=False)
            folder = Path(experiment._exp_dir)
            texts = [file.read_text() for file in sorted(folder.glob("*_sbatch.sh"))][:1]
            texts += [file.read_text() for file in sorted(folder.glob("*/scripts/*.sh"))][:1]
            shutil.rmtree(folder)
            return {"texts": texts}
        local = request["executor"] == "local"
        experiment.run(detach=not local, tail_logs=local)
        found = experiment.status(return_dict=True) or {}
        jobs = [str(state["job_id"]) for state in found.values() if state.get("job_id")]
        return {"experiment": experiment._id, "jobs": jobs, "folder": str(experiment._exp_dir)}


def _executor(request: dict[str, Any]) -> nemo_run.Executor:
    if request["executor"] == "local":
        return nemo_run.LocalExecutor(ntasks_per_node=1)
    tunnel = request["tunnel"]
    if tunnel["kind"] == "ssh":
        ssh = Ssh(tunnel["host"], tunnel["user"], tunnel["identity"])
        settings = ssh.settings()  # empty when ssh cannot read the user's configuration: it reports that on connecting
        user, port = tunnel["user"] or settings.get("user") or getpass.getuser(), int(settings.get("port", 22))
        where = SSHTunnel(host=ssh.host, user=user, port=port, identity=ssh.identity, job_dir=tunnel["job_folder"])
    else:
        where = nemo_run.LocalTunnel(job_dir=str(Path(get_nemorun_home()) / "experiments"))
    # The guard is checked twice: `g2rl launch` says which files it is about.
    git = nemo_run.GitArchivePackager(check_uncommitted_changes=True, check_untracked_files=True)
    executor = nemo_run.SlurmExecutor(
        **request["slurm"],
        tunnel=where,
        packager=git if request["packager"] == "git" else nemo_run.Packager(),
        setup_lines=request["setup"],
        job_details=LaunchDetails(job_name=request["name"]),
        retries=0,  # attempts.sh decides
        poll_estimated_start_time=False,
    )
    return executor


def _unquoted_folders(request: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Folders here that stand in shell commands of nemo-run's as they are."""
    if request["executor"] == "local":
        return
    yield "NEMORUN_HOME", str(get_nemorun_home())
    if request["packager"] == "git":
        root = invoke.Context().run("git rev-parse --show-toplevel", hide=True, in_stream=False).stdout.strip()
        yield "the repository", root


def main() -> int:
    """Read a request, write an answer, which is what a command of nemo-run's said when that failed (sbatch, rsync)."""
    logging.basicConfig(level=logging.ERROR)
    request, answer = map(Path, sys.argv[1:])
    asked = json.loads(request.read_text())
    unusable = [f"{what} {folder}: nemo-run does not quote its name; move it to one without spaces and signs"
                for what, folder in _unquoted_folders(asked) if shlex.quote(folder) != folder]  # fmt: skip
    try:
        found = {"error": "\n".join(unusable)} if unusable else hand_over(asked)
    except UserError as error:
        found = {"error": str(error)}
    except invoke.exceptions.UnexpectedExit as error:
        found = {"error": error.result.stderr.strip() or f"{error.result.command}: {error.result.exited}"}
    answer.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    # Saved with the job and read again by name: the class must not be __main__'s.
    from g2rl_launch import nemo

    sys.exit(nemo.main())
