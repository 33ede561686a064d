"""Connections to a login node through OpenSSH's own `ssh`, which applies the user's complete configuration.

Jump hosts, agents, included files and host keys therefore work the same for commands about a run (`run`), for the
checks before a launch (`preflight`) and for nemo-run (`nemo`).
"""

from __future__ import annotations

import atexit
import functools
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_g2rl.errors import UserError

CONNECT_S = 15
"""Connection timeout in seconds if the user's configuration sets none."""
SSHS_OWN = 255
"""Exit code of ssh if ssh itself failed, not the command."""


@dataclass(frozen=True)
class Ssh:
    """A login node, as the user reaches it."""

    host: str
    """Its name, or a Host of ~/.ssh/config."""
    user: str | None = None
    """User name there; None: ssh's default."""
    identity: str | None = None
    """File of a key; None: ssh's default."""

    def words(self) -> list[str]:
        """`ssh OPTIONS -- HOST`, to be followed by a command as one word; never prompts."""
        return ["ssh", "-oBatchMode=yes", *_timeouts(self), *_shared(self), *self._who(), "--", self.host]

    def settings(self) -> dict[str, str]:
        """The user's configuration of the host (`ssh -G`), by option; the first value of each.

        Empty if ssh cannot read it, which it reports when it connects.

        Raises:
            UserError: ssh is not installed, or the key file does not exist.
        """
        return _settings(self)

    def _who(self) -> list[str]:
        # ssh ignores a missing key file, and then reports that permission is denied.
        if self.identity and not Path(self.identity).expanduser().is_file():
            raise UserError(f"tunnel.identity: there is no file {self.identity}")
        user = [f"-l{self.user}"] if self.user else []
        return [*user, *([f"-i{Path(self.identity).expanduser()}"] if self.identity else [])]

    def not_reached(self, reason: str) -> str:
        """The error message for a failure of ssh itself."""
        command = shlex.join(["ssh", *self._who(), self.host, "true"])
        reason = reason or "ssh printed nothing"
        return f"{self.host} cannot be reached: {reason}; `{command}` has to work without a prompt"


@functools.cache
def _settings(ssh: Ssh) -> dict[str, str]:
    try:
        done = subprocess.run(["ssh", "-G", *ssh._who(), "--", ssh.host], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("ssh is not installed on this machine (tunnel.kind: ssh)") from None
    options: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        options.setdefault(name.lower(), value)
    return options


def _timeouts(ssh: Ssh) -> list[str]:
    """Timeout options, so that ssh does not wait forever for a dead machine; the user's settings override them."""
    settings = ssh.settings()
    options = [f"-oConnectTimeout={CONNECT_S}"] if settings.get("connecttimeout", "none") == "none" else []
    if settings.get("serveraliveinterval", "0") == "0":
        options.append(f"-oServerAliveInterval={CONNECT_S}")
    return options


@functools.cache
def _shared(ssh: Ssh) -> list[str]:
    """Options with which all commands of a process use one connection, unless the user has set a ControlPath."""
    if ssh.settings().get("controlpath", "none") != "none":
        return []
    # Network file systems, where home folders may be, do not support sockets, and socket paths have to be short.
    folder = tempfile.mkdtemp(prefix="g2rl-ssh-", dir="/tmp")
    options = [f"-oControlPath={folder}/%C"]

    def close() -> None:
        subprocess.run(["ssh", *options, "-Oexit", *ssh._who(), "--", ssh.host], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)
    return ["-oControlMaster=auto", "-oControlPersist=60", *options]
