"""Submits jobs through nemo-run; imports it, so it works in the launch environment only."""

from __future__ import annotations

import getpass
import logging
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

import invoke
import nemo_run
from nemo_run.config import get_nemorun_home
from nemo_run.core.execution.slurm import SlurmJobDetails

from g2rl_launch.job import (
    Job,
    container_variables,
    git_root,
    prologue,
    rank_script,
    sbatch_options,
    srun_options,
    variables,
)
from g2rl_launch.profile import Profile
from g2rl_launch.ssh import Tunnel, slurm_hint
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.errors import UserError

_OPTIONS = {field.name for field in fields(nemo_run.SlurmExecutor) if field.init} & {
    *nemo_run.SlurmExecutor.SBATCH_FLAGS
}
"""Options of sbatch that are fields of nemo-run's executor, with underscores."""


@dataclass(kw_only=True)
class LaunchDetails(SlurmJobDetails):
    """Directs the ranks' output to the log of their attempt, which `attempts.sh` names and `g2rl logs` shows."""

    profile: str = ""
    """The cluster profile, as JSON."""
    attempts: str = ""
    """Folder of the attempts' logs; empty while the run is not known."""

    @property
    def srun_stdout(self) -> Path:
        """Shell text, expanded where the job runs."""
        return Path('"$G2RL_SRUN_LOG"')

    @property
    def ls_term(self) -> str:
        """Arguments of `ls`; `nemo experiment logs` shows the first file it lists: the latest attempt's log."""
        return f"-t {shlex.quote(self.attempts)}/log-*.out" if self.attempts else super().ls_term


class Session:
    """The interface that nemo-run needs of a connection, implemented with `ssh`.

    Its own library (fabric) checks no host key, asks for passwords, and ignores parts of the user's configuration;
    rsync, which it starts with the address instead of the Host, would not find the host's key.
    """

    is_connected = True

    def __init__(self, tunnel: Tunnel, user: str, port: int | None):
        self.host, self.user, self.port = tunnel.host, user, port
        self._tunnel = tunnel
        # For rsync's --rsh='ssh -i ...', which rsync splits itself.
        self.connect_kwargs = {"key_filename": [f'"{tunnel.identity.expanduser()}"'] if tunnel.identity else []}

    def run(self, command: str, **options: Any) -> invoke.Result:
        """Run a command on the login node."""
        return self.local(shlex.join([*self._tunnel.ssh(), command]), **options)

    def local(self, command: str, **options: Any) -> invoke.Result:
        """Run a command on this machine."""
        return invoke.Context().run(command, in_stream=False, **options)

    def close(self) -> None:
        """Nothing: the connection ends with the process."""


class SSHTunnel(nemo_run.SSHTunnel):
    """nemo-run's tunnel with a session that uses `ssh`; nemo-run finds it by this class name."""

    def __post_init__(self):
        super().__post_init__()
        identity = Path(self.identity) if self.identity else None
        tunnel = Tunnel(kind="ssh", host=self.host, user=self.user, identity=identity)
        self.session = Session(tunnel, self.user, self.port)


def slurm_executor(profile: Profile, folder: PurePosixPath, job: Job | None = None) -> nemo_run.SlurmExecutor:
    """nemo-run's executor for jobs of a profile: their resources, container, setup, and counting of attempts.

    `folder` is the working folder of the ranks; `job`, if it is known, has the name, dependencies and logs.
    """
    options = sbatch_options(profile, job.after if job else ()) | ({"job-name": job.name} if job else {})
    options = {name.replace("-", "_"): value for name, value in options.items()}
    known = {"account": ""} | {name: value for name, value in options.items() if name in _OPTIONS}
    if profile.container_image:
        known |= {"container_image": profile.container_image, "container_env": container_variables(profile)}
    # `preflight` checks the same, with messages that name the files.
    git = nemo_run.GitArchivePackager(check_uncommitted_changes=True, check_untracked_files=True)
    return nemo_run.SlurmExecutor(
        **known,
        additional_parameters={name: value for name, value in options.items() if name not in _OPTIONS},
        container_mounts=list(profile.container_mounts),
        srun_args=srun_options(profile),
        tunnel=_tunnel(profile.tunnel),
        packager=git if profile.packager == "git" else nemo_run.Packager(),
        setup_lines="set +exv\n" + prologue(profile, folder),
        job_details=LaunchDetails(
            job_name=job.name if job else None,
            profile=profile.model_dump_json(),
            attempts=str(job.launch_folder) if job else "",
        ),
        retries=0,  # attempts.sh decides
        poll_estimated_start_time=False,
    )


