"""Base class of user-facing errors; the CLI prints the message without a traceback."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(Exception):
    """Something the user can mend; the command prints the message, which says what and how, without a traceback."""


class Interrupted(UserError):
    """A run was cut short from outside: the command adds from where it goes on when it is given again."""


def told_of_disk(error: OSError, folder: Path) -> Exception:
    """Turn a full or read-only disk into a user-facing error; return any other error unchanged."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return error
    return Interrupted(f"the run cannot write to {error.filename or folder}: {error.strerror}. Free disk space there")


LOST_RANK = "the connection to another rank is lost"
"""How the message of a rank begins that ends only because another one has."""
_LOST_STORE = ("DistNetworkError", "DistStoreError")
"""torch's errors of the store, which rank 0 hosts."""


def told_of_lost_rank(error: RuntimeError) -> Exception:
    """What a connection that another rank has closed means here; any other error as it is."""
    text = str(error)
    if "gloo/transport" in text and "Timed out" in text:
        return Interrupted(
            f"another rank did not take part in a collective ({text.splitlines()[0]}): it runs, but it is not where "
            "this one is; look at the last messages of all ranks. G2RL_COLLECTIVE_SECONDS waits longer"
        )
    if "gloo/transport" not in text and type(error).__name__ not in _LOST_STORE:
        return error
    return Interrupted(f"{LOST_RANK}: that rank ended, and what it said last, or what killed it, is the cause")
