"""The error of everything that reads data."""

from megatron_g2rl.errors import UserError


class DataError(UserError):
    """The data source cannot be used as configured; the message says where and what to do."""
