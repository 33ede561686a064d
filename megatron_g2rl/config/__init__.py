"""Configuration: the typed tree (`tree`), YAML and overrides (`loading`), cross-field checks (`checks`),
the batch ledger (`ledger`), and the page of all keys made from the tree (`reference`)."""

from megatron_g2rl.config.tree import Config

__all__ = ["Config"]
