"""Cluster profiles: YAML files that describe how to run jobs on a cluster (launch/README.md, launch/clusters).

A profile is given by its file, or by its name if it is in the user's folder of profiles (`profile_folder`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from g2rl_launch.ssh import Line, Tunnel
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.reading import Format, read_model
from megatron_g2rl.config.sections.base import NonNegative, Positive, Section
from megatron_g2rl.config.source import Entry

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Time = Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")]

SIGNAL_EARLY_S = 60
"""Slurm may send the signal before a time limit up to a minute early."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY$|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)


class Servers(Section):
    """Nodes of the job that generate rollouts instead of training."""

    nodes: Positive
    """Nodes for servers, in addition to the profile's `nodes`."""
    command: Line
    """Shell line that runs on each of them, in `folder`: `vllm serve MODEL --port $G2RL_SERVER_PORT`."""


class Profile(Section):
    """A cluster, or one of its queues."""

    account: Line | None = None
    """Slurm account that is charged; nemo-run requires one."""
    partition: Line | None = None
    """Slurm partition; null: the site's default."""
    qos: Line | None = None
    """Slurm quality of service."""
    time: Time = "01:00:00"
    """Time limit of one job, as Slurm writes it (minutes, or [days-]hours:minutes:seconds)."""
    nodes: Positive = 1
    """Nodes of a job."""
    gpus_per_node: Positive | None = None
    """GPUs to request on each node; null: none (CPUs only, or `sbatch: {gres: ...}`)."""
    ranks_per_node: Positive | None = None
    """Ranks on each node; null: one per GPU, or one without GPUs."""
    cpus_per_rank: Positive | None = None
    """CPU cores per rank; null: the site's default."""
    mem: Line | None = None
    """Memory of a node, such as 200G; 0 means all of it."""
    exclusive: bool = False
    """Do not share nodes with other jobs."""
    container_image: Line | None = None
    """Image for Pyxis (a .sqsh file or registry#image:tag); null: no container."""
    container_mounts: tuple[Line, ...] = ()
    """Mounts, SOURCE:TARGET[:FLAGS]; the folder of runs has to be mounted under its own path."""
    environment: dict[Name, Line] = {}
    """Environment variables of ranks, with literal values; they override those that ranks set."""
    secrets: tuple[Name, ...] = ()
    """Names of variables that are taken from the submitter's environment, such as HF_TOKEN; never written anywhere."""
    setup: tuple[str, ...] = ()
    """Shell lines before the ranks, on the first node, in `folder`: `module load ...`, `source .venv/bin/activate`."""
    sbatch: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], str | bool | None] = {}
    """More sbatch options, such as `constraint: h100`; true or null: an option without a value."""
    srun: tuple[Line, ...] = ()
    """More srun options, such as `--cpu-bind=none`."""
    folder: Path | None = None
    """Working folder of jobs, visible to all nodes; null: the folder where `g2rl launch` is called."""
    packager: Literal["none", "git"] = "none"
    """git: jobs run in a copy of HEAD, refused while there are uncommitted or untracked files; none: in `folder`."""
    continuation: Literal["requeue", "chain", "none"] = "requeue"
    """What follows a segment that did not finish the run: the same job again; the next of `segments` jobs; nothing."""
    segments: Positive = 1
    """Jobs to queue one after the other, for `continuation: chain`."""
    retries: NonNegative = 3
    """Attempts that may end without a newer checkpoint; others do not count."""
    stop_before_end_s: Positive = 300
    """Seconds before the time limit at which ranks are asked to save and stop; has to cover all updates of a step and
    a save."""
    servers: Servers | None = None
    """Generate rollouts on separate nodes, whose addresses are in G2RL_SERVERS; null: on the nodes of the ranks."""
    tunnel: Tunnel = Tunnel()
    """How commands reach Slurm."""

    @property
    def all_nodes(self) -> int:
        """Nodes of the job, those of servers included."""
        return self.nodes + (self.servers.nodes if self.servers else 0)

    @property
    def asks_for_gpus(self) -> bool:
        """Whether its jobs request GPUs."""
        return bool(self.gpus_per_node) or any("gpu" in f"{name}={value}" for name, value in self.sbatch.items())

    @property
    def gpu_hours(self) -> float:
        """GPU hours of a run that uses its time limit in every segment; a requeued job can use it again."""
        return seconds_of(self.time) / 3600 * self.segments * self.all_nodes * (self.gpus_per_node or 0)

    @property
    def ranks_on_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1


