"""The trained model on Megatron-Core: layout, layers, head, schedules, optimizer, checkpoints, Hugging Face weights.

Importing it checks the version of megatron-core and, where there is no CUDA, prepares megatron-core for a CPU.
"""

from megatron_g2rl.policy import megatron_compat

megatron_compat.prepare()
