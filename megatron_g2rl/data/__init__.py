"""Prompt loading (`prompts`), splitting responses into updates and micro-batches (`batching`), and the built-in tasks
with their small model (`tasks`, `tiny_model`)."""
