"""The error type of data loading."""

from megatron_g2rl.errors import UserError


class DataError(UserError):
    """The data source cannot be used as configured; the message gives location and fix."""
