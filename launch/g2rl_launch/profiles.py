"""Cluster profiles: one YAML file says how jobs are made at a site (launch/README.md, launch/clusters).

A profile is named by its file, or by its name when it lies in the user's folder of profiles (`profile_folder`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from g2rl_launch.ssh import Ssh
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.matching import nearest_names
from megatron_g2rl.config.source import Entry, read_yaml
from megatron_g2rl.config.tree import NonNegative, Positive, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Time = Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")]
Line = Annotated[str, Field(pattern=r"^[^\n\r]*$")]
Scalar = str | int | float | bool | None

SIGNAL_EARLY_S = 60
"""Slurm sends the signal before a time limit up to a minute early."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY$|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)


class Tunnel(Section):
    """How commands reach Slurm."""

    kind: Literal["local", "ssh"] = "local"
    """local: sbatch is on this machine; ssh: on `host`, reached with the user's own ssh keys and agent."""
    host: Line | None = None
    """Login node, or a Host of ~/.ssh/config, for ssh."""
    user: Line | None = None
    """User name there; null: ssh's own choice."""
    identity: Path | None = None
    """File of an ssh key; null: ssh's own choice."""
    job_folder: Path | None = None
    """Folder on the cluster, seen by all nodes, for job scripts and their output; needed for ssh."""


def ssh_of(tunnel: Tunnel) -> Ssh:
    """The login node of a tunnel over ssh."""
    return Ssh(str(tunnel.host), tunnel.user, str(tunnel.identity) if tunnel.identity else None)


class Servers(Section):
    """Nodes of the job that sample instead of train."""

    nodes: Positive
    """Nodes for servers, besides the profile's `nodes`."""
    command: Line
    """Shell line that runs on each of them, in `folder`: `vllm serve MODEL --port $G2RL_SERVER_PORT`."""


class Profile(Section):
    """A site, or a queue of it."""

    executor: Literal["slurm", "local"] = "slurm"
    """slurm: jobs; local: processes on this machine."""
    account: Line | None = None
    """Slurm account that is charged; nemo-run asks for one."""
    partition: Line | None = None
    """Slurm partition; null: the site's default."""
    qos: Line | None = None
    """Slurm quality of service."""
    time: Time = "01:00:00"
    """Time limit of one job, as Slurm writes it (minutes, or [days-]hours:minutes:seconds)."""
    nodes: Positive = 1
    """Nodes of a job."""
    gpus_per_node: Positive | None = None
    """GPUs to ask for on each node; null: ask for none (CPUs, or `sbatch: {gres: ...}`)."""
    ranks_per_node: Positive | None = None
    """Ranks on each node; null: one a GPU, else one."""
    cpus_per_rank: Positive | None = None
    """Cores of a rank; null: the site's default."""
    mem: Line | None = None
    """Memory of a node, such as 200G; 0 means all of it."""
    exclusive: bool = False
    """Share nodes with nobody."""
    container_image: Line | None = None
    """Image for Pyxis (a .sqsh file or registry#image:tag); null: no container."""
    container_mounts: tuple[Line, ...] = ()
    """Mounts, SOURCE:TARGET[:FLAGS]; the folder of runs has to be mounted under its own path."""
    environment: dict[Name, Line] = {}
    """Environment variables of ranks, literally; they win over `launch/environment.py`."""
    secrets: tuple[Name, ...] = ()
    """Names of variables that are taken from the submitter's environment, such as HF_TOKEN; never written anywhere."""
    setup: tuple[str, ...] = ()
    """Shell lines before the ranks, on the first node, in `folder`: `module load ...`, `source .venv/bin/activate`."""
    sbatch: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], Scalar] = {}
    """More sbatch options, such as `constraint: h100`; true or null: an option without a value."""
    srun: tuple[Line, ...] = ()
    """More srun options, such as `--cpu-bind=none`."""
    command: tuple[str, ...] = ("g2rl",)
    """How ranks call the program; `[python, -m, megatron_g2rl.cli]` where the console script is not installed."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """srun starts every rank and sees its exit code; torchrun: one srun task a node, which starts the ranks."""
    folder: Path | None = None
    """Working folder of jobs, seen by all nodes; null: the folder where `g2rl launch` is called."""
    packager: Literal["none", "git"] = "none"
    """git: jobs work in a copy of HEAD, refused while there are uncommitted or untracked files; none: in `folder`."""
    continuation: Literal["requeue", "chain", "none"] = "requeue"
    """What follows a segment that did not finish: the same job again; the next of `segments` jobs; nothing."""
    segments: Positive = 1
    """Jobs that are queued at once, one after the other, for `continuation: chain`."""
    retries: NonNegative = 3
    """Attempts that may end without a newer checkpoint; those that have one cost nothing."""
    stop_before_end_s: Positive = 300
    """Seconds before the time limit at which ranks are asked to save and stop: an update and a save have to fit."""
    servers: Servers | None = None
    """Sample on nodes of their own: ranks find the addresses in G2RL_SERVERS; null: on the nodes of the ranks."""
    tunnel: Tunnel = Tunnel()
    """How commands reach Slurm."""

    @property
    def all_nodes(self) -> int:
        """Nodes of the job, those of servers included."""
        return self.nodes + (self.servers.nodes if self.servers else 0)

    @property
    def ranks_on_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1


def profile_folder() -> Path:
    """The user's own folder of profiles."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "g2rl" / "clusters"


