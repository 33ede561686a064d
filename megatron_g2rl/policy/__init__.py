"""The trained model on Megatron-Core: layout, layers, head, schedules, optimizer, checkpoints, Hugging Face weights.

Importing it checks the version of megatron-core and, where there is no CUDA, prepares megatron-core for a CPU. The head
works without megatron-core, which is how it is tried on a bare GPU machine.
"""

import importlib.util

from megatron_g2rl.policy import megatron_compat

if importlib.util.find_spec("megatron") is not None:
    megatron_compat.prepare()
