"""Runs megatron-core over gloo on a machine without CUDA; does nothing if CUDA is available.

megatron-core uses CUDA by name in about two hundred places (current_device, device="cuda", streams, pinned memory, CUDA
generators). `install` replaces each of them with its CPU equivalent: tensors are created on the CPU, streams and events
are empty because CPU operations are already ordered, and the CUDA generator is the CPU generator. The numbers that
megatron computes do not change.

`megatron_compat.prepare` installs it before anything imports `megatron.core`.
"""

from __future__ import annotations

import contextlib
import logging

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor zeros ones empty full arange empty_like zeros_like ones_like full_like rand randn randint empty_strided"
).split()
_installed = False


def install() -> None:
    """Replace the CUDA calls of megatron with CPU equivalents; later calls do nothing. Call it only without CUDA."""
    global _installed
    if _installed:
        return
    # Suppress the warning about a missing CUDA runtime, which is expected here.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime is found" not in record.getMessage()
    )
    _place_tensors_on_cpu()
    _empty_streams()
    _cpu_generator_for_cuda_generator()
    _installed = True


def _place_tensors_on_cpu() -> None:
    torch.cuda.current_device = lambda: _CPU
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    # The cached set of real constructors must be built before they are wrapped, or torch.device("meta") stops working.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory):
    def wrapped(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    wrapped.__name__ = factory.__name__
    wrapped.__wrapped__ = factory
    return wrapped


class _Ordered:
    """Stand-in for a stream or event of a device whose operations are already ordered."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def wait(self, *args):
        pass

    def record(self, *args):
        pass

    def record_event(self, event=None):
        return event or _Ordered()

    def synchronize(self):
        pass

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def _empty_streams() -> None:
    cuda = torch.cuda
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _Ordered
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Ordered()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_stream = lambda stream: None
    torch.Tensor.record_stream = lambda self, stream: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = lambda *args, **kwargs: None


def _cpu_generator_for_cuda_generator() -> None:
    def get_state(*args, **kwargs):
        return torch.get_rng_state()

    def set_state(state, *args, **kwargs):
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    # torch.manual_seed would call back into torch.cuda.manual_seed_all.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