def load_profile(name: str) -> Profile:
    """Read the profile in the file `name`, or the user's own of that name.

    Raises:
        ConfigError: no such file, or every key that is unknown, wrong or does not fit another, each with its line.
    """
    file = Path(name).expanduser()
    if not file.is_file():
        file = profile_folder() / f"{name}.yaml"
    if not file.is_file():
        own = sorted(path.stem for path in profile_folder().glob("*.yaml"))
        raise ConfigError(
            f"--cluster {name}: no such file, and {profile_folder()} holds {', '.join(own) or 'no profiles'}; "
            "begin with a copy of one of launch/clusters"
        )
    tree = read_yaml(file)
    try:
        profile = Profile.model_validate(_plain(tree))
    except ValidationError as error:
        problems = [
            problem_line(details, tree, file, Profile)
            for details in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError.listing(f"{file} is no cluster profile", list(dict.fromkeys(problems))) from None
    problems = [f"{origin_of(tree, (key,), file)}: {text}" for key, text in _conflicts(profile)]
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", problems)
    return profile


def seconds_of(time: str) -> int:
    """Seconds of a Slurm time limit: minutes, minutes:seconds, [days-]hours:minutes:seconds, days-hours."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def looks_secret(name: str) -> bool:
    """Whether a variable of this name usually holds something that nobody else may read."""
    return bool(_SECRET.search(name))


def _conflicts(profile: Profile) -> list[tuple[str, str]]:
    """Keys that cannot be right together, with what to do."""
    found = [
        ("environment", f"environment.{name} looks like a secret: put {name} under secrets:, by name alone; its value "
         "is taken from the environment of whoever launches")
        for name in profile.environment
        if looks_secret(name)
    ]  # fmt: skip
    found += [
        ("environment", f"{name} is under environment: and under secrets:; leave one")
        for name in sorted({*profile.environment} & {*profile.secrets})
    ]
    if profile.executor == "slurm" and profile.stop_before_end_s + SIGNAL_EARLY_S >= seconds_of(profile.time):
        text = (
            f"time: {profile.time} is not longer than stop_before_end_s: {profile.stop_before_end_s} and the "
            f"{SIGNAL_EARLY_S} s that Slurm may signal early: ranks would be stopped before they begin. Raise time or "
            "lower stop_before_end_s"
        )
        found.append(("time", text))
    if profile.container_mounts and not profile.container_image:
        found.append(("container_mounts", "container_mounts without container_image; remove them or name an image"))
    found += [
        ("container_mounts", f"container_mounts: {mount!r} is not SOURCE:TARGET[:FLAGS] without commas")
        for mount in profile.container_mounts
        if not re.fullmatch(r"[^:,]+:/[^:,]*(:[^:,]+)?", mount)
    ]
    if profile.tunnel.kind == "ssh" and not (profile.tunnel.host and profile.tunnel.job_folder and profile.folder):
        found.append(("tunnel", "tunnel.kind: ssh needs tunnel.host, tunnel.job_folder and folder (on the cluster)"))
    if profile.tunnel.kind == "ssh" and profile.executor == "local":
        found.append(("tunnel", "tunnel.kind: ssh is for executor: slurm; executor: local runs on this machine"))
    if profile.tunnel.job_folder and not re.fullmatch(r"/[\w./@+=-]*", str(profile.tunnel.job_folder)):
        text = "has to be an absolute path of letters, digits and ./_@+=-: nemo-run does not quote it"
        found.append(("tunnel", f"tunnel.job_folder: {profile.tunnel.job_folder} {text}"))
    if profile.segments > 1 and profile.continuation != "chain":
        found.append(("segments", "segments above 1 are for continuation: chain; requeued jobs need one"))
    if profile.executor == "local" and profile.servers:
        found.append(("servers", "servers: need executor: slurm"))
    if profile.executor == "local" and profile.container_image:
        found.append(("container_image", "executor: local starts no containers; call g2rl inside one"))
    if profile.folder and not profile.folder.is_absolute():
        found.append(("folder", f"folder: {profile.folder} has to be an absolute path"))
    clash = sorted({*profile.sbatch} & {name.replace("_", "-") for name in (*Profile.model_fields, *_OURS)})
    found += [("sbatch", f"sbatch.{name} is set by g2rl launch; use the profile's own keys") for name in clash]
    return found


_OURS = ("job-name", "output", "error", "signal", "requeue", "no-requeue", "dependency", "chdir", "open-mode",
         "ntasks-per-node", "cpus-per-task", "export", "array", "wrap")  # fmt: skip

_SBATCHS = ("constraint", "gres", "gpus", "gpus-per-task", "reservation", "nodelist", "exclude", "licenses",
            "comment", "mail-type", "mail-user", "mem-per-cpu", "mem-per-gpu", "switches", "begin")  # fmt: skip


def _plain(entry: Entry) -> Any:
    """The tree with numbers as they were written, which pydantic reads as what a key takes (`time: 30`, `mem: 0`)."""
    if isinstance(entry.value, dict):
        return {name: _plain(child) for name, child in entry.value.items()}
    if isinstance(entry.value, list):
        return [_plain(Entry(item, entry.origin)) for item in entry.value]
    if isinstance(entry.value, (int, float)) and not isinstance(entry.value, bool):
        return entry.text or str(entry.value)
    return entry.value


def origin_of(tree: Entry, location: tuple[str, ...], file: Path) -> str:
    """Where the key at a location was written, or the nearest one around it."""
    origin = f"{file}"
    for name in location:
        value = tree.value
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            tree = Entry(value[int(name)], origin)
        elif isinstance(value, dict) and name in value:
            tree = value[name]
        else:
            break
        origin = tree.origin
    return origin


def _instead_of(key: str, model: type[Section]) -> str:
    option = key.replace("_", "-")
    if model is Profile and option in _SBATCHS:
        return f"Options of sbatch that are no key here go under sbatch: (sbatch: {{{option}: ...}})"
    sections = {"tunnel": Tunnel, "servers": Servers} if model is Profile else {}
    known = [*model.model_fields, *(f"{name}.{leaf}" for name in sections for leaf in sections[name].model_fields)]
    return f"Nearest valid key: {' or '.join(nearest_names(key, known))}"


def problem_line(details: dict, tree: Entry, file: Path, model: type[Section]) -> str:
    """One line about one wrong value; the value itself is not shown, it may be a secret.

    Args:
        details: pydantic's.
        tree, file: what was read, and where.
        model: what it was to be.
    """
    location = tuple(str(part) for part in details["loc"])
    if not location:
        return f"{file}: {details['msg']}"
    origin, key = origin_of(tree, location, file), ".".join(location)
    if details["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}. {_instead_of(key, model)}"
    field = model.model_fields[location[0]]
    if details["type"] == "missing" and len(location) == 1:
        return f"{file}: {key} is missing; it has no default. {field.description}"
    choices = get_args(field.annotation) if details["type"] == "literal_error" and len(location) == 1 else ()
    said = f"one of {', '.join(map(str, choices))}" if choices else details["msg"]
    return f"{origin}: {key} is not allowed: {said}. {field.description}"
