"""What can be known over a tunnel before a job is queued: one question to the login node, one list of problems."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from g2rl_launch.job import Job
from g2rl_launch.runs import LaunchedRun
from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import named_files
from megatron_g2rl.config.loading import files_of

# For whatever shell the user has there: `sh -c` with words, on one line. Files before an empty word are compared by
# their sums; those after it, models and data, are only looked for.
_LOOK = (
    "folder=$1 jobs=$2 sum=1; shift 2; "
    'for name in sbatch squeue scontrol rsync; do command -v "$name" >/dev/null || echo "g2rl command $name"; done; '
    '{ mkdir -p "$jobs" && [ -w "$jobs" ]; } 2>/dev/null || echo "g2rl jobs"; '
    'cd "$folder" 2>/dev/null || { echo "g2rl folder"; exit 0; }; '
    'for file; do case $file in "") sum=; continue;; "~/"*) path=$HOME/${file#"~/"};; *) path=$file;; esac; '
    '[ -r "$path" ] || continue; if [ -z "$sum" ]; then echo "g2rl file - $file"; '
    'elif [ -f "$path" ]; then echo "g2rl file $(sha256sum < "$path" | cut -c 1-64) $file"; fi; done; true'
)


def check_there(run: LaunchedRun, job: Job, config: Config, config_path: Path) -> None:
    """Refuse what the login node shows to be impossible; nothing is asked for a local tunnel.

    Args:
        run: knows the way.
        job: what is to be submitted.
        config: its configuration.
        config_path: the file that was read here.

    Raises:
        NoAnswer: the login node does not answer.
        ConfigError: every problem: commands, folders, or files of the configuration that are not there.
    """
    tunnel = job.profile.tunnel
    if tunnel.kind == "local":
        _check_here(job)
        return
    named = list(named_files(config))
    sent = job.profile.packager == "git"
    own = {} if sent else {str(_beside(job, config_path, file)): file for file in files_of(config_path)}
    # What a copy of HEAD holds is looked for in the copy.
    asked = [path for _, path in named if not sent or path.startswith(("/", "~"))]
    words = [str(job.folder), str(tunnel.job_folder), *own, "", *asked]
    said = run.demand(["sh", "-c", _LOOK, "sh", *words]).splitlines()
    lines = [line.split(" ", 3)[1:] for line in said if line.startswith("g2rl ")]
    noise = next((line for line in said if line.strip() and not line.startswith("g2rl ")), None)
    problems = [*_of_machine(job, lines, noise)]
    if ["folder"] not in lines:
        found = {words[2]: words[1] for words in lines if words[0] == "file"}
        problems += _of_configuration(job, own, found)
        where = f"on {tunnel.host} (relative paths start at {job.folder})"
        problems += [f"{key}={path}: there is no such file or folder {where}" for key, path in named
                     if path in asked and path not in found]  # fmt: skip
    if problems:
        raise ConfigError.listing(f"the job would fail on {tunnel.host}", problems)


def _check_here(job: Job) -> None:
    """Folders that jobs would make anew where a name was misspelt, and images that are not there."""
    if job.profile.executor == "local":
        return
    folder, image = Path(job.folder), job.profile.container_image or ""
    if not folder.is_dir():
        raise ConfigError(f"folder: {folder}, where jobs are to work, is not there")
    if (image.endswith(".sqsh") or image.startswith(("/", "./"))) and not (folder / image).exists():
        raise ConfigError(f"container_image: {folder / image} is not there")


def _beside(job: Job, config_path: Path, file: Path) -> PurePosixPath:
    """Where the job looks for a file of the configuration: beside the one it is told."""
    told, around = PurePosixPath(job.arguments[1]), config_path.parent
    if file == config_path:
        return told
    return told.parent / (file.relative_to(around) if file.is_relative_to(around) else file)


def _of_machine(job: Job, lines: list[list[str]], noise: str | None) -> Iterator[str]:
    tunnel = job.profile.tunnel
    if noise is not None:
        yield (
            f"the shell there says {noise[:80]!r} to commands that no terminal is at, which rsync and g2rl take for an "
            "answer: say it in ~/.bashrc only to interactive shells"
        )
    for words in lines:
        if words[0] == "command":
            yield f"{words[1]} is not found by a shell that no terminal is at: put it on the PATH in ~/.bashrc there"
        elif words[0] == "jobs":
            yield f"tunnel.job_folder: {tunnel.job_folder} cannot be made or written there"
        elif words[0] == "folder":
            yield f"folder: {job.folder} is not there, or may not be entered"


def _of_configuration(job: Job, own: dict[str, Path], found: dict[str, str]) -> Iterator[str]:
    for path, file in own.items():
        full = job.folder / path
        remedy = f"copy it (scp {file} {job.profile.tunnel.host}:{full}), or take packager: git"
        if path not in found:
            yield f"{full}, the configuration that jobs read, is not there: {remedy}"
        elif found[path] != hashlib.sha256(file.read_bytes()).hexdigest():
            yield f"{full} is not the file that was read here, {file}: {remedy}"
