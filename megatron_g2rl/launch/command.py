"""What `g2rl launch`, `status`, `logs` and `cancel` do; the command line hands over what was typed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from megatron_g2rl.config import Config
from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.model_shape import ModelShape, read_model_shape
from megatron_g2rl.errors import UserError
from megatron_g2rl.launch import runs, submission
from megatron_g2rl.launch.job import Job, check_secrets, make_job, new_launch_id
from megatron_g2rl.launch.profiles import Profile, load_profile
from megatron_g2rl.launch.sbatch import render


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
        check_config(self.config, self.shape, ranks=self.ranks)

    def _ranks(self) -> int:
        own = self.profile.executor == "local" and not self.profile.ranks_per_node
        return self.config.trainer.ranks if own else self.job.ranks

    def text(self) -> str:
        """The job script as `write` writes it."""
        return render(self.job)

    def write(self, file: Path) -> None:
        """Write a job script that needs neither nemo-run nor this package where it is submitted.

        Raises:
            ConfigError: the profile asks for what only nemo-run does.
        """
        if self.profile.packager == "git":
            raise ConfigError("--render copies no files: take packager: none, and `folder` with a checkout in it")
        if self.profile.segments > 1:
            raise ConfigError(
                f"--render writes one job; submit the file {self.profile.segments} times, with continuation: chain, "
                "instead of --segments"
            )
        file.write_text(self.text(), encoding="utf-8")

    def preview(self) -> str:
        """The exact text that nemo-run would submit, or, where there is none, the rendered one."""
        try:
            submission.launch_python()
        except ConfigError:
            return "# nemo-run is not installed: this is what --render writes.\n" + self.text()
        request = submission.request_of(self.job, new_launch_id(self.job.name), dry_run=True)
        if self.profile.executor == "local":
            return request["script"]
        titles = ["", "\n# What each rank runs:\n"]
        texts = submission.submit(request)["texts"]
        return "".join(title + text for title, text in zip(titles, texts, strict=False))

    @property
    def run(self) -> runs.LaunchedRun:
        """The run, with the jobs of its last launch from here."""
        run = runs.LaunchedRun(self.job.name, self.job.run_folder, self.profile.tunnel)
        before = runs.remembered(run.name)
        return before if before and (before.run_folder, before.tunnel) == (run.run_folder, run.tunnel) else run

    def submit(self, after: Sequence[str] = ()) -> tuple[runs.LaunchedRun, dict]:
        """Submit it; the launched run and nemo-run's answer.

        Args:
            after: ids of jobs that have to be over before it begins.

        Raises:
            UserError: the run is on its way already, files are not committed, secrets are missing, or Slurm refused.
        """
        run = self.prepare()
        job = replace(self.job, after=tuple(after))
        answer = submission.submit(submission.request_of(job, new_launch_id(job.name)))
        submitted = tuple(answer["jobs"]) if self.profile.executor == "slurm" else ()
        run = runs.LaunchedRun(run.name, run.run_folder, run.tunnel, submitted)
        runs.remember(run)
        return run, answer

    def prepare(self) -> runs.LaunchedRun:
        """Check that it may be submitted, make its folder and forget how an earlier launch ended.

        Raises:
            UserError: the run is on its way already, files are not committed, or secrets are missing.
        """
        check_secrets(self.profile)
        submission.check_packed(self.job)
        run = self.run
        queued = run.queued()
        if queued:
            raise UserError(
                f"{run.name} is already {run.state()} as job {', '.join(queued)}: `g2rl cancel {run.name}` ends it"
            )
        run.ask(["mkdir", "-p", str(run.launch_folder)])
        # Left over from an earlier launch, it would be taken for the outcome of this one.
        run.ask(["rm", "-f", *(str(run.launch_folder / name) for name in ("outcome", "cancelled", "jobs"))])
        run = replace(run, submitted=())
        runs.remember(run)
        return run


def last_error(run: runs.LaunchedRun, lines: int = 30) -> str:
    """The end of the newest attempt's log, and why there was no other attempt."""
    logs = list(run.logs())
    said = [f"{logs[-1][0]}:", *logs[-1][1].rstrip().splitlines()[-lines:]] if logs else ["no rank has said anything"]
    return "\n".join([*said, *filter(None, [run.reason()])])


def status_table(names: Sequence[str]) -> Table:
    """How runs stand, a line each.

    Raises:
        UserError: one was never launched.
    """
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "phase", "attempts", "retries spent", "jobs"):
        table.add_column(title)
    for run in map(runs.find, names):
        where, attempts = run.step(), run.attempts()
        spent = attempts[-1][-1] if attempts else "0"
        cells = [run.name, run.state(), str(where.get("step", "-")), str(where.get("phase") or "-"), str(len(attempts))]
        table.add_row(*cells, spent, " ".join(run.jobs()) or "-")
    return table


def all_logs(run: runs.LaunchedRun) -> Iterator[str]:
    """Text of all attempts, each under a line that names it.

    Raises:
        UserError: there is none yet.
    """
    shown = False
    for name, text in run.logs():
        shown = True
        yield f"==> {name} <==\n{text.rstrip()}"
    if not shown:
        raise UserError(f"{run.name} has no log yet: it is {run.state()} ({run.queued() or 'no job in the queue'})")
