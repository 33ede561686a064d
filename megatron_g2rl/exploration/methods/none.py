"""Plain GRPO: rewards are not shaped. Novelty is that of the update directions, if they are measured."""

from __future__ import annotations

from megatron_g2rl.exploration.methods.gradient import novelty
from megatron_g2rl.exploration.methods.interface import Method

NONE = Method(novelty, needs=(), mapping=None)
