"""The base of errors whose message is all that the person at the keyboard needs."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(Exception):
    """Something the user can mend; the command prints the message, which says what and how, without a traceback."""


class Interrupted(UserError):
    """A run was cut short from outside: the command adds from where it goes on when it is given again."""


def told_of_disk(error: OSError, folder: Path) -> Exception:
    """What a full or read-only disk means for the run in `folder`; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return error
    return Interrupted(f"the run cannot write to {error.filename or folder}: {error.strerror}. Free disk space there")


def told_of_lost_rank(error: RuntimeError) -> Exception:
    """What a connection that another rank has closed means here; any other error as it is."""
    if "gloo/transport" not in str(error):
        return error
    return Interrupted(
        "the connection to another rank is lost: that rank ended, and what it said last, or what killed it, is the "
        "cause"
    )
