"""Checks before a job is queued: what the cluster lacks, and what a copy of HEAD (`packager: git`) lacks."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from g2rl_launch.job import Job, git_root, shell_text
from megatron_g2rl.config import Config
from megatron_g2rl.config.code_files import imported_files, named_code
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import named_files
from megatron_g2rl.config.reading import files_of

LISTED = 20
"""Files that one message names."""


def check_packed(job: Job, config: Config, config_path: Path) -> None:
    """Check that a copy of HEAD (`packager: git`) contains everything that the run needs.

    Raises ConfigError with every file that is not committed, and every file that the configuration names and the copy
    would lack: ignored by git, excluded from archives, in a submodule that is not checked out.
    """
    if job.profile.packager != "git":
        return
    root = git_root()
    status = _git(root, "status", "--porcelain").splitlines()
    # Python writes these when it imports a module.
    if changed := [line for line in status if not line.endswith(("__pycache__/", ".pyc"))]:
        raise ConfigError.listing(
            "packager: git sends what is committed, and these files are not: commit, remove or ignore them",
            [line.strip() for line in changed[:LISTED]],
        )
    if problems := [*_submodules(root), *_missing(root, config, config_path)]:
        raise ConfigError.listing("packager: git would send a copy of HEAD that the run cannot use", problems[:LISTED])


def _submodules(root: Path) -> Iterator[str]:
    """Submodules whose files nemo-run does not send, or sends to another folder."""
    text = _git(root, "submodule", "status", "--recursive")
    found = re.findall(r"^(.)[0-9a-f]+ (.+?)(?: \([^()\n]*\))?$", text, re.MULTILINE)
    for state, path in found:
        if state == "-":
            yield f"the submodule {path} is not checked out: git submodule update --init --recursive"
        elif any(path.startswith(f"{other}/") for _, other in found):
            yield f"the submodule {path} is inside another one, whose files would be sent to another folder: remove it"


def _missing(root: Path, config: Config, config_path: Path) -> Iterator[str]:
    """Files below `root` that the run reads but the copy would lack, each with the key or file that names it."""
    sent = _Sent(root)
    for file in files_of(config_path):
        inside = file.resolve().is_relative_to(root.resolve())
        if inside or not file.is_absolute() or ".." in file.parts:  # else a base file that is read in place
            yield from sent.lacks(file.resolve(), "the configuration")
    for key, value in _named(root, config):
        path = Path(value).expanduser()
        if path.is_absolute():  # read in place
            continue
        local, in_root = path.resolve(), (root / path).resolve()
        if local != in_root and local.exists():
            yield f"{key}={value} is {local}, but jobs start in {root}: write the path relative to that"
        else:
            yield from sent.lacks(in_root, f"{key}={value}")
    for key, path in named_code(config):
        for file in imported_files(root, path.partition(":")[0]):
            yield from sent.lacks(file, f"{key}={path}")


def _named(root: Path, config: Config) -> Iterator[tuple[str, str]]:
    """Keys and values that name files or folders: by their meaning, or because the path exists."""
    named = list(named_files(config))
    yield from named
    source = "data.sources" if config.data.sources else "data.source"
    for entry in [("model.path", config.model.path), *((source, part.source) for part in config.data.each_source())]:
        if entry not in named and ((root / entry[1]).exists() or Path(entry[1]).exists()):
            yield entry


class _Sent:
    """The files of a copy of HEAD."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        names = _git(root, "ls-files", "-z", "--recurse-submodules").split("\0")
        self.names = {name for name in names if name}
        folders = {str(folder) for name in self.names for folder in Path(name).parents}
        paths = "\0".join([*self.names, *folders])
        answer = _git(root, "check-attr", "--stdin", "-z", "export-ignore", input=paths).split("\0")
        self.excluded = {name for name, state in zip(answer[::3], answer[2::3], strict=False) if state == "set"}

    def lacks(self, path: Path, named_by: str) -> Iterator[str]:
        """Files of `path`, a file or a folder, that are not sent."""
        if not path.is_relative_to(self.root):
            yield f"{named_by}: {path} is not in the repository {self.root}"
            return
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        files = [file for file in files if ".git" not in file.parts and "__pycache__" not in file.parts]
        for file in sorted(files):
            name = file.relative_to(self.root).as_posix()
            if name not in self.names:
                why = "is ignored by git" if file.exists() else "does not exist"
                yield (
                    f"{named_by}: {name} {why}, so that it is not sent: commit it (git add --force), or "
                    "name an absolute path on the cluster"
                )
            elif {name, *map(str, Path(name).parents)} & self.excluded:
                yield f"{named_by}: {name} is excluded from archives (export-ignore in .gitattributes)"


def _git(root: Path, *arguments: str, input: str | None = None) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, input=input)
    if done.returncode:
        raise ConfigError(f"packager: git, but `git {arguments[0]}` failed in {root}: {done.stderr.strip()}")
    return done.stdout


def check_cluster(job: Job, config: Config, config_path: Path) -> None:
    """Find everything that would fail on the cluster: one round trip to the login node (`preflight.sh`).

    Raises NoAnswer if it does not respond, and ConfigError with every problem: commands, folders, or files of the
    configuration that are missing there.
    """
    tunnel, sent = job.profile.tunnel, job.profile.packager == "git"
    if tunnel.kind == "local":
        _check_folders(job)
        return
    files = [] if sent else files_of(config_path)
    words = [str(tunnel.host), str(job.folder), str(tunnel.job_folder), str(len(files))]
    for file in files:
        there = job.folder / _path_there(job, config_path, file)
        words += [str(there), hashlib.sha256(file.read_bytes()).hexdigest(), str(file)]
    # With a copy of HEAD, relative paths are in the copy.
    words += [f"{key}={path}" for key, path in named_files(config) if not sent or path.startswith(("/", "~"))]
    script = " ".join(line.strip() for line in shell_text("preflight.sh").splitlines() if not line.startswith("#"))
    lines = tunnel.run(["sh", "-c", script, "sh", *words]).splitlines()
    problems = [line.removeprefix("g2rl ") for line in lines if line.startswith("g2rl ")]
    if noise := next((line for line in lines if line.strip() and not line.startswith("g2rl ")), ""):
        problems.insert(
            0,
            f"the shell there prints {noise[:80]!r} before the output of commands, which breaks rsync and g2rl: print "
            "it in ~/.bashrc only in interactive shells",
        )
    if problems:
        raise ConfigError.listing(f"the job would fail on {tunnel.host}", problems)


def _check_folders(job: Job) -> None:
    """Check that the folder, which jobs would create if it is misspelled, and the image exist."""
    folder, image = Path(job.folder), job.profile.container_image or ""
    if not folder.is_dir():
        raise ConfigError(f"folder: {folder}, the working folder of jobs, does not exist")
    if (image.endswith(".sqsh") or image.startswith(("/", "./"))) and not (folder / image).exists():
        raise ConfigError(f"container_image: {folder / image} does not exist")


def _path_there(job: Job, config_path: Path, file: Path) -> PurePosixPath:
    """Path on the cluster where the job expects a configuration file: relative to the main one."""
    given, around = PurePosixPath(job.arguments[1]), config_path.parent
    if file == config_path:
        return given
    return given.parent / (file.relative_to(around) if file.is_relative_to(around) else file)
