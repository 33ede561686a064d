"""What `packager: git` sends: whether the copy of HEAD holds every file that a run needs, before a job is queued."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from g2rl_launch.job import Job, git_root
from megatron_g2rl.config import Config
from megatron_g2rl.config.code_files import imported_files
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import named_files
from megatron_g2rl.config.loading import files_of

LISTED = 20
"""Files that one message names."""


def check_packed(job: Job, config: Config, config_path: Path) -> None:
    """Refuse to send a copy of HEAD that lacks something.

    Args:
        job: what is to be submitted.
        config: its configuration.
        config_path: file it was read from.

    Raises:
        ConfigError: names every file that is not committed, and every file that the configuration names and the copy
            would lack: ignored by git, left out of archives, in a submodule that is not checked out.
    """
    if job.profile.packager != "git":
        return
    root = git_root()
    if changed := _git(root, "status", "--porcelain").splitlines():
        raise ConfigError.listing(
            "packager: git sends what is committed, and these files are not: commit, remove or ignore them",
            [line.strip() for line in changed[:LISTED]],
        )
    if problems := [*_submodules(root), *_missing(root, config, config_path)]:
        raise ConfigError.listing("packager: git would send a copy of HEAD that the run cannot use", problems[:LISTED])


def _submodules(root: Path) -> Iterator[str]:
    """Submodules whose files nemo-run does not send, or not to where they belong."""
    own = [path for _, path in _status(root)]
    for state, path in _status(root, "--recursive"):
        if state == "-":
            yield f"the submodule {path} is not checked out: git submodule update --init --recursive"
        elif path not in own:
            yield f"the submodule {path} is inside another one, whose files would be sent to another folder: remove it"


def _status(root: Path, *options: str) -> list[tuple[str, str]]:
    """State (`-`: not checked out) and path of each submodule."""
    text = _git(root, "submodule", "status", *options)
    return re.findall(r"^(.)[0-9a-f]+ (.+?)(?: \([^()\n]*\))?$", text, re.MULTILINE)


def _missing(root: Path, config: Config, config_path: Path) -> Iterator[str]:
    """What the run reads below `root` and the copy would not have, with the key or file that names it."""
    sent = _Sent(root)
    for file in files_of(config_path):
        inside = file.resolve().is_relative_to(root.resolve())
        if inside or not file.is_absolute() or ".." in file.parts:  # else a base that is read where it is
            yield from sent.lacks(file.resolve(), "the configuration")
    for key, value in _named(root, config):
        path = Path(value).expanduser()
        if path.is_absolute():  # read where it is
            continue
        here, there = path.resolve(), (root / path).resolve()
        if here != there and here.exists():
            yield f"{key}={value} is {here}, and jobs begin at {root}: name it from there"
        else:
            yield from sent.lacks(there, f"{key}={value}")
    for part in config.reward.each_function():
        for file in imported_files(root, part.function.partition(":")[0]):
            yield from sent.lacks(file, f"{config.reward.key}={part.function}")


def _named(root: Path, config: Config) -> list[tuple[str, str]]:
    """Keys and values that are files or folders: they can be nothing else, or are there."""
    named = list(named_files(config))
    keys = [("model.path", config.model.path)]
    keys += [
        ("data.sources" if config.data.sources else "data.source", part.source) for part in config.data.each_source()
    ]
    there = [(key, value) for key, value in keys if (root / value).exists() or Path(value).exists()]
    return [*named, *(entry for entry in there if entry not in named)]


class _Sent:
    """The files of a copy of HEAD."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        names = _git(root, "ls-files", "-z", "--recurse-submodules").split("\0")
        self.names = {name for name in names if name}
        folders = {str(folder) for name in self.names for folder in Path(name).parents}
        asked = "\0".join([*self.names, *folders])
        said = _git(root, "check-attr", "--stdin", "-z", "export-ignore", input=asked).split("\0")
        self.left_out = {name for name, state in zip(said[::3], said[2::3], strict=False) if state == "set"}

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
                why = "is ignored by git" if file.exists() else "is not there"
                yield f"{named_by}: {name} {why}, so that it is not sent: commit it (git add --force)"
            elif {name, *map(str, Path(name).parents)} & self.left_out:
                yield f"{named_by}: {name} is left out of archives (export-ignore in .gitattributes)"


def _git(root: Path, *arguments: str, input: str | None = None) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, input=input)
    if done.returncode:
        raise ConfigError(f"packager: git, but `git {arguments[0]}` failed in {root}: {done.stderr.strip()}")
    return done.stdout
