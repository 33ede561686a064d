"""Protects the state of the training process from an engine that runs inside it.

Starting vLLM in-process seeds the global random-number generators, replaces `torch.set_num_threads` by a no-op, and
sets LD_PRELOAD and LOCAL_WORLD_SIZE, which child processes inherit; on a CPU its sampling also draws from torch's
global generator. Resumed and uninterrupted runs would then differ, so all of this is restored.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

ENGINE_VARIABLES = ("VLLM_",)
"""Environment variables with these prefixes belong to the engine and are not restored."""


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore random-number generators, thread settings, default dtype and environment on exit."""
    generators = (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    device_generator = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    dtype = torch.get_default_dtype()
    environment = dict(os.environ)
    try:
        yield
    finally:
        random.setstate(generators[0])
        numpy.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if device_generator is not None:
            torch.cuda.set_rng_state(device_generator)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        _restore_environment(environment)


def _restore_environment(before: dict[str, str]) -> None:
    for name in [name for name in os.environ if not name.startswith(ENGINE_VARIABLES)]:
        if name not in before:
            del os.environ[name]
        elif os.environ[name] != before[name]:
            os.environ[name] = before[name]
    for name in before.keys() - os.environ.keys():
        os.environ[name] = before[name]
