"""The trained model on Megatron-Core: layout, layers, head, schedules, optimizer, checkpoints, Hugging Face weights.

Importing it checks the version of megatron-core and, without CUDA, prepares megatron-core to run on a CPU. The head
works without megatron-core, so that it can be tested on a GPU machine that has only torch.
"""

import importlib.util

from megatron_g2rl.policy import megatron_compat

if importlib.util.find_spec("megatron") is not None:
    megatron_compat.prepare()
