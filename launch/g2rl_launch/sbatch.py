"""The whole text of a job script: submitted with `sbatch FILE`, it needs neither nemo-run nor this package there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from g2rl_launch.environment import environment_of
from g2rl_launch.job import RANK, Job, prologue
from g2rl_launch.profiles import Profile
from megatron_g2rl import __version__
from megatron_g2rl.config.errors import ConfigError

QUEUE = """\
# Called with bash where sbatch is, this file queues itself, so many times as it has segments; they are one launch.
if [ -z "${{SLURM_JOB_ID:-}}" ]; then
  if [ -n "$(squeue --noheader --me --name={name} 2>/dev/null)" ]; then
    echo "a job called {name} is queued or runs: wait for it, or end it with scancel --name={name}" >&2
    exit 1
  fi
  launch=file-$(date +%s)-$$-$RANDOM
  for segment in $(seq {segments}); do
    job=$(sbatch --parsable --export=ALL,G2RL_LAUNCH_ID="$launch" "$0") || {{
      echo "sbatch refused segment $segment of {segments}" >&2
      [ "$segment" = 1 ] || echo "those above are queued and go on; scancel takes them back" >&2
      exit 1
    }}
    echo "segment $segment of {segments}: job ${{job%%;*}}"
    mkdir -p {launch_folder} && echo "${{job%%;*}}" >> {launch_folder}/jobs
  done
  exit
fi
"""
"""Shell text by which a job script submits itself."""


def render(job: Job, launch_id: str | None = None) -> str:
    """The job script of a run; for `executor: local` a script for bash.

    Args:
        job: what runs.
        launch_id: as for `prologue`.
    """
    local = job.profile.executor == "local"
    lines = ["#!/bin/bash", f"# Run {job.name}, made by g2rl {__version__}; {how_to_start(job.profile)}"]
    if not local:
        lines += [sbatch_line(name, value) for name, value in sbatch_options(job)]
        if launch_id is None:
            where = shlex.quote(str(job.launch_folder))
            lines += ["", QUEUE.format(name=job.name, launch_folder=where, segments=job.profile.segments).rstrip()]
    else:
        lines += ["", 'export G2RL_SCRIPT="${G2RL_SCRIPT:-$(realpath "$0")}"']
    lines += ["", prologue(job, launch_id).rstrip(), servers_text(job), f"G2RL_RANK={shlex.quote(RANK)}", ""]
    if local:
        lines += [f"cd {shlex.quote(str(job.folder))} || exit 1"]
        keep = 'trap "" TERM INT HUP; exec tee -a "$G2RL_LOG"'  # what ranks say while they save is kept too
        lines += [f'bash -c "$G2RL_RANK" rank {job.rank_line()} > >({keep}) 2>&1']
    else:
        options = [*srun_options(job.profile), f"--chdir={job.folder}"]
        if job.profile.container_image:
            options[-1:] = container_options(job)
        words = " ".join(map(shlex.quote, options))
        lines += [f'srun {words} --output="$G2RL_SRUN_LOG" --open-mode=append \\']
        lines += [f'  bash -c "$G2RL_RANK" rank {job.rank_line()}']
    return "\n".join(lines) + "\n"


def how_to_start(profile: Profile, file: str = "FILE") -> str:
    """What to do with a job script that `render` made without a launch id."""
    if profile.executor == "local":
        return f"start it with: bash {file}"
    if profile.segments > 1:
        return f"submit its {profile.segments} segments with: bash {file}"
    return f"submit it with: sbatch {file}"


def sbatch_options(job: Job) -> Iterator[tuple[str, str | None]]:
    """Options of sbatch by name; None for one without a value."""
    profile = job.profile
    yield "job-name", job.name
    yield "output", f"{job.name}-%j.out"
    yield "open-mode", "append"
    for name in ("account", "partition", "qos", "time", "nodes", "mem"):
        value = profile.all_nodes if name == "nodes" else getattr(profile, name)
        if value is not None:
            yield name, str(value)
    yield "ntasks-per-node", str(tasks_per_node(profile))
    if profile.cpus_per_rank:
        yield "cpus-per-task", str(cpus_per_task(profile))
    if profile.gpus_per_node:
        yield "gpus-per-node", str(profile.gpus_per_node)
    if profile.exclusive:
        yield "exclusive", None
    yield from continuation_options(job)
    for name, value in profile.sbatch.items():
        if value is not False:
            yield name, None if value is None or value is True else str(value)


def continuation_options(job: Job) -> Iterator[tuple[str, str | None]]:
    """Options of sbatch that stop a segment in time, let the run go on, and keep it behind others."""
    profile = job.profile
    yield "signal", f"TERM@{profile.stop_before_end_s}"
    if profile.continuation == "requeue":
        yield "requeue", None
    else:
        yield "no-requeue", None
    before = ["singleton"] * (profile.continuation == "chain") + [f"afterany:{number}" for number in job.after]
    if before:
        yield "dependency", ",".join(before)


def tasks_per_node(profile: Profile) -> int:
    """srun tasks on each node."""
    return 1 if profile.launcher == "torchrun" else profile.ranks_on_node


def cpus_per_task(profile: Profile) -> int | None:
    """Cores of an srun task."""
    share = profile.ranks_on_node // tasks_per_node(profile)
    return profile.cpus_per_rank * share if profile.cpus_per_rank else None


def srun_options(profile: Profile) -> list[str]:
    """Options of srun, the profile's own last."""
    # Others would wait for the rank that failed; but after one that ended well the rest may still be saving.
    found = ["--kill-on-bad-exit=1", "--wait=0"]
    if profile.cpus_per_rank:
        found.append(f"--cpus-per-task={cpus_per_task(profile)}")  # srun does not take it from sbatch since 22.05
    if profile.servers:  # the first nodes of the job train, the last ones serve
        ranks = profile.nodes * tasks_per_node(profile)
        found += [f"--nodes={profile.nodes}", "--relative=0", f"--ntasks={ranks}"]
    return [*found, *profile.srun]


