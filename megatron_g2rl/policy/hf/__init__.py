"""Hugging Face checkpoints and Megatron shards: one table of names a model family, and streams in both directions."""
