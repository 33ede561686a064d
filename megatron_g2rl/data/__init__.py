"""Prompt loading (`prompts`), splitting responses into updates and micro-batches (`batching`), and the built-in task
with its small model (`tasks`, `tiny_model`)."""
