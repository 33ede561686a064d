"""The base of errors whose message is all that the person at the keyboard needs."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the command prints the message, which says what and how, without a traceback."""
