"""Base class of user-facing errors; the CLI prints the message without a traceback."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix; its message says what is wrong and how to fix it."""


class Interrupted(UserError):
    """A run was interrupted by an external cause; the CLI appends the checkpoint from which it can resume."""


def as_disk_error(error: OSError, folder: Path) -> Exception:
    """Turn a full or read-only disk into a user-facing error; return any other error unchanged."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return error
    return Interrupted(f"the run cannot write to {error.filename or folder}: {error.strerror}. Free disk space there")


LOST_RANK_PREFIX = "the connection to another rank is lost"
"""Prefix of the message of a rank that ends only because another rank ended."""
_STORE_ERRORS = ("DistNetworkError", "DistStoreError")
"""Names of torch's errors about the key-value store, which rank 0 hosts."""


def as_lost_rank_error(error: RuntimeError) -> Exception:
    """Turn a collective's timeout or lost connection into a user-facing error; return any other error unchanged."""
    text = str(error)
    if "gloo/transport" in text and "Timed out" in text:
        return Interrupted(
            f"another rank did not take part in a collective ({text.splitlines()[0]}): it is running, but not at the "
            "same point as this rank; check the last messages of all ranks. Set G2RL_COLLECTIVE_SECONDS to wait longer"
        )
    if "gloo/transport" not in text and type(error).__name__ not in _STORE_ERRORS:
        return error
    return Interrupted(f"{LOST_RANK_PREFIX}: that rank ended; its last message, or whatever killed it, is the cause")
