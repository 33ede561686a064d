"""All uses of private or version-dependent parts of megatron-core.

The rest of the package imports only public names of `megatron.core`. A test checks `PRIVATE`, and every name that is
imported anywhere, against the sources of the versions in `SUPPORTED` and of those between them.

`prepare` must run before anything imports `megatron.core`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_g2rl.distributed.environment import set_device_variables
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import cpu_backend, transformer_engine

SUPPORTED = ("0.16.1", "0.19.2")
"""Versions of megatron-core that are tested: for Python 3.11, and for Python 3.12 and newer."""

PRIVATE = {
    "megatron/core/parallel_state.py": {
        "create_group": (
            "ranks",
            "timeout",
            "backend",
            "pg_options",
            "use_local_synchronization",
            "group_desc",
        ),
    },
    "megatron/core/optimizer/distrib_optimizer.py": {
        "DistributedOptimizer._get_model_param_range_map": ("self", "param"),
    },
    "megatron/core/tensor_parallel/random.py": {
        "_set_cuda_rng_state": ("new_state", "device", "graph_safe"),
    },
    "megatron/core/transformer/moe/token_dispatcher.py": {
        "maybe_move_tensor_to_cpu": ("tensor", "as_numpy", "record_stream"),
    },
}
"""File -> name -> parameters of the private functions of megatron-core that this module uses or replaces."""

DEVELOPER_WARNINGS = (
    ("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context"),
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
)
"""Logger and text of the warnings that are dropped; the last two are of megatron-core 0.19."""

_prepared = False


class UnsupportedVersion(UserError):
    """The installed version of megatron-core is not a tested one."""


def check_version() -> str:
    """The version of the installed megatron-core.

    Raises:
        UnsupportedVersion: it is not in `SUPPORTED`, on a GPU or without one.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedVersion(f"megatron-core is not installed: {_remedy()}") from error
    if version.partition("+")[0] not in SUPPORTED:
        raise UnsupportedVersion(
            f"megatron-core {version} is not supported: supported versions are {' and '.join(SUPPORTED)}. {_remedy()}"
        )
    return version


def _remedy() -> str:
    return (
        f"Install megatron-core=={SUPPORTED[-1]} with Python 3.12 or newer, or megatron-core=={SUPPORTED[0]} with "
        "Python 3.11"
    )


def prepare() -> None:
    """Check the version and, without CUDA, prepare Megatron to run on a CPU; later calls do nothing.

    Raises:
        UnsupportedVersion: the installed megatron-core is not in `SUPPORTED`.
    """
    global _prepared
    if _prepared:
        return
    check_version()
    set_device_variables("cuda" if torch.cuda.is_available() else "cpu")  # for programs that are not a rank
    transformer_engine.hide_unusable()
    _drop_warnings_for_developers()
    if not torch.cuda.is_available():
        cpu_backend.install()
        _cpu_random_state()
        _name_cpu_parameters_like_cuda()
        _split_sizes_as_numbers()
    _prepared = True


def _drop_warnings_for_developers() -> None:
    """Drop warnings of Megatron about how it is called, which the user of a run can do nothing about."""
    for name, text in DEVELOPER_WARNINGS:
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())


def _cpu_random_state() -> None:
    import megatron.core.tensor_parallel.random as tracker

    tracker._set_cuda_rng_state = torch.cuda.set_rng_state


def _name_cpu_parameters_like_cuda() -> None:
    """Report CUDA type names: Megatron's optimizers group parameters by type name and know only CUDA tensors."""
    import sys

    original = torch.Tensor.type

    def type_name(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        asks_for_name = not args and not kwargs
        if asks_for_name and "megatron/core/optimizer" in sys._getframe(1).f_code.co_filename:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_name


def _split_sizes_as_numbers() -> None:
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    original = dispatcher.maybe_move_tensor_to_cpu

    def split_sizes(tensor, as_numpy=False, record_stream=False):
        moved = original(tensor, as_numpy=as_numpy, record_stream=False)
        # Megatron converts split sizes to numpy only if they are on a GPU; all_to_all needs numbers.
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    dispatcher.maybe_move_tensor_to_cpu = split_sizes


def allow_experts_without_transformer_engine() -> None:
    """Define a name that the experts of megatron-core 0.16.1 use but do not define without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    if "te_general_gemm" not in vars(moe_utils):
        moe_utils.te_general_gemm = None


@contextmanager
def groups_on(backend: str | None) -> Iterator[None]:
    """Inside this context, Megatron creates process groups with `backend` unless it specifies another.

    Args:
        backend: backend of the groups; None: that of the world, Megatron's default.
    """
    from megatron.core import parallel_state

    original = parallel_state.create_group

    def create_group(*args, **kwargs):
        bound = inspect.signature(original).bind(*args, **kwargs)
        if bound.arguments.get("backend") is None:
            bound.arguments["backend"] = backend
        return original(*bound.args, **bound.kwargs)

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = original


def adam_class() -> type[torch.optim.Optimizer]:
    """The Adam class that Megatron uses: Transformer Engine's, apex's or torch's."""
    from megatron.core.optimizer import Adam

    return Adam


def inner_optimizers(optimizer) -> list:
    """The optimizers that `get_megatron_optimizer` chained, one for dense parameters and one for experts."""
    from megatron.core.optimizer import ChainedOptimizer

    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [inner for inner in chained if inner.optimizer is not None]


def is_distributed(optimizer) -> bool:
    """Whether an inner optimizer is sharded over the data-parallel ranks."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(optimizer, DistributedOptimizer)


def span_in_parameter(optimizer, parameter: torch.nn.Parameter) -> tuple[int, int]:
    """(first element, end) of the part of a flattened parameter that this rank updates.

    Args:
        optimizer: megatron's DistributedOptimizer.
        parameter: model parameter; a key of `optimizer.model_param_group_index_map`.
    """
    span = optimizer._get_model_param_range_map(parameter)["param"]
    return span.start, span.end


def master_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The float32 master weight of a model parameter in a replicated optimizer; a float32 parameter is its own."""
    return getattr(parameter, "main_param", parameter)
