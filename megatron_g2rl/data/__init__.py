"""Where prompts come from (prompts), how responses are cut into updates and micro-batches (batching), and the built-in
task with its small model (tasks, tiny_model)."""
