"""Launch a run: read and check its configuration and profile, then show, render or submit it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table

from g2rl_launch.install import launch_python
from g2rl_launch.job import Job, check_secrets, how_to_submit, make_job, new_launch_id, render
from g2rl_launch.preflight import check_cluster, check_packed
from g2rl_launch.profile import load_profile
from g2rl_launch.run import LaunchedRun, known, launching, remember
from g2rl_launch.ssh import NoAnswer
from megatron_g2rl.config import Config
from megatron_g2rl.config.checks import check_config, module_problems
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.model_shape import ModelShape, read_model_shape
from megatron_g2rl.config.run_files import MANIFEST
from megatron_g2rl.errors import UserError

CALLER = os.environ.pop("G2RL_PYTHON", sys.executable)
"""The Python that `g2rl` was called with, which has the packages of a run."""
_FIND_MODULE = (
    "import sys; from megatron_g2rl.config.checks import module_problems; print(*module_problems(*sys.argv[1:]))"
)


class Launch:
    """A run to launch, with validated and matching configuration and profile."""

    def __init__(self, config_path: Path, overrides: Sequence[str], cluster: str, **changes: Any):
        """Read everything; `changes` override keys of the profile.

        Raises ConfigError if configuration or profile is invalid, or they do not match.
        """
        self.profile = load_profile(cluster, **changes)
        self.config: Config = load_config(config_path, overrides)
        self.shape: ModelShape | None = read_model_shape(self.config.model.path)
        self.job: Job = make_job(self.config, config_path, overrides, self.profile)
        self.config_path = config_path
        check_run(self.config, self.shape, self.job.ranks, files=self.profile.tunnel.kind == "local")

    @property
    def run(self) -> LaunchedRun:
        """The run, with the jobs of its last launch from this machine."""
        run = LaunchedRun(self.job.name, self.job.run_folder, self.profile.tunnel)
        return known(run) or run

    def write(self, file: Path) -> str:
        """Write a job script that needs neither nemo-run nor this package where it is submitted; how to submit it.

        From then on, the run can be found by its name. Raises UserError if the profile needs nemo-run, or the file
        cannot be written.
        """
        if self.profile.packager == "git":
            raise ConfigError("--render does not copy files: set packager: none, and `folder` to a checkout")
        try:
            file.write_text(render(self.job), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--render {file}: {error.strerror}") from None
        remember(self.run)
        copy = f"copy it to {self.profile.tunnel.host} and " if self.profile.tunnel.kind == "ssh" else ""
        return f"wrote {file}; {copy}{how_to_submit(self.profile, shlex.quote(str(file)))}"

    def submit(self, after: Sequence[str] = ()) -> LaunchedRun:
        """Submit the run to Slurm, to start when the jobs `after` have ended, and return it.

        Raises UserError as `prepare`, or if nemo-run is not installed, or Slurm refuses; then nothing has changed.
        """
        launch_python()
        with launching(self.job.name):
            run = self.prepare()
            run = replace(run, submitted=tuple(submit_job(replace(self.job, after=tuple(after)))))
            remember(run)
        with suppress(UserError):  # the mark of an earlier launch, which only matters until the job starts
            run.tunnel.run(["rm", "-f", str(run.launch_folder / "cancelled")])
        return run

    def prepare(self) -> LaunchedRun:
        """Check that the run may be submitted; the run as it will be recorded. Writes nothing.

        Raises UserError if the run is queued or running, files are not committed or not on the cluster, secrets are
        missing, or Slurm, or the login node, does not respond.
        """
        for check in self._checks():
            check()
        run = self.run
        try:
            queued = run.queued()
        except NoAnswer as error:
            raise UserError(
                f"{run.name} is not submitted: it was launched before, and may still be queued or running: {error}"
            ) from None
        if queued:
            raise UserError(
                f"{run.name} is already {run.state()} as job {', '.join(queued)}: `g2rl cancel {run.name}` cancels it"
            )
        return replace(run, submitted=(), earlier=run.launch_id())

    def _checks(self) -> list[Callable[[], None]]:
        """Checks of what a job needs; each raises UserError."""
        return [
            lambda: check_secrets(self.profile),
            lambda: check_packed(self.job, self.config, self.config_path),
            lambda: check_cluster(self.job, self.config, self.config_path),
        ]

    def script(self) -> str:
        """The exact text that nemo-run would submit, or the rendered one if nemo-run is not installed."""
        try:
            launch_python()
        except ConfigError:
            return render(self.job)
        from g2rl_launch import nemo

        return "\n# What each rank runs:\n".join(nemo.dry_run(self.job, new_launch_id(self.job.name)))

    def summary(self) -> Table:
        """A table of the run, its job, how it continues, its logs, its first step, and problems to fix."""
        job, profile = self.job, self.profile
        gpus = profile.gpus_per_node
        resources = [
            f"{_count(profile.nodes, 'node')} x {_count(profile.ranks_on_node, 'rank')} = {_count(job.ranks, 'rank')}",
            f"{_count(profile.servers.nodes, 'node')} more for servers" if profile.servers else "",
            f"{_count(gpus, 'GPU')} per node" if gpus else "no GPUs requested",
            f"time limit {profile.time}, asked to stop {profile.stop_before_end_s} s before it",
            f"container {profile.container_image}" if profile.container_image else "",
        ]
        chain = f"{_count(profile.segments, 'job')}, one after the other"
        how = {"requeue": "the same job again", "chain": chain, "none": "one job"}[profile.continuation]
        until = f"until trainer.steps={self.config.trainer.steps}; {_count(profile.retries, 'retry', 'retries')}"
        rows = [
            ("run", f"{job.name}, in {job.run_folder}"),
            ("job", "; ".join(filter(None, resources))),
            ("continues", f"{how} ({profile.continuation}), {until}"),
            ("logs", f"{job.launch_folder}/log-JOB-RESTART.out; g2rl logs {job.name}"),
        ]
        notes = [*device_notes(self), *self._refusals()]
        try:
            rows.append(("starts", self._start()))
            if queued := self.run.queued():
                notes.append(
                    f"{job.name} is queued or running as job {', '.join(queued)}: cancel it, or wait for its end, "
                    "before launching it again"
                )
        except NoAnswer as error:
            notes.append(str(error))
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in [*rows, *(("note", text) for text in dict.fromkeys(notes))]:
            table.add_row(*row)
        return table

    def _start(self) -> str:
        checkpoints = self.job.run_folder / "checkpoints"
        list_complete = ["sh", "-c", f'cd "$1" && ls -d step_*/{MANIFEST}', "sh", str(checkpoints)]
        folders = [file.partition("/")[0] for file in self.profile.tunnel.try_run(list_complete).split()]
        steps = [int(number) for folder in folders if (number := folder.removeprefix("step_")).isdecimal()]
        return f"after step {max(steps)}, the latest checkpoint" if steps else "at step 0: there is no checkpoint"

    def _refusals(self) -> Iterator[str]:
        """Reasons why a launch would be refused."""
        for check in [launch_python, *self._checks()]:
            try:
                check()
            except UserError as error:
                yield str(error)


def check_run(config: Config, shape: ModelShape | None, ranks: int | None, files: bool) -> None:
    """As `check_config`, with the modules that the configuration names searched for in the caller's Python."""
    check_config(config, shape, ranks=ranks, files=files, module_problems=_module_problems)


