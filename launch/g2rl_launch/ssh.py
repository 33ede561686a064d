"""The one way to a login node: OpenSSH's own `ssh`, with all that the user's configuration says of a host.

So jump hosts, agents, included files and host keys mean the same to the questions about a run (`runs`), to the checks
before a launch (`there`) and to nemo-run (`nemo`, in whose environment there is little but the standard library).
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
"""Seconds to wait for a connection, where the user's configuration does not say."""
SSHS_OWN = 255
"""Exit code of ssh when it is ssh that failed."""


@dataclass(frozen=True)
class Ssh:
    """A login node, as the user reaches it."""

    host: str
    """Its name, or a Host of ~/.ssh/config."""
    user: str | None = None
    """User name there; None: as ssh says."""
    identity: str | None = None
    """File of a key; None: ssh's own choice."""

    def words(self) -> list[str]:
        """`ssh OPTIONS -- HOST`, to be followed by a command as one word; never asks for anything."""
        return ["ssh", "-oBatchMode=yes", *_patience(self), *_shared(self), *self._who(), "--", self.host]

    def settings(self) -> dict[str, str]:
        """What the user's configuration makes of the host (`ssh -G`), by option; the first value of each.

        Empty when ssh cannot read it, which it says itself when it is to connect.

        Raises:
            UserError: there is no ssh here, or the key is not there.
        """
        return _settings(self)

    def _who(self) -> list[str]:
        # ssh goes on without a key that is not there, and says in the end that nothing fits.
        if self.identity and not Path(self.identity).expanduser().is_file():
            raise UserError(f"tunnel.identity: there is no file {self.identity}")
        user = [f"-l{self.user}"] if self.user else []
        return [*user, *([f"-i{Path(self.identity).expanduser()}"] if self.identity else [])]

    def not_reached(self, said: str) -> str:
        """What to tell when ssh itself failed and `said` why."""
        by_hand = shlex.join(["ssh", *self._who(), self.host, "true"])
        return (
            f"{self.host} cannot be reached: {said or 'ssh said nothing'}; `{by_hand}` has to work without being asked "
            "for anything"
        )


@functools.cache
def _settings(ssh: Ssh) -> dict[str, str]:
    try:
        done = subprocess.run(["ssh", "-G", *ssh._who(), "--", ssh.host], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("ssh is not on this machine (tunnel.kind: ssh)") from None
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name.lower(), value)
    return found


def _patience(ssh: Ssh) -> list[str]:
    """Options that end a wait for a machine that is gone; the user's own settings win."""
    settings = ssh.settings()
    found = [f"-oConnectTimeout={CONNECT_S}"] if settings.get("connecttimeout", "none") == "none" else []
    if settings.get("serveraliveinterval", "0") == "0":
        found.append(f"-oServerAliveInterval={CONNECT_S}")
    return found


@functools.cache
def _shared(ssh: Ssh) -> list[str]:
    """Options by which this command's many small questions take one connection; the user's own ControlPath wins."""
    if ssh.settings().get("controlpath", "none") != "none":
        return []
    # Home folders on network file systems hold no sockets, and the names of sockets have to be short.
    folder = tempfile.mkdtemp(prefix="g2rl-ssh-", dir="/tmp")
    options = [f"-oControlPath={folder}/%C"]

    def close() -> None:
        subprocess.run(["ssh", *options, "-Oexit", *ssh._who(), "--", ssh.host], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)
    return ["-oControlMaster=auto", "-oControlPersist=60", *options]