def profile_folder() -> Path:
    """The user's own folder of profiles."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "g2rl" / "clusters"


def load_profile(name: str, **changes: Any) -> Profile:
    """Read the profile in the file `name`, or the one of that name in the user's folder; `changes` override its keys.

    Raises ConfigError if there is no such file, or with all keys that are unknown, invalid or conflict with others,
    each with its line.
    """
    file = Path(name).expanduser()
    if not file.is_file():
        file = profile_folder() / f"{name}.yaml"
    if not file.is_file():
        names = sorted(path.stem for path in profile_folder().glob("*.yaml"))
        raise ConfigError(
            f"--cluster {name}: no such file, and {profile_folder()} holds {', '.join(names) or 'no profiles'}; "
            "start from a copy of one in launch/clusters"
        )
    profile, tree = read_model(_PROFILE, file, [Entry.of(changes, "arguments")] if changes else ())
    problems = [f"{tree.origin_of((key,))}: {text}" for key, text in _conflicts(profile)]
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", problems)
    return profile


def seconds_of(time: str) -> int:
    """Convert a Slurm time limit to seconds: minutes, minutes:seconds, [days-]hours:minutes:seconds, days-hours."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def looks_secret(name: str) -> bool:
    """Whether a variable of this name usually holds a secret."""
    return bool(_SECRET.search(name))


def _conflicts(profile: Profile) -> Iterator[tuple[str, str]]:
    """Keys that conflict with each other, with a suggested fix."""
    for name in profile.environment:
        if looks_secret(name):
            value = "its value is taken from the environment that you launch from"
            yield (
                "environment",
                f"environment.{name} looks like a secret: put {name} under secrets:, by name only; {value}",
            )
        if name in profile.secrets:
            yield "environment", f"{name} is under environment: and under secrets:; leave one"
    if profile.stop_before_end_s + SIGNAL_EARLY_S >= seconds_of(profile.time):
        yield (
            "time",
            f"time: {profile.time} is not longer than stop_before_end_s: {profile.stop_before_end_s} and the "
            f"{SIGNAL_EARLY_S} s that Slurm may signal early: ranks would be stopped before they start. Raise time or "
            "lower stop_before_end_s",
        )
    if profile.container_mounts and not profile.container_image:
        yield "container_mounts", "container_mounts without container_image; remove them or name an image"
    for mount in profile.container_mounts:
        if not re.fullmatch(r"[^:,]+:/[^:,]*(:[^:,]+)?", mount):
            yield "container_mounts", f"container_mounts: {mount!r} is not SOURCE:TARGET[:FLAGS] without commas"
    tunnel = profile.tunnel
    if tunnel.kind == "ssh" and not (tunnel.host and tunnel.job_folder and profile.folder):
        yield "tunnel", "tunnel.kind: ssh needs tunnel.host, tunnel.job_folder and folder (on the cluster)"
    if tunnel.job_folder and not re.fullmatch(r"/[\w./@+=-]*", str(tunnel.job_folder)):
        text = "has to be an absolute path of letters, digits and ./_@+=-: nemo-run does not quote it"
        yield "tunnel", f"tunnel.job_folder: {tunnel.job_folder} {text}"
    if profile.segments > 1 and profile.continuation != "chain":
        yield "segments", "segments above 1 need continuation: chain; requeued jobs need only one"
    if profile.folder and not profile.folder.is_absolute():
        yield "folder", f"folder: {profile.folder} has to be an absolute path"
    for name in sorted({*profile.sbatch} & {name.replace("_", "-") for name in (*Profile.model_fields, *_OURS)}):
        yield "sbatch", f"sbatch.{name} is set by g2rl launch; use the profile's own keys"


_OURS = ("job-name", "output", "error", "signal", "requeue", "no-requeue", "dependency", "chdir", "open-mode",
         "ntasks-per-node", "cpus-per-task", "export", "array", "wrap")  # fmt: skip

_SBATCHS = ("constraint", "gres", "gpus", "gpus-per-task", "reservation", "nodelist", "exclude", "licenses",
            "comment", "mail-type", "mail-user", "mem-per-cpu", "mem-per-gpu", "switches", "begin")  # fmt: skip


def _as_sbatch_option(key: str, entry: Entry) -> str | None:
    """Explain where to put an option of sbatch that is not a key of a profile; None for any other key."""
    option = key.replace("_", "-")
    if option not in _SBATCHS:
        return None
    return f"unknown key {key}. Options of sbatch that are not a key here go under sbatch: (sbatch: {{{option}: ...}})"


_PROFILE = Format(Profile, "is not a cluster profile", shows_values=False, hint=_as_sbatch_option)