@cache
def _module_problems(key: str, module: str) -> list[str]:
    if module.startswith("megatron_g2rl.") or CALLER == sys.executable:
        return list(module_problems(key, module))
    done = subprocess.run([CALLER, "-c", _FIND_MODULE, key, module], capture_output=True, text=True)
    problem = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return [problem] if problem else []


def submit_job(job: Job) -> list[str]:
    """Submit a job through nemo-run; the ids of its segments. Raises UserError as `nemo.submit` does."""
    try:
        from g2rl_launch import nemo
    except ImportError as error:
        raise ConfigError(f"{sys.executable} cannot import nemo-run ({error}): call `g2rl launch --install`") from None
    return nemo.submit(job, new_launch_id(job.name))


def device_notes(launch: Launch) -> Iterator[str]:
    """Notes on a mismatch between the GPUs that the profile requests and `policy.device`."""
    profile, device = launch.profile, launch.config.policy.device
    if profile.gpus_per_node and device == "cpu":
        yield (
            f"the profile requests GPUs (gpus_per_node: {profile.gpus_per_node}), but policy.device=cpu uses none: "
            "set policy.device=cuda or remove gpus_per_node"
        )
    if device == "cuda" and not profile.asks_for_gpus:
        yield "policy.device=cuda, but the profile requests no GPUs: add gpus_per_node"


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"