def script_of(job: Job, launch_id: str) -> nemo_run.Script:
    """nemo-run's task for a run."""
    values = variables(job) | {"G2RL_LAUNCH_ID": launch_id}
    # nemo-run writes `export NAME=VALUE` unquoted, after replacing $NAME and $$ (string.Template).
    quoted = {name: shlex.quote(value).replace("$", "$$") for name, value in values.items()}
    return nemo_run.Script(inline=rank_script(job), env=quoted)


def submit(job: Job, launch_id: str) -> list[str]:
    """Submit the jobs of a run, whose attempts share `launch_id`; their ids.

    Raises UserError, with their message, if nemo-run or Slurm refuses.
    """
    with _experiment(job, launch_id, job.profile.segments) as experiment:
        experiment.run(detach=True, tail_logs=False)
        states = experiment.status(return_dict=True) or {}
        return [str(state["job_id"]) for state in states.values() if state.get("job_id")]


def dry_run(job: Job, launch_id: str) -> list[str]:
    """The texts that nemo-run would submit: the job script, and what each rank runs. Raises as `submit` does."""
    with _experiment(job, launch_id, segments=1) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment._exp_dir)
        texts = [file.read_text() for file in sorted(folder.glob("*_sbatch.sh"))][:1]
        texts += [file.read_text() for file in sorted(folder.glob("*/scripts/*.sh"))][:1]
        shutil.rmtree(folder)
        return texts


@contextmanager
def _experiment(job: Job, launch_id: str, segments: int) -> Iterator[nemo_run.Experiment]:
    """An experiment with the jobs of a run; if it fails, nemo-run's output is part of the error message."""
    _check_quoting(job.profile)
    logging.getLogger("nemo_run").setLevel(logging.ERROR)
    executor = slurm_executor(job.profile, job.folder, job)
    quiet = {"skip_status_at_exit": True, "enable_goodbye_message": False, "log_level": "ERROR"}
    output = StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output), nemo_run.Experiment(job.name, **quiet) as experiment:
            for number in range(segments):
                name = f"segment{number}" if number else "run"
                experiment.add(script_of(job, launch_id), executor=executor.clone(), name=name)
            yield experiment
    except UserError:
        raise
    except Exception as error:
        lines = [*output.getvalue().strip().splitlines(), f"{type(error).__name__}: {error}"]
        reason = "\n".join(lines[-20:])
        if isinstance(error, invoke.exceptions.UnexpectedExit):  # a command of nemo-run failed: sbatch, rsync
            reason = error.result.stderr.strip() or f"{error.result.command}: {error.result.exited}"
        raise UserError(f"the job is not submitted:\n{reason}{slurm_hint(reason)}") from error


def _tunnel(tunnel: Tunnel) -> nemo_run.LocalTunnel | SSHTunnel:
    if tunnel.kind == "local":
        return nemo_run.LocalTunnel(job_dir=str(Path(get_nemorun_home()) / "experiments"))
    settings = tunnel.settings()
    user = tunnel.user or settings.get("user") or getpass.getuser()
    identity = str(tunnel.identity) if tunnel.identity else None
    port = int(settings.get("port", 22))
    return SSHTunnel(host=tunnel.host, user=user, port=port, identity=identity, job_dir=str(tunnel.job_folder))


def _check_quoting(profile: Profile) -> None:
    """Reject folder names that nemo-run's unquoted shell commands would split."""
    folders = {"NEMORUN_HOME": str(get_nemorun_home())}
    if profile.packager == "git":
        folders["the repository"] = str(git_root())
    for what, folder in folders.items():
        if shlex.quote(folder) != folder:
            remedy = "move it to a path without spaces and special characters"
            raise ConfigError(f"{what} {folder}: nemo-run does not quote its name; {remedy}")
