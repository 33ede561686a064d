"""Hugging Face checkpoints and Megatron shards: reading, writing, converting, and streaming in both directions."""
