"""What `g2rl launch --dry-run` shows of a launch: what would happen, in a few lines, and the exact job script."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.table import Table

from g2rl_launch import submission
from g2rl_launch.command import Launch
from g2rl_launch.job import new_launch_id
from g2rl_launch.packed import check_packed
from g2rl_launch.runs import NoAnswer
from g2rl_launch.there import check_there
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.errors import UserError


def summary(launch: Launch) -> Table:
    """The run, its job, how it goes on, where its logs will be, what it resumes from, and what is not right yet."""
    job = launch.job
    rows = [
        ("run", f"{job.name}, in {job.run_folder}"),
        ("job", _job(launch)),
        ("goes on", _continuation(launch)),
        ("logs", f"{job.launch_folder}/log-JOB-RESTART.out; g2rl logs {job.name}"),
    ]
    notes = [*device_notes(launch), *_missing(launch)]
    try:
        check_there(launch.run, job, launch.config, launch.config_path)
    except UserError as error:
        notes.append(str(error))
    try:
        rows.append(("begins", _begin(launch)))
        notes += _under_way(launch)
    except NoAnswer as error:
        notes += [str(error)] * (str(error) not in notes)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in [*rows, *(("note", text) for text in notes)]:
        table.add_row(*row)
    return table


def script(launch: Launch) -> str:
    """The exact text that nemo-run would submit, or, where there is none, the rendered one."""
    try:
        submission.launch_python()
    except ConfigError:
        return launch.text()
    request = submission.request_of(launch.job, new_launch_id(launch.job.name), dry_run=True)
    if launch.profile.executor == "local":
        return request["script"]
    titles = ["", "\n# What each rank runs:\n"]
    texts = submission.submit(request)["texts"]
    return "".join(title + text for title, text in zip(titles, texts, strict=False))


def device_notes(launch: Launch) -> Iterator[str]:
    """GPUs that are asked for and not used, or used and not asked for."""
    profile, device = launch.profile, launch.config.policy.device
    if profile.executor == "local":
        return
    if profile.gpus_per_node and device == "cpu":
        yield (
            f"the profile asks for GPUs (gpus_per_node: {profile.gpus_per_node}), and policy.device=cpu uses none: "
            "set policy.device=cuda or take gpus_per_node out"
        )
    asked = profile.gpus_per_node or any("gpu" in f"{name}={value}" for name, value in profile.sbatch.items())
    if device == "cuda" and not asked:
        yield "policy.device=cuda, and the profile asks for no GPUs: add gpus_per_node"


def _job(launch: Launch) -> str:
    profile = launch.profile
    if profile.executor == "local":
        return f"on this machine, {_many(launch.ranks, 'rank')}"
    words = [f"{_many(profile.nodes, 'node')} x {_many(profile.ranks_on_node, 'rank')} = {_many(launch.ranks, 'rank')}"]
    if profile.servers:
        words.append(f"{_many(profile.servers.nodes, 'node')} more for servers")
    words.append(f"{_many(profile.gpus_per_node, 'GPU')} a node" if profile.gpus_per_node else "no GPUs asked for")
    words.append(f"time limit {profile.time}, told to stop {profile.stop_before_end_s} s before it")
    words += [f"container {profile.container_image}"] * bool(profile.container_image)
    return "; ".join(words)


def _continuation(launch: Launch) -> str:
    profile, steps = launch.profile, launch.config.trainer.steps
    how = {
        "requeue": "the same job again",
        "chain": f"{_many(profile.segments, 'job')}, one after the other",
        "none": "one job",
    }[profile.continuation]
    return f"{how} ({profile.continuation}), until trainer.steps={steps}; {_many(profile.retries, 'retry', 'retries')}"


def _begin(launch: Launch) -> str:
    checkpoints = launch.job.run_folder / "checkpoints"
    # A checkpoint is complete when its manifest is there.
    found = launch.run.ask(["sh", "-c", 'cd "$1" && ls -d step_*/manifest.json', "sh", str(checkpoints)]).split()
    steps = [int(text) for text in (name.partition("/")[0].removeprefix("step_") for name in found) if text.isdecimal()]
    return f"after step {max(steps)}, the newest checkpoint" if steps else "at step 0: there is no checkpoint"


def _missing(launch: Launch) -> Iterator[str]:
    """What a launch would be refused for."""
    missing = [name for name in launch.profile.secrets if not os.environ.get(name)]
    if missing and launch.profile.tunnel.kind == "local":
        yield f"not set in this environment, and needed to launch: {', '.join(missing)} (secrets: of the profile)"
    for check in (lambda: check_packed(launch.job, launch.config, launch.config_path), submission.launch_python):
        try:
            check()
        except ConfigError as error:
            yield str(error)


def _under_way(launch: Launch) -> Iterator[str]:
    queued = launch.run.queued()
    if queued:
        yield f"{launch.job.name} is under way as job {', '.join(queued)}; it cannot be launched until that is over"


def _many(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"
