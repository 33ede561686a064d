"""Imports the real Python layers of Transformer Engine on a machine without a GPU; its extension is a stand-in.

Parameters, names, attributes and checkpoint keys come from the Python part; nothing can be computed.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.metadata
import os
import sys
import types
from pathlib import Path

COMPILED = "transformer_engine_torch"
OPTIONAL = ("triton", "onnxscript", "onnx", "nvdlfw_inspect", "flash_attn", "flash_attn_3", "cutlass", "cudnn")
"""Packages that Transformer Engine imports and a CPU machine lacks."""
_DTYPES = dict(kByte=0, kInt32=2, kFloat32=4, kFloat16=5, kBFloat16=6, kFloat8E4M3=7, kFloat8E5M2=8, kFloat4E2M1=10)
_PARTS = ("INPUT", "WEIGHT", "OUTPUT")
ENUMS = {
    "DType": _DTYPES,
    "NVTE_Fused_Attn_Backend": dict(NVTE_No_Backend=-1, NVTE_F16_arbitrary_seqlen=1, NVTE_FP8=2),
    "FP8FwdTensors": {f"GEMM{n}_{part}": 3 * n + i - 3 for n in (1, 2, 3) for i, part in enumerate(_PARTS)},
    "FP8BwdTensors": {
        f"GRAD_{part}{n}": 2 * n + i - 2 for n in (1, 2, 3) for i, part in enumerate(("INPUT", "OUTPUT"))
    },
}


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


class _AnyMeta(type):
    def __getattr__(cls, name):
        if _dunder(name):
            raise AttributeError(name)
        return _Any()


class _Any(metaclass=_AnyMeta):
    """Placeholder for every object of the extension: can be called, compared, indexed and subclassed."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if _dunder(name):
            raise AttributeError(name)
        return _Any()

    def __class_getitem__(cls, key):
        return cls

    def __mro_entries__(self, bases):
        return (object,)

    def __call__(self, *args, **kwargs):
        return _Any()

    def __getitem__(self, key):
        return _Any()

    def __iter__(self):
        return iter(())

    def __index__(self):
        return 0

    __int__ = __index__

    def __or__(self, other):
        return self

    def __lt__(self, other):
        return False


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if _dunder(name):
            raise AttributeError(name)
        value = type(name, (_Any,), {}) if name[0].isupper() else _Any()
        setattr(self, name, value)
        return value


class _Finder:
    """Creates stand-ins for `OPTIONAL` packages and everything inside them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Module(spec.name)
        module.__path__, module.__version__ = [], "3.6.0"
        return module

    def exec_module(self, module):
        pass


class _H100:
    major, minor, multi_processor_count, total_memory, name = 9, 0, 132, 80 << 30, "NVIDIA H100"


def install(sources: Path, version: str) -> None:
    """Import Transformer Engine from its sources, with an H100 as the device it queries.

    Args:
        sources: folder that has `transformer_engine`.
        version: its version.
    """
    import torch

    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "TORCHDYNAMO_DISABLE": "1"}
    sys.path.insert(0, str(sources))
    sys.meta_path.append(_Finder())
    compiled = _Module(COMPILED)
    compiled.__spec__ = importlib.machinery.ModuleSpec(COMPILED, None, is_package=True)
    compiled.__file__, compiled.__path__ = "stand-in", []
    compiled.__all__ = [*ENUMS, "get_cudnn_version"]
    if int(version.split(".")[1]) < 13:
        ENUMS["NVTE_Fused_Attn_Backend"]["NVTE_F16_max512_seqlen"] = 0
    for name, members in ENUMS.items():
        setattr(compiled, name, enum.IntEnum(name, members))
    compiled.get_cudnn_version = lambda: 91_400
    sys.modules[COMPILED] = compiled
    true_version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        version if name.replace("_", "-").startswith("transformer-engine") else true_version(name)
    )
    torch.cuda.get_device_properties = lambda *args, **kwargs: _H100
    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine

    transformer_engine.__version__ = version
    import transformer_engine.pytorch  # noqa: F401
