"""A run's job: what each rank executes, its environment, and the text of its job script.

`render` returns the complete text for `sbatch FILE`, which needs neither nemo-run nor this package where it is
submitted. `nemo` passes the same parts to nemo-run: `variables` of the run, `prologue` of the profile, `rank_script`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from g2rl_launch.profile import SIGNAL_EARLY_S, Profile, seconds_of
from megatron_g2rl import __version__
from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError


def shell_text(name: str) -> str:
    """The text of a shell file in this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Job:
    """Everything that a job script is rendered from: the run's name, and absolute folders where the job runs.

    `run_folder` is that of the run, `folder` the working folder of the ranks; their `arguments` are `train CONFIG
    key=value ...`. The jobs `after`, of other runs, have to end before it starts.
    """

    name: str
    run_folder: PurePosixPath
    folder: PurePosixPath
    arguments: tuple[str, ...]
    profile: Profile
    after: tuple[str, ...] = ()

    @property
    def launch_folder(self) -> PurePosixPath:
        """Where the attempts of the run are counted and logged."""
        return self.run_folder / "launch"

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.profile.nodes * self.profile.ranks_on_node

    def rank_line(self) -> str:
        """The program of one rank as shell text, every argument quoted."""
        return shlex.join(["g2rl", *self.arguments])


def make_job(config: Config, config_path: Path, overrides: Sequence[str], profile: Profile) -> Job:
    """The job of a run with the configuration that results from `config_path` and the `key=value` overrides.

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
    if profile.nodes * profile.ranks_on_node == 1:
        arguments.append("trainer.ranks=1")
    _check_mounts(runs, folder, folder / PurePosixPath(arguments[1]), profile)
    return Job(config.run.name, runs / config.run.name, folder, tuple(arguments), profile)


def new_launch_id(name: str) -> str:
    """An id that all attempts of one launch share."""
    return f"{name} {time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} {time.monotonic_ns()}"


def variables(job: Job) -> dict[str, str]:
    """Variables of a job that depend on its run, by name, with literal values."""
    return {"G2RL_RUN": str(job.run_folder), "G2RL_LAUNCH": str(job.launch_folder)}


def prologue(profile: Profile, folder: PurePosixPath) -> str:
    """Shell text before the ranks, in `folder`: environment, counting of attempts, rendezvous, setup, servers.

    It follows `variables` and G2RL_LAUNCH_ID, which only the job script itself reads.
    """
    ours = {
        "G2RL_RETRIES": str(profile.retries),
        "G2RL_CONTINUATION": profile.continuation,
        "G2RL_SIGNAL_S": str(seconds_of(profile.time) - profile.stop_before_end_s - SIGNAL_EARLY_S),
    }
    server_options = []
    if servers := profile.servers:
        nodes = [f"--nodes={servers.nodes}", f"--relative={profile.nodes}", f"--ntasks={servers.nodes}"]
        server_options = [*nodes, "--ntasks-per-node=1", *_where(profile, folder), *profile.srun]
    variables = ours | profile.environment
    return _filled("prologue.sh.jinja", profile=profile, folder=folder, exports=variables, options=server_options)


def rank_script(job: Job) -> str:
    """What nemo-run starts for each rank; the arguments are part of the text, quoted once."""
    if job.profile.packager == "git":
        enter = 'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"'  # the copy of HEAD
    else:
        enter = f"cd {shlex.quote(str(job.folder))} || exit 1"
    return f"{enter}\nset -- {job.rank_line()}\n{shell_text('rank.sh')}"


def render(job: Job, launch_id: str | None = None) -> str:
    """The complete job script of a run.

    Its attempts share `launch_id`; None: each submission of the text is a separate launch, unless the environment
    contains the id of one.
    """
    options = {"job-name": job.name, "output": f"{job.name}-%j.out", "open-mode": "append"}
    options |= sbatch_options(job.profile, job.after)
    return _filled(
        "job.sh.jinja",
        job=job,
        launch_id=launch_id,
        comment=f"Run {job.name}, made by g2rl {__version__}; {how_to_submit(job.profile)}",
        sbatch=[sbatch_line(name, value) for name, value in options.items()],
        exports=variables(job),
        prologue=prologue(job.profile, job.folder),
        options=[*srun_options(job.profile), *_where(job.profile, job.folder)],
    )


def _filled(template: str, **values: Any) -> str:
    """The text of a template in this folder; its filters quote words for the shell, and read shell files."""
    environment = Environment(loader=FunctionLoader(shell_text), undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"quoted": lambda value: shlex.quote(str(value)), "joined": shlex.join, "text": shell_text}
    return environment.get_template(template).render(values) + "\n"


def how_to_submit(profile: Profile, file: str = "FILE") -> str:
    """How to submit a job script that `render` returned without a launch id."""
    if profile.segments > 1:
        return f"submit its {profile.segments} segments with: bash {file}"
    return f"submit it with: sbatch {file}"


def sbatch_options(profile: Profile, after: Sequence[str] = ()) -> dict[str, str | int | bool]:
    """Options of sbatch for jobs of a profile that wait for other jobs, by name; True for one without a value."""
    before = ["singleton"] * (profile.continuation == "chain") + [f"afterany:{number}" for number in after]
    options = {name: getattr(profile, name) for name in ("account", "partition", "qos", "time", "mem", "exclusive")}
    options |= {
        "nodes": profile.all_nodes,
        "ntasks-per-node": profile.ranks_on_node,
        "cpus-per-task": profile.cpus_per_rank,
        "gpus-per-node": profile.gpus_per_node,
        "signal": f"TERM@{profile.stop_before_end_s}",
        "requeue" if profile.continuation == "requeue" else "no-requeue": True,
        "dependency": ",".join(before) or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    own = {name: True if value is None else value for name, value in profile.sbatch.items()}
    return {name: value for name, value in {**given, **own}.items() if value is not False}


def srun_options(profile: Profile) -> list[str]:
    """Options of srun, the profile's own last."""
    # The other ranks would wait for a failed one; but when one ends normally, the others may still be saving.
    options = ["--kill-on-bad-exit=1", "--wait=0"]
    if profile.cpus_per_rank:
        options.append(f"--cpus-per-task={profile.cpus_per_rank}")  # srun does not inherit it from sbatch since 22.05
    if profile.servers:  # the first nodes of the job train, the last ones serve
        ranks = profile.nodes * profile.ranks_on_node
        options += [f"--nodes={profile.nodes}", "--relative=0", f"--ntasks={ranks}"]
    return [*options, *profile.srun]