def servers_text(job: Job) -> str:
    """Shell text that starts the servers in the background, told where they are as the ranks are; empty without any."""
    profile, servers = job.profile, job.profile.servers
    if servers is None:
        return ""
    where = container_options(job) if profile.container_image else [f"--chdir={job.folder}"]
    options = [f"--nodes={servers.nodes}", f"--relative={profile.nodes}", f"--ntasks={servers.nodes}"]
    words = " ".join(map(shlex.quote, [*options, "--ntasks-per-node=1", *where, *profile.srun]))
    return "\n".join(
        [
            "",
            "# Servers, on the nodes after those of the ranks",
            "export G2RL_SERVER_PORT=$((MASTER_PORT + 6000)) G2RL_SERVERS=",
            f'for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n {servers.nodes}); do',
            '  G2RL_SERVERS="${G2RL_SERVERS:+$G2RL_SERVERS,}http://$(g2rl_address "$node"):$G2RL_SERVER_PORT"',
            "done",
            "{",
            f'  srun {words} --output="${{G2RL_SRUN_LOG/log-/server-}}" bash -c {shlex.quote(servers.command)}',
            "  g2rl_server_ended $?",
            "} &",
            "",
        ]
    )


def container_options(job: Job) -> list[str]:
    """Options of srun that Pyxis reads."""
    profile = job.profile
    mounts = [f"--container-mounts={','.join(profile.container_mounts)}"] if profile.container_mounts else []
    return [
        f"--container-image={profile.container_image}",
        *mounts,
        f"--container-workdir={job.folder}",
        f"--container-env={','.join(container_names(job))}",
    ]


def container_names(job: Job) -> list[str]:
    """Variables whose values of the job win over the image's own."""
    ours = [
        *["G2RL_SERVERS", "G2RL_SERVER_PORT"] * bool(job.profile.servers),
        "G2RL_LAUNCH",
        "MASTER_ADDR",
        "MASTER_PORT",
        *["G2RL_EXIT_CODE_FILE"] * (job.profile.launcher == "torchrun"),
    ]
    return sorted({*environment_of(job.profile, job.device, job.launch_folder), *job.profile.secrets, *ours})


def sbatch_line(name: str, value: str | None) -> str:
    """A line that sbatch reads: its own quoting, which knows only double quotes.

    Raises:
        ConfigError: sbatch could not read the value back.
    """
    if value is None:
        return f"#SBATCH --{name}"
    if any(sign in value for sign in '"\\\n\r'):
        raise ConfigError(f"sbatch option {name}={value!r}: sbatch cannot read quotes, backslashes and newlines")
    return f'#SBATCH --{name}="{value}"' if not shlex.quote(value) == value else f"#SBATCH --{name}={value}"
