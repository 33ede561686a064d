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
    """Check that a copy of HEAD contains everything that the run needs.

    Args:
        job: the job to submit.
        config: its configuration.
        config_path: file that it was read from.

    Raises:
        ConfigError: names every file that is not committed, and every file that the configuration names and the copy
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
    direct = [path for _, path in _status(root)]
    for state, path in _status(root, "--recursive"):
        if state == "-":
            yield f"the submodule {path} is not checked out: git submodule update --init --recursive"
        elif path not in direct:
            yield f"the submodule {path} is inside another one, whose files would be sent to another folder: remove it"


def _status(root: Path, *options: str) -> list[tuple[str, str]]:
    """State (`-`: not checked out) and path of each submodule."""
    text = _git(root, "submodule", "status", *options)
    return re.findall(r"^(.)[0-9a-f]+ (.+?)(?: \([^()\n]*\))?$", text, re.MULTILINE)


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


def _named(root: Path, config: Config) -> list[tuple[str, str]]:
    """Keys and values that name files or folders: by their meaning, or because the path exists."""
    named = list(named_files(config))
    keys = [("model.path", config.model.path)]
    keys += [
        ("data.sources" if config.data.sources else "data.source", part.source) for part in config.data.each_source()
    ]
    existing = [(key, value) for key, value in keys if (root / value).exists() or Path(value).exists()]
    return [*named, *(entry for entry in existing if entry not in named)]


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
    """Find everything that would fail on the cluster: one round trip to the login node, one list of problems.

    Args:
        job: the job to submit.
        config: its configuration.
        config_path: the file on this machine that it was read from.

    Raises:
        NoAnswer: the login node does not respond.
        ConfigError: every problem: commands, folders, or files of the configuration that are missing there.
    """
    tunnel = job.profile.tunnel
    if tunnel.kind == "local":
        _check_folders(job)
        return
    named = list(named_files(config))
    sent = job.profile.packager == "git"
    config_files = {} if sent else {str(_path_there(job, config_path, file)): file for file in files_of(config_path)}
    # With a copy of HEAD, relative paths are in the copy.
    checked = [path for _, path in named if not sent or path.startswith(("/", "~"))]
    words = [str(job.folder), str(tunnel.job_folder), *config_files, "", *checked]
    lines = shell_text("preflight.sh").splitlines()
    script = " ".join(line.strip() for line in lines if not line.startswith("#"))
    output = tunnel.run(["sh", "-c", script, "sh", *words]).splitlines()
    lines = [line.split(" ", 3)[1:] for line in output if line.startswith("g2rl ")]
    noise = next((line for line in output if line.strip() and not line.startswith("g2rl ")), None)
    problems = [*_of_machine(job, lines, noise)]
    if ["folder"] not in lines:
        present = {words[2]: words[1] for words in lines if words[0] == "file"}
        problems += _of_configuration(job, config_files, present)
        location = f"on {tunnel.host} (relative paths start at {job.folder})"
        problems += [f"{key}={path}: there is no such file or folder {location}" for key, path in named
                     if path in checked and path not in present]  # fmt: skip
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


def _of_machine(job: Job, lines: list[list[str]], noise: str | None) -> Iterator[str]:
    tunnel = job.profile.tunnel
    if noise is not None:
        yield (
            f"the shell there prints {noise[:80]!r} before the output of commands, which breaks rsync and g2rl: print "
            "it in ~/.bashrc only in interactive shells"
        )
    for words in lines:
        if words[0] == "command":
            yield f"{words[1]} is not on PATH in a non-interactive shell there: set PATH in ~/.bashrc"
        elif words[0] == "jobs":
            yield f"tunnel.job_folder: {tunnel.job_folder} cannot be created or written there"
        elif words[0] == "folder":
            yield f"folder: {job.folder} does not exist there, or cannot be entered"


def _of_configuration(job: Job, config_files: dict[str, Path], present: dict[str, str]) -> Iterator[str]:
    for path, file in config_files.items():
        full = job.folder / path
        remedy = f"copy it (scp {file} {job.profile.tunnel.host}:{full}), or set packager: git"
        if path not in present:
            yield f"{full}, the configuration that jobs read, does not exist there: {remedy}"
        elif present[path] != hashlib.sha256(file.read_bytes()).hexdigest():
            yield f"{full} differs from the local {file}: {remedy}"