def container_variables(profile: Profile) -> list[str]:
    """Variables whose values in the job override those of the image."""
    ours = ["G2RL_LAUNCH", "MASTER_ADDR", "MASTER_PORT"]
    ours += ["G2RL_SERVERS", "G2RL_SERVER_PORT"] * bool(profile.servers)
    return sorted({*profile.environment, *profile.secrets, *ours})


def sbatch_line(name: str, value: str | int | bool) -> str:
    """An #SBATCH line in sbatch's own quoting, which supports only double quotes; ConfigError if that is not enough."""
    if value is True:
        return f"#SBATCH --{name}"
    text = str(value)
    if any(sign in text for sign in '"\\\n\r'):
        raise ConfigError(f"sbatch option {name}={text!r}: sbatch cannot read quotes, backslashes and newlines")
    return f"#SBATCH --{name}={text}" if shlex.quote(text) == text else f'#SBATCH --{name}="{text}"'


def check_secrets(profile: Profile) -> None:
    """Raise ConfigError, with their names, unless the secrets that the profile names are set."""
    missing = [name for name in profile.secrets if not os.environ.get(name)]
    if missing and profile.tunnel.kind == "local":
        raise ConfigError(f"not set in this environment: {', '.join(missing)} (secrets: of the cluster profile)")


def git_root() -> Path:
    """Top of the repository around the current folder; ConfigError if there is none."""
    done = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError("packager: git, but this folder is in no git repository; change to one, or packager: none")
    return Path(done.stdout.strip())


def _where(profile: Profile, folder: PurePosixPath) -> list[str]:
    """Options of srun that set the working folder; in a container, those that Pyxis reads."""
    if not profile.container_image:
        return [f"--chdir={folder}"]
    options = {
        "image": profile.container_image,
        "mounts": ",".join(profile.container_mounts),
        "workdir": folder,
        "env": ",".join(container_variables(profile)),
    }
    return [f"--container-{name}={value}" for name, value in options.items() if value]


def _config_argument(path: Path, profile: Profile) -> str:
    if profile.packager == "git":
        root = git_root()
        if not path.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"{path} is not in the repository {root} that packager: git copies")
        return str(path.resolve().relative_to(root.resolve()))
    if profile.tunnel.kind == "ssh" or (profile.folder and (profile.folder / path).is_file()):
        return str(path)  # relative to the working folder
    return str(path.resolve())


def _check_mounts(runs: PurePosixPath, folder: PurePosixPath, config: PurePosixPath, profile: Profile) -> None:
    if not profile.container_image:
        return
    mounts = [mount.split(":")[:2] for mount in profile.container_mounts]
    same_path = [source for source, target in mounts if source == target]
    needed = [(runs, "the folder of runs")]
    if profile.packager == "none":
        needed += [(folder, "the working folder"), (config, "the configuration")]
    for path, what in needed:
        if not any(path.is_relative_to(mount) for mount in same_path):
            mount = path.parent if path == config else path  # folders: some sites do not mount single files
            raise ConfigError(
                f"the container would not see {what}, {path}, under the same path: it could not read it, or what it "
                f"writes there would be lost. Add {mount}:{mount} (or a folder above it) to container_mounts"
            )
