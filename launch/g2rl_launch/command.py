"""What `g2rl launch` does with a configuration and a profile; the command line hands over what was typed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from g2rl_launch import registry, submission
from g2rl_launch.job import Job, check_secrets, make_job, new_launch_id
from g2rl_launch.logs import attempt_logs, last_lines
from g2rl_launch.packed import check_packed
from g2rl_launch.profiles import Profile, load_profile
from g2rl_launch.runs import LaunchedRun, NoAnswer
from g2rl_launch.sbatch import how_to_start, render
from g2rl_launch.there import check_there
from megatron_g2rl.config import Config
from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.model_shape import ModelShape, read_model_shape
from megatron_g2rl.errors import UserError


class Launch:
    """A run that is about to be launched: its configuration and profile are read and fit each other."""

    def __init__(
        self,
        config_path: Path,
        overrides: Sequence[str],
        cluster: str,
        nodes: int | None = None,
        segments: int | None = None,
    ):
        """Read and check everything that can be checked before the queue.

        Raises:
            ConfigError: configuration or profile cannot be used, or do not fit each other.
        """
        profile = load_profile(cluster)
        changes = {"nodes": nodes} if nodes else {}
        if segments:
            changes |= {"segments": segments, "continuation": "chain" if segments > 1 else profile.continuation}
        self.profile: Profile = profile.model_copy(update=changes)
        self.config: Config = load_config(config_path, overrides)
        self.shape: ModelShape | None = read_model_shape(self.config.model.path)
        self.job: Job = make_job(self.config, config_path, overrides, self.profile)
        self.ranks = self._ranks()
        self.config_path = config_path
        check_config(self.config, self.shape, ranks=self.ranks, files=self.profile.tunnel.kind == "local")

    def _ranks(self) -> int:
        own = self.profile.executor == "local" and not self.profile.ranks_per_node
        return self.config.trainer.ranks if own else self.job.ranks

    def text(self) -> str:
        """The job script as `write` writes it."""
        return render(self.job)

    def write(self, file: Path) -> str:
        """Write a job script that needs neither nemo-run nor this package where it is submitted; what to do with it.

        From then on the run is known by its name.

        Raises:
            UserError: the profile asks for what only nemo-run does, or the file cannot be written.
        """
        if self.profile.packager == "git":
            raise ConfigError("--render copies no files: take packager: none, and `folder` with a checkout in it")
        try:
            file.write_text(self.text(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--render {file}: {error.strerror}") from None
        registry.remember(self.run)
        there = f"copy it to {self.profile.tunnel.host} and " if self.profile.tunnel.kind == "ssh" else ""
        return f"wrote {file}; {there}{how_to_start(self.profile, shlex.quote(str(file)))}"

    @property
    def run(self) -> LaunchedRun:
        """The run, with the jobs of its last launch from here."""
        run = LaunchedRun(self.job.name, self.job.run_folder, self.profile.tunnel, executor=self.profile.executor)
        before = registry.remembered(run.name)
        return before if before and all(getattr(before, name) == getattr(run, name) for name in _SAME) else run

    def submit(self, after: Sequence[str] = ()) -> tuple[LaunchedRun, dict]:
        """Submit it to Slurm; the launched run and nemo-run's answer. Refused, it leaves everything as it was.

        Args:
            after: ids of jobs that have to be over before it begins.

        Raises:
            UserError: nemo-run is not installed, the run is on its way already, files are not committed, secrets are
                missing, or Slurm refused or does not answer.
        """
        submission.launch_python()
        with registry.launching(self.job.name):
            run = self.prepare()
            job = replace(self.job, after=tuple(after))
            answer = submission.submit(submission.request_of(job, new_launch_id(job.name)))
            run = replace(run, submitted=tuple(answer["jobs"]))
            registry.remember(run)
        with suppress(UserError):  # submitted it is; marks of an earlier launch only show until its job begins
            run.demand(["rm", "-f", *(str(run.launch_folder / name) for name in ("cancelled", "local.lock"))])
        return run, answer

    def prepare(self) -> LaunchedRun:
        """Check that it may be submitted; the run as it is noted once it is. Writes nothing.

        Raises:
            UserError: the run is on its way already, files are not committed or not on the cluster, secrets are
                missing, or Slurm, or the login node, does not answer.
        """
        check_secrets(self.profile)
        check_packed(self.job, self.config, self.config_path)
        run = self.run
        check_there(run, self.job, self.config, self.config_path)
        try:
            queued = run.queued()
        except NoAnswer as error:
            raise UserError(
                f"{run.name} is not submitted: it was launched before, and whether it still is under way cannot be "
                f"found out: {error}"
            ) from None
        if queued:
            raise UserError(
                f"{run.name} is already {run.state()} as job {', '.join(queued)}: `g2rl cancel {run.name}` ends it"
            )
        return replace(run, submitted=(), earlier=run.launch_id())


_SAME = ("run_folder", "tunnel", "executor")
"""What makes a remembered run of a name the same run."""


def last_error(run: LaunchedRun, lines: int = 30) -> str:
    """The end of the newest attempt's log, and why there was no other attempt."""
    try:
        names = attempt_logs(run)
    except NoAnswer as error:
        return str(error)
    said = [f"{names[-1]}:", last_lines(run, names[-1], lines).rstrip()] if names else ["no rank has said anything"]
    return "\n".join([*said, *filter(None, [run.reason()])])
