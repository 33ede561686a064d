"""Generated tasks for the quickstart, the tests and studies: no download, verifiable answers, any number of problems.

A task generates problems and *demonstrations*: worked solutions, each sampled from the many correct ones. A model
fine-tuned on them spreads its probability over different solution paths, which exploration needs. Everything is a pure
function of (split, seed, index). `registry.TASKS` has their names. Deliberately omitted: natural language and anything
that needs a model too large for a laptop.
"""

from megatron_g2rl.data.tasks.interface import DATASET_SEED, Split, Task, split_of

__all__ = ["DATASET_SEED", "Split", "Task", "split_of"]
