"""A run's job: what each rank executes, where, and with which environment."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from g2rl_launch.environment import environment_of
from g2rl_launch.profiles import SIGNAL_EARLY_S, Profile, seconds_of
from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError

ATTEMPTS = Path(__file__).with_name("attempts.sh")

RANK = """\
# A signal is for the program; the shell waits for it.
trap : TERM USR1 HUP
"$@"
code=$?
# torchrun only says that a rank failed; the first rank leaves the run's own code, a moment earlier or later.
if [ "$code" != 0 ] && [ -n "${G2RL_EXIT_CODE_FILE:-}" ]; then
  for _ in 1 2 3 4 5 6 7 8 9 10; do [ -s "$G2RL_EXIT_CODE_FILE" ] && break; sleep 1; done
  code=$(cat "$G2RL_EXIT_CODE_FILE" 2>/dev/null || echo "$code")
fi
# Saved and stopped: no failure, for which srun would kill the ranks that are still saving.
if [ "$code" = 75 ]; then : > "$G2RL_LAUNCH/stopped"; exit 0; fi
# srun says the largest code, that of ranks it killed; the cause is the one that failed first.
if [ "$code" != 0 ]; then (set -C; echo "$code" > "$G2RL_LAUNCH/first_code") 2>/dev/null; fi
exit "$code"
"""
"""Shell text around the program of each rank; its arguments are the program and its arguments."""

RENDEZVOUS = """\
# Slurm's own address of a node: its name need not be one that the others can look up.
g2rl_address() {
  local found
  found=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
  echo "${found:-$1}"
}
# All ranks meet on the first node. Jobs that share a node do not share a port; the system gives none of these away.
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  MASTER_ADDR=$(g2rl_address "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
  export MASTER_ADDR MASTER_PORT="$((20000 + SLURM_JOB_ID % 6000))"
fi
"""

LOCK = """\
# One script of a run at a time on this machine; whoever holds the lock runs. All that it starts has it.
if [ -z "${G2RL_LOCKED:-}" ]; then
  mkdir -p "$G2RL_LAUNCH" || exit 1
  exec 8>> "$G2RL_LAUNCH/local.lock"
  flock -n -E 99 8 2>/dev/null
  [ $? != 99 ] || { echo "g2rl launch: $G2RL_RUN is under way already"; exit 1; }  # else there are no locks here
  export G2RL_LOCKED=1
fi
"""
"""Shell text before a run's attempts on this machine."""


@dataclass(frozen=True)
class Job:
    """Everything that a job script is made from."""

    name: str
    """Name of the run."""
    run_folder: PurePosixPath
    """Folder of the run, absolute, where the job runs."""
    folder: PurePosixPath
    """Working folder of the ranks, absolute."""
    arguments: tuple[str, ...]
    """`train CONFIG key=value ...`."""
    device: str
    """`policy.device`."""
    profile: Profile
    """Of the site, command-line changes included."""
    after: tuple[str, ...] = ()
    """Ids of jobs of other runs that have to be over before it begins."""

    @property
    def launch_folder(self) -> PurePosixPath:
        """Where the attempts of the run are counted and logged."""
        return self.run_folder / "launch"

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.profile.nodes * self.profile.ranks_on_node

    def rank_command(self) -> list[str]:
        """The program of one srun task, and its arguments."""
        profile = self.profile
        if profile.executor == "local" and profile.command == Profile().command:
            return [sys.executable, "-m", "megatron_g2rl.cli", *self.arguments]  # whichever g2rl was called
        if profile.executor == "local" or profile.launcher == "srun":
            return [*profile.command, *self.arguments]
        return [
            "torchrun",
            f"--nnodes={profile.nodes}",
            f"--nproc-per-node={profile.ranks_on_node}",
            "--rdzv-backend=c10d",
            "-m",
            "megatron_g2rl.cli",
            *self.arguments,
        ]

    def rank_line(self) -> str:
        """`rank_command` as shell text: every argument quoted, the rendezvous left to the shell."""
        words = [shlex.quote(word) for word in self.rank_command()]
        if words[0] == "torchrun":
            where = '--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"'
            words.insert(1, where)
        return " ".join(words)


def make_job(config: Config, config_path: Path, overrides: Sequence[str], profile: Profile) -> Job:
    """The job of a run.

    Args:
        config: as `config_path` and `overrides` describe it.
        config_path: file the user named.
        overrides: `key=value` of the command line.
        profile: of the site.

    Raises:
        ConfigError: the container does not see the folder of runs, the file is not in the repository that is packed, or
            the folder of runs is ~ over ssh.
    """
    folder = PurePosixPath(profile.folder or Path.cwd())
    if profile.tunnel.kind == "ssh" and str(config.run.directory).startswith("~"):
        raise ConfigError(
            f"run.directory={config.run.directory}: ~ is another folder on the cluster; write its full name"
        )
    runs = folder / PurePosixPath(config.run.directory.expanduser())
    arguments = ["train", _config_argument(config_path, profile), *overrides, f"run.directory={runs}"]
    ranks = profile.nodes * profile.ranks_on_node
    if ranks == 1 and profile.executor == "slurm" or profile.executor == "local" and profile.ranks_per_node:
        arguments.append(f"trainer.ranks={ranks}")
    _check_mounts(runs, folder, folder / PurePosixPath(arguments[1]), profile)
    return Job(config.run.name, runs / config.run.name, folder, tuple(arguments), config.policy.device, profile)


def prologue(job: Job, launch_id: str | None = None) -> str:
    """Shell text before the ranks of a job: environment, rendezvous, the site's set-up, counting of attempts.

    Args:
        job: what runs.
        launch_id: what its attempts have in common; None: each submission of the text is a launch of its own, or
            of the launch whose id it finds in its environment.
    """
    profile = job.profile
    ours = {
        "G2RL_RUN": str(job.run_folder),
        "G2RL_LAUNCH": str(job.launch_folder),
        "G2RL_RETRIES": str(profile.retries),
        "G2RL_CONTINUATION": profile.continuation,
    }
    if profile.executor == "slurm":
        ours["G2RL_SIGNAL_S"] = str(seconds_of(profile.time) - profile.stop_before_end_s - SIGNAL_EARLY_S)
    if profile.launcher == "torchrun":
        ours["G2RL_EXIT_CODE_FILE"] = f"{job.launch_folder}/exit_code"
    lines = [f"export {name}={shlex.quote(value)}" for name, value in ours.items()]
    if launch_id:
        common = shlex.quote(launch_id)
    else:  # that of the file that queued itself, segment by segment
        common = '"job $PPID"' if profile.executor == "local" else '"${G2RL_LAUNCH_ID:-job $SLURM_JOB_ID}"'
    lines += ["export -n G2RL_LAUNCH_ID", f"G2RL_LAUNCH_ID={common}", ""]
    lines += ["# Environment of the ranks (launch/g2rl_launch/environment.py)"]
    for name, value in environment_of(profile, job.device, job.launch_folder).items():
        lines.append(f"export {name}={shlex.quote(value)}")
    if profile.executor == "local":
        lines += [LOCK]
    lines += ["", ATTEMPTS.read_text(encoding="utf-8").rstrip(), "", "g2rl_begin", "", RENDEZVOUS.rstrip(), ""]
    if profile.setup:
        lines += ["# Set-up of the site"]
        if profile.packager == "none":
            lines += [f"cd {shlex.quote(str(job.folder))} || exit 1"]
        for line in profile.setup:
            lines += [line, f"g2rl_setup $? {shlex.quote(line)}"]
        lines += [""]
    if profile.secrets:
        lines += ["# Secrets come from whoever submits the job, or from setup; only their names are written down."]
        wrong = "is not set where the job was submitted, nor by setup"
        test = 'export {0}; [ -n "${{{0}:+set}}" ] || {{ g2rl_because "{0} {1}"; exit 2; }}'
        lines += [test.format(name, wrong) for name in profile.secrets]
        lines += [""]
    return "\n".join(lines) + "\n"


def new_launch_id(name: str) -> str:
    """What the attempts of one `g2rl launch` have in common."""
    return f"{name} {time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} {time.monotonic_ns()}"


def check_secrets(profile: Profile) -> None:
    """Refuse to submit without the secrets that the profile names.

    Raises:
        ConfigError: names those that are not set.
    """
    missing = [name for name in profile.secrets if not os.environ.get(name)]
    if missing and profile.tunnel.kind == "local":
        raise ConfigError(f"not set in this environment: {', '.join(missing)} (secrets: of the cluster profile)")


def git_root() -> Path:
    """Top of the repository around the current folder.

    Raises:
        ConfigError: there is none.
    """
    found = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if found.returncode:
        raise ConfigError("packager: git, but this folder is in no git repository; go there, or take packager: none")
    return Path(found.stdout.strip())


def _config_argument(path: Path, profile: Profile) -> str:
    if profile.packager == "git":
        root = git_root()
        if not path.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"{path} is not in the repository {root} that packager: git copies")
        return str(path.resolve().relative_to(root.resolve()))
    if profile.tunnel.kind == "ssh" or (profile.folder and (profile.folder / path).is_file()):
        return str(path)  # as it is called in the working folder
    return str(path.resolve())


def _check_mounts(runs: PurePosixPath, folder: PurePosixPath, config: PurePosixPath, profile: Profile) -> None:
    if not profile.container_image:
        return
    own = [mount.split(":")[0] for mount in profile.container_mounts if mount.split(":")[0] == mount.split(":")[1]]
    needed = [(runs, "the folder of runs")]
    if profile.packager == "none":
        needed += [(folder, "the working folder"), (config, "the configuration")]
    for path, what in needed:
        if not any(path.is_relative_to(mount) for mount in own):
            mount = path.parent if path == config else path  # folders, for a file alone would not do on every site
            raise ConfigError(
                f"the container would not see {what}, {path}, under the same path: it could not read it, or what it "
                f"writes there would be lost. Add {mount}:{mount} (or a folder above it) to container_mounts"
            )
