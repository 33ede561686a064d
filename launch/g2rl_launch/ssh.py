"""Commands where Slurm is: on this machine, or on a login node through OpenSSH's own `ssh`.

`ssh` applies the user's complete configuration, so jump hosts, agents, included files and host keys work the same for
commands about a run (`run`), for the checks before a launch (`preflight`) and for nemo-run (`nemo`).
"""

from __future__ import annotations

import atexit
import functools
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, BinaryIO, Literal

from pydantic import Field

from megatron_g2rl.config.sections.base import Section
from megatron_g2rl.errors import UserError

CONNECT_S = 15
"""Connection timeout in seconds if the user's configuration sets none."""
SSHS_OWN = 255
"""Exit code of ssh if ssh itself failed, not the command."""

Line = Annotated[str, Field(pattern=r"^[^\n\r]*$")]


class NoAnswer(UserError):
    """Slurm, or the machine that it runs on, does not respond: the state of jobs is unknown."""


class Tunnel(Section):
    """How commands reach Slurm."""

    kind: Literal["local", "ssh"] = "local"
    """local: sbatch is on this machine; ssh: on `host`, reached with the user's own ssh keys and agent."""
    host: Line | None = None
    """Login node, or a Host of ~/.ssh/config, for `kind: ssh`."""
    user: Line | None = None
    """User name there; null: ssh's default."""
    identity: Path | None = None
    """File of an ssh key; null: ssh's default."""
    job_folder: Path | None = None
    """Folder on the cluster, visible to all nodes, for job scripts and their output; required for ssh."""

    def run(self, command: Sequence[str]) -> str:
        """Run a command where Slurm is; its output.

        Raises NoAnswer, with ssh's message, if the machine is not reached; UserError if the command fails.
        """
        output = BytesIO()
        self.stream(command, output)
        return output.getvalue().decode(errors="replace")

    def try_run(self, command: Sequence[str]) -> str:
        """Output of a command; empty if it fails. Raises NoAnswer as `run` does."""
        try:
            return self.run(command)
        except NoAnswer:
            raise
        except UserError:
            return ""

    def stream(self, command: Sequence[str], into: BinaryIO) -> None:
        """Copy the output of a command as it arrives. Raises as `run` does; what arrived before has been copied."""
        words = [*self.ssh(), shlex.join(command)] if self.kind == "ssh" else command
        with TemporaryFile() as errors:
            try:
                with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors) as process:
                    while chunk := process.stdout.read1(1 << 16):
                        into.write(chunk)
            except FileNotFoundError:
                raise UserError(f"{command[0]} is not installed on this machine") from None
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()
        if self.kind == "ssh" and process.returncode == SSHS_OWN:
            raise NoAnswer(self.not_reached(message))
        if process.returncode:
            raise UserError(f"{command[0]} failed: {message or process.returncode}{slurm_hint(message)}")

    def ssh(self) -> list[str]:
        """`ssh OPTIONS -- HOST`, to be followed by a command as one word; never prompts."""
        return ["ssh", "-oBatchMode=yes", *self._timeouts(), *_shared(self), *self._who(), "--", str(self.host)]

    def settings(self) -> dict[str, str]:
        """The user's configuration of the host (`ssh -G`) by option; empty if ssh cannot read it, as it then reports.

        Raises UserError if ssh is not installed, or the key file does not exist.
        """
        return _settings(self)

    def not_reached(self, reason: str) -> str:
        """The error message for a failure of ssh itself."""
        command = shlex.join(["ssh", *self._who(), str(self.host), "true"])
        reason = reason or "ssh printed nothing"
        return f"{self.host} cannot be reached: {reason}; `{command}` has to work without a prompt"

    def _who(self) -> list[str]:
        key = self.identity and self.identity.expanduser()
        if key and not key.is_file():  # ssh would ignore it, and report that permission is denied
            raise UserError(f"tunnel.identity: there is no file {self.identity}")
        return [f"-l{self.user}"] * bool(self.user) + [f"-i{key}"] * bool(key)

    def _timeouts(self) -> list[str]:
        """Timeouts, so that ssh does not wait forever for a dead machine, unless the user has set them."""
        settings = self.settings()
        options = [f"-oConnectTimeout={CONNECT_S}"] * (settings.get("connecttimeout", "none") == "none")
        return options + [f"-oServerAliveInterval={CONNECT_S}"] * (settings.get("serveraliveinterval", "0") == "0")


@functools.cache
def _settings(tunnel: Tunnel) -> dict[str, str]:
    try:
        done = subprocess.run(["ssh", "-G", *tunnel._who(), "--", str(tunnel.host)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("ssh is not installed on this machine (tunnel.kind: ssh)") from None
    options: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        options.setdefault(name.lower(), value)  # the first value of each option counts
    return options


@functools.cache
def _shared(tunnel: Tunnel) -> list[str]:
    """Options with which all commands of a process use one connection, unless the user has set a ControlPath."""
    if tunnel.settings().get("controlpath", "none") != "none":
        return []
    # Network file systems, where home folders may be, do not support sockets, and socket paths have to be short.
    folder = tempfile.mkdtemp(prefix="g2rl-ssh-", dir="/tmp")
    options = [f"-oControlPath={folder}/%C"]

    def close() -> None:
        subprocess.run(["ssh", *options, "-Oexit", *tunnel._who(), "--", str(tunnel.host)], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)
    return ["-oControlMaster=auto", "-oControlPersist=60", *options]


def slurm_hint(message: str) -> str:
    """A hint to append to Slurm's message about a missing configuration; empty for other messages."""
    if "configuration source" not in message:
        return ""
    return (
        "\nSlurm's commands find no cluster: SLURM_CONF is not set, or is not a file. "
        'eval "$(launch/local_slurm/up.sh)" sets it for the local Slurm'
    )
