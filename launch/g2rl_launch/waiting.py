"""Waiting for launched runs, for days if need be: patient when Slurm does not answer, and gentle to its controller."""

from __future__ import annotations

import time
from collections.abc import Callable

from g2rl_launch.runs import STOPPED, LaunchedRun, NoAnswer
from megatron_g2rl.errors import UserError

POLL_S = 3.0
"""Seconds between looks at the files of a run."""
GONE_S = 60.0
"""Seconds without a job and without an outcome after which a run is lost: over NFS a new file may be seen late."""


class Pace:
    """How often Slurm is asked: every few seconds at first, every half a minute after ten minutes."""

    def __init__(self, shortest_s: float = POLL_S, longest_s: float = 30.0):
        self._shortest_s, self._longest_s = shortest_s, longest_s
        self._began = time.monotonic()

    def pause_s(self) -> float:
        """Seconds until the next question."""
        return min(self._longest_s, max(self._shortest_s, (time.monotonic() - self._began) / 20))


class Patience:
    """Says once, not at every look, that there is no answer, and when there is one again."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._told = say, ""

    def no_answer(self, error: UserError) -> None:
        """Say that there is none, and why."""
        if str(error) != self._told:
            self._told = str(error)
            self._say(f"waiting, for nothing is known of the jobs: {error}")

    def answer(self) -> None:
        """Note that there is one."""
        if self._told:
            self._told = ""
            self._say("Slurm answers again")


class Watch:
    """Looks whether anything can still come of a run, as often as its pace allows."""

    def __init__(self, run: LaunchedRun, say: Callable[[str], None]):
        self._run, self._pace, self._patience = run, Pace(POLL_S), Patience(say)
        self._next_look, self._gone_since = 0.0, -1.0

    def no_answer(self, error: NoAnswer) -> None:
        """Say that nothing is known."""
        self._gone_since = -1.0
        self._patience.no_answer(error)

    def is_over(self) -> bool:
        """Whether the run has no jobs any more, for so long that its outcome, if there is one, can be seen.

        Raises:
            NoAnswer: Slurm does not answer.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        queued = self._run.queued()
        self._patience.answer()
        if queued:
            self._gone_since, self._next_look = -1.0, now + self._pace.pause_s()
            return False
        if self._gone_since < 0:
            self._gone_since = now
        self._run.ask(["ls", str(self._run.launch_folder)])  # NFS looks for new files when a folder is opened
        gone_s = now - self._gone_since
        return gone_s >= GONE_S or gone_s >= 3 * POLL_S and self._run.is_known_to_be_over()


def wait_for(run: LaunchedRun, say: Callable[[str], None]) -> int:
    """Wait for a run's outcome; its exit code.

    Args:
        run: has been submitted.
        say: told when Slurm stops answering, and when it answers again.

    Raises:
        UserError: its jobs are gone without an outcome.
    """
    watch = Watch(run, say)
    while True:
        try:
            over = watch.is_over()
            ended = run.outcome()
            if ended:
                return ended[1]
            if over:
                return _code_without_outcome(run)
        except NoAnswer as error:
            watch.no_answer(error)
        time.sleep(POLL_S)


def _code_without_outcome(run: LaunchedRun) -> int:
    if run.was_cancelled():
        return 1
    if run.segments_used_up():
        return STOPPED
    if run.executor == "local":
        raise UserError(f"{run.name} was killed and left no outcome; look at {run.launch_folder}")
    jobs = run.submitted or run.jobs()
    asked = [run.ask(["sacct", "-nXP", "-oJobID,State,ExitCode", f"-j{job}"]).strip() for job in jobs]
    states = ", ".join(filter(None, asked)) or "no accounting"
    raise UserError(
        f"the jobs of {run.name} are gone and left no outcome ({states}): cancelled, or at their time limit "
        f"before they could save; look at {run.launch_folder}"
    )
