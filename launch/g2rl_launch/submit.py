"""Launch a run: read and check its configuration and profile, then show, render or submit it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from rich.table import Table

from g2rl_launch import registry
from g2rl_launch.install import launch_python
from g2rl_launch.job import Job, check_secrets, how_to_submit, make_job, new_launch_id, render
from g2rl_launch.preflight import check_cluster, check_packed
from g2rl_launch.profile import Profile, load_profile
from g2rl_launch.run import LaunchedRun, NoAnswer
from megatron_g2rl.config import Config
from megatron_g2rl.config.checks import check_config, module_problems
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.model_shape import ModelShape, read_model_shape
from megatron_g2rl.config.run_files import MANIFEST
from megatron_g2rl.errors import UserError

CALLER = os.environ.pop("G2RL_PYTHON", sys.executable)
"""The Python that `g2rl` was called with, which has the packages of a run."""
_SAME = ("run_folder", "tunnel")
"""Attributes by which a recorded run of the same name is the same run."""
_FIND_MODULE = (
    "import sys; from megatron_g2rl.config.checks import module_problems; print(*module_problems(*sys.argv[1:]))"
)


class Launch:
    """A run to launch, with validated and matching configuration and profile."""

    def __init__(
        self,
        config_path: Path,
        overrides: Sequence[str],
        cluster: str,
        nodes: int | None = None,
        segments: int | None = None,
    ):
        """Read everything and check what can be checked before submission.

        Raises:
            ConfigError: configuration or profile is invalid, or they do not match.
        """
        profile = load_profile(cluster)
        changes = {"nodes": nodes} if nodes else {}
        if segments:
            changes |= {"segments": segments, "continuation": "chain" if segments > 1 else profile.continuation}
        self.profile: Profile = profile.model_copy(update=changes)
        self.config: Config = load_config(config_path, overrides)
        self.shape: ModelShape | None = read_model_shape(self.config.model.path)
        self.job: Job = make_job(self.config, config_path, overrides, self.profile)
        self.config_path = config_path
        check_run(self.config, self.shape, self.job.ranks, files=self.profile.tunnel.kind == "local")

    def write(self, file: Path) -> str:
        """Write a job script that needs neither nemo-run nor this package where it is submitted; how to submit it.

        From then on, the run can be found by its name.

        Raises:
            UserError: the profile needs nemo-run, or the file cannot be written.
        """
        if self.profile.packager == "git":
            raise ConfigError("--render does not copy files: set packager: none, and `folder` to a checkout")
        try:
            file.write_text(render(self.job), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--render {file}: {error.strerror}") from None
        registry.remember(self.run)
        copy = f"copy it to {self.profile.tunnel.host} and " if self.profile.tunnel.kind == "ssh" else ""
        return f"wrote {file}; {copy}{how_to_submit(self.profile, shlex.quote(str(file)))}"

    @property
    def run(self) -> LaunchedRun:
        """The run, with the jobs of its last launch from this machine."""
        run = LaunchedRun(self.job.name, self.job.run_folder, self.profile.tunnel)
        before = registry.remembered(run.name)
        return before if before and all(getattr(before, name) == getattr(run, name) for name in _SAME) else run

    def submit(self, after: Sequence[str] = ()) -> LaunchedRun:
        """Submit the run to Slurm and return it. If it is refused, nothing has changed.

        Args:
            after: ids of jobs that have to end before it starts.

        Raises:
            UserError: nemo-run is not installed, the run is queued or running, files are not committed, secrets are
                missing, or Slurm refused or does not respond.
        """
        launch_python()
        with registry.launching(self.job.name):
            run = self.prepare()
            jobs = submit_job(replace(self.job, after=tuple(after)))
            run = replace(run, submitted=tuple(jobs))
            registry.remember(run)
        with suppress(UserError):  # the mark of an earlier launch, which only matters until the job starts
            run.run(["rm", "-f", str(run.launch_folder / "cancelled")])
        return run

    def prepare(self) -> LaunchedRun:
        """Check that the run may be submitted; the run as it will be recorded. Writes nothing.

        Raises:
            UserError: the run is queued or running, files are not committed or not on the cluster, secrets are
                missing, or Slurm, or the login node, does not respond.
        """
        check_secrets(self.profile)
        check_packed(self.job, self.config, self.config_path)
        run = self.run
        check_cluster(run, self.job, self.config, self.config_path)
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

    def script(self) -> str:
        """The exact text that nemo-run would submit, or the rendered one if nemo-run is not installed.

        Raises:
            UserError: nemo-run refused.
        """
        try:
            launch_python()
        except ConfigError:
            return render(self.job)
        from g2rl_launch import nemo

        titles = ["", "\n# What each rank runs:\n"]
        texts = nemo.dry_run(self.job, new_launch_id(self.job.name))
        return "".join(title + text for title, text in zip(titles, texts, strict=False))

    def summary(self) -> Table:
        """A table of the run, its job, how it continues, its logs, its first step, and problems to fix."""
        job = self.job
        rows = [
            ("run", f"{job.name}, in {job.run_folder}"),
            ("job", self._resources()),
            ("continues", self._continuation()),
            ("logs", f"{job.launch_folder}/log-JOB-RESTART.out; g2rl logs {job.name}"),
        ]
        notes = [*device_notes(self), *self._refusals()]
        try:
            rows.append(("starts", self._start()))
            if queued := self.run.queued():
                notes.append(f"{job.name} is queued or running as job {', '.join(queued)}; launching waits for its end")
        except NoAnswer as error:
            notes += [str(error)] * (str(error) not in notes)
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in [*rows, *(("note", text) for text in notes)]:
            table.add_row(*row)
        return table

    def _resources(self) -> str:
        profile = self.profile
        words = [
            f"{_count(profile.nodes, 'node')} x {_count(profile.ranks_on_node, 'rank')} = "
            f"{_count(self.job.ranks, 'rank')}"
        ]
        if profile.servers:
            words.append(f"{_count(profile.servers.nodes, 'node')} more for servers")
        gpus = profile.gpus_per_node
        words.append(f"{_count(gpus, 'GPU')} per node" if gpus else "no GPUs requested")
        words.append(f"time limit {profile.time}, asked to stop {profile.stop_before_end_s} s before it")
        words += [f"container {profile.container_image}"] * bool(profile.container_image)
        return "; ".join(words)

    def _continuation(self) -> str:
        profile, steps = self.profile, self.config.trainer.steps
        how = {
            "requeue": "the same job again",
            "chain": f"{_count(profile.segments, 'job')}, one after the other",
            "none": "one job",
        }[profile.continuation]
        retries = _count(profile.retries, "retry", "retries")
        return f"{how} ({profile.continuation}), until trainer.steps={steps}; {retries}"

    def _start(self) -> str:
        checkpoints = self.job.run_folder / "checkpoints"
        list_complete = ["sh", "-c", f'cd "$1" && ls -d step_*/{MANIFEST}', "sh", str(checkpoints)]
        names = [file.partition("/")[0].removeprefix("step_") for file in self.run.try_run(list_complete).split()]
        steps = [int(name) for name in names if name.isdecimal()]
        return f"after step {max(steps)}, the latest checkpoint" if steps else "at step 0: there is no checkpoint"

    def _refusals(self) -> Iterator[str]:
        """Reasons why a launch would be refused."""
        for check in (
            lambda: check_secrets(self.profile),
            lambda: check_packed(self.job, self.config, self.config_path),
            launch_python,
            lambda: check_cluster(self.run, self.job, self.config, self.config_path),
        ):
            try:
                check()
            except UserError as error:
                yield str(error)


def check_run(config: Config, shape: ModelShape | None, ranks: int | None, files: bool) -> None:
    """Check that a configuration can run.

    Args:
        config: configuration of the run.
        shape: shape of its model, if known.
        ranks: number of ranks of its job; None: `trainer.ranks`.
        files: whether the files that it names are on this machine.

    Raises:
        ConfigError: every problem.
    """
    check_config(config, shape, ranks=ranks, files=files, module_problems=_module_problems)


@cache
def _module_problems(key: str, module: str) -> list[str]:
    """`module_problems` in the caller's Python, because the launch environment lacks the packages of a run."""
    if module.startswith("megatron_g2rl.") or CALLER == sys.executable:
        return list(module_problems(key, module))
    done = subprocess.run([CALLER, "-c", _FIND_MODULE, key, module], capture_output=True, text=True)
    problem = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return [problem] if problem else []


def submit_job(job: Job) -> list[str]:
    """Submit a job through nemo-run; the ids of its segments.

    Raises:
        UserError: nemo-run or Slurm refused; with their message.
    """
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
