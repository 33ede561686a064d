"""The trained model on Megatron-Core: layout, layers, head, schedules, optimizer, checkpoints, Hugging Face weights."""
