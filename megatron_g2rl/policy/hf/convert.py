"""Converts checkpoints between Hugging Face and Megatron folders, one tensor at a time, and verifies what was written.

    g2rl convert hf-to-megatron Qwen3-0.6B qwen3-0.6b-megatron
    g2rl convert megatron-to-hf runs/mine/checkpoints/step_00000200 published

A Megatron folder has the tensors in megatron.core.dist_checkpointing's torch_dist format: one conversion serves every
layout. The model is built on the meta device only, and no GPU is used. The output goes to a folder next to the
destination, which is renamed after everything has been read back and compared: a destination is complete or absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_g2rl.config.run_files import MEGATRON, is_megatron_folder
from megatron_g2rl.policy.checkpoint import manifest
from megatron_g2rl.policy.checkpoint.checkpoints import latest
from megatron_g2rl.policy.checkpoint.model_files import copy_model_files
from megatron_g2rl.policy.hf.conversion_folder import destination, set_dtype
from megatron_g2rl.policy.hf.digest import Digest, digest
from megatron_g2rl.policy.hf.megatron_folder import (
    MegatronTensors,
    write_megatron,
)
from megatron_g2rl.policy.hf.megatron_loading import compare
from megatron_g2rl.policy.hf.megatron_plan import ModelPlan, Planned, plan_model
from megatron_g2rl.policy.hf.progress import Progress
from megatron_g2rl.policy.hf.tensor_folder import SHARD_BYTES, Header, TensorFolder, WeightsError, write_tensors
from megatron_g2rl.policy.hf.values import refuse_lost_numbers
from megatron_g2rl.policy.hf.weights import check_tensors, refuse_own_head
from megatron_g2rl.policy.models.architecture import read_architecture
from megatron_g2rl.policy.models.shards import join, split


def hf_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    family: str | None = None,
) -> None:
    """Write a Megatron folder from a Hugging Face folder, with one tensor and the pages of its file in memory.

    Args:
        source: Hugging Face folder of safetensors files.
        target: new folder.
        dtype: dtype of the written tensors; None: unchanged.
        overwrite: replace `target` at the end.
        family: as `model.family`: a registered name or an import path; None: the registered one of its `model_type`.

    Raises:
        WeightsError: a tensor is missing, has another shape, is not part of the model, or differs when read back.
        ConversionError: `target` already exists, or cannot be written.
        UnsupportedModel: the architecture is not supported.
    """
    source = _folder(source)
    if is_megatron_folder(source):
        raise WeightsError(f"{source} is already a Megatron folder")
    if checkpoint := _latest_checkpoint(source):
        raise WeightsError(
            f"{source} is the folder of a run; its checkpoints are already Megatron folders, the latest is {checkpoint}"
        )
    architecture = read_architecture(source, family)
    tensors = TensorFolder(source)
    headers = check_tensors(tensors, architecture)
    refuse_own_head(tensors, architecture)
    plan = plan_model(architecture)
    for name, shape in plan.hf_shapes().items():
        if headers[name].shape != shape:
            raise WeightsError(f"{source}: tensor {name!r} has shape {headers[name].shape}, expected {shape}")
    dtypes = [_dtype(source, parameter, headers, dtype) for parameter in plan.parameters]
    _refuse_mixed(source, plan, dtypes)
    with destination(source, target, overwrite) as folder, Progress(2 * _bytes(headers, dtype)) as progress:
        progress.phase(f"writing {target}")
        reader = _Reader(tensors, plan, dtypes, progress)
        write_megatron(folder / MEGATRON, plan, dtypes, reader)
        digests = reader.digests
        del reader  # and the pages of the last tensor
        _finish(source, folder, set(dtypes) if dtype else set())
        progress.phase("reading it back")
        _compare(_stored(MegatronTensors(folder), plan, progress), digests, target)
        manifest.write(folder)


def megatron_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    family: str | None = None,
) -> None:
    """Write a Hugging Face folder from a Megatron folder: a converted model, or a run's checkpoint of any layout.

    Args:
        source: Megatron folder.
        target: new folder.
        dtype: dtype of the written tensors; None: unchanged.
        shard_bytes: size at which a new safetensors file is started.
        overwrite: replace `target` at the end.
        family: as `model.family`: a registered name or an import path; None: the registered one of its `model_type`.

    Raises:
        WeightsError: the folder is corrupt, or a tensor is missing, has another shape, is not part of the model, or
            differs when read back.
        ConversionError: `target` already exists, or cannot be written.
        UnsafePickle: a pickle in `source` could run code.
    """
    source = _folder(source)
    if not is_megatron_folder(source):
        if checkpoint := _latest_checkpoint(source):
            raise WeightsError(f"{source} is the folder of a run: give its latest checkpoint, {checkpoint}")
        raise WeightsError(
            f"{source} is not a Megatron folder: it has no subfolder {MEGATRON}. Give a converted model, or a "
            "checkpoint of a run: RUN/checkpoints/step_00000020"
        )
    if messages := manifest.find_corruption(source):
        raise WeightsError(f"{manifest.corruption_message(source, messages)}. {manifest.REMEDY}")
    architecture = read_architecture(source, family)
    plan, stored = plan_model(architecture), MegatronTensors(source)
    padded = {p.key for q in plan.parameters if q.kind == "vocab" for p in q.pieces}
    compare(source, stored.tensors(), {p.key: p.stored for q in plan.parameters for p in q.pieces}, padded)
    headers = {
        name: Header(shape, dtype or stored.tensors()[parameter.pieces[0].key].properties.dtype)
        for parameter in plan.parameters
        for name, shape in zip(parameter.mapped.hf, parameter.hf_shapes, strict=True)
    }
    digests: dict[str, Digest] = {}
    with destination(source, target, overwrite) as folder, Progress(2 * _bytes(headers, None)) as progress:
        progress.phase(f"writing {target}")
        write_tensors(folder, headers, _converted(stored, plan, dtype, digests, progress), shard_bytes)
        _finish(source, folder, {header.dtype for header in headers.values()})
        progress.phase("reading it back")
        written = TensorFolder(folder)
        read = ((name, progress.passed(written.read(name))) for name in written.headers())
        _compare(((name, digest(tensor)) for name, tensor in read), digests, target)


def _folder(source: str | Path) -> Path:
    if not Path(source).is_dir():
        raise WeightsError(
            f"{source} is not a folder (relative paths start at {Path.cwd()}); download a model from the Hub first: "
            "hf download NAME --local-dir FOLDER"
        )
    return Path(source)


def _latest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a run, if `folder` is the folder of a run or of its checkpoints."""
    return None if (folder / "config.json").exists() else latest(folder / "checkpoints") or latest(folder)


class _Reader:
    """Provides the rows of pieces to be written, from the Hugging Face tensors, and records the tensors' digests."""

    def __init__(self, tensors: TensorFolder, plan: ModelPlan, dtypes: list[torch.dtype], progress: Progress):
        self.tensors, self.plan, self.dtypes, self.progress = tensors, plan, dtypes, progress
        self.digests: dict[str, Digest] = {}
        self._place: tuple[int, int] | None = None
        self._piece: Tensor | None = None

    def __call__(self, number: int, piece: int, start: int, end: int) -> Tensor:
        if self._place != (number, piece):
            self._piece = None  # before the next is read
            self._piece, self._place = self._read(number, piece), (number, piece)
        return self._piece[start:end].to(self.dtypes[number])

    def _read(self, number: int, piece: int) -> Tensor:
        parameter, dtype = self.plan.parameters[number], self.dtypes[number]
        # A checkpoint stores gate and up projection separately, as Hugging Face does: one tensor in memory is enough.
        gated = parameter.kind == "gated"
        names = parameter.mapped.hf[piece : piece + 1] if gated else parameter.mapped.hf
        tensors = []
        for name in names:
            tensor = self.tensors.read(name)
            refuse_lost_numbers(tensor, name, self.tensors.folder, dtype)
            self.digests[name] = digest(tensor, dtype)
            self.progress.advance(tensor.numel() * dtype.itemsize)
            tensors.append(tensor)
        return split("replicated" if gated else parameter.kind, tensors, self.plan.shapes, 0, 1)


def _stored_tensors(stored: MegatronTensors, plan: ModelPlan) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of a Megatron folder."""
    for parameter in plan.parameters:
        if parameter.kind == "gated":
            for name, piece in zip(parameter.mapped.hf, parameter.pieces, strict=True):
                yield name, stored.read(piece)
            continue
        # The padding of the vocabulary, which depends on the layout that wrote it, is not read.
        rows = plan.shapes.vocab_size if parameter.kind == "vocab" else None
        tensors = join(parameter.kind, [stored.read(parameter.pieces[0], rows)], plan.shapes)
        for name in parameter.mapped.hf:
            yield name, tensors.pop(0)


def _converted(stored, plan, dtype, digests, progress) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _stored_tensors(stored, plan):
        refuse_lost_numbers(tensor, name, stored.folder, dtype)
        tensor = tensor if dtype is None else tensor.to(dtype)
        digests[name] = digest(tensor)
        yield name, progress.passed(tensor)
        del tensor


def _stored(stored, plan, progress) -> Iterator[tuple[str, Digest]]:
    for name, tensor in _stored_tensors(stored, plan):
        yield name, digest(progress.passed(tensor))
        del tensor


def _compare(written: Iterator[tuple[str, Digest]], expected: dict[str, Digest], target: str | Path) -> None:
    """Check that exactly the expected tensors were written, with the same shape, dtype and bytes."""
    read_back = dict(written)
    for name in expected.keys() | read_back.keys():
        if read_back.get(name) != expected.get(name):
            raise WeightsError(
                f"{target}: tensor {name!r} differs from the source when read back ({expected.get(name)}, read back: "
                f"{read_back.get(name)}): the disk or its file system may be failing; the output was removed"
            )


def _dtype(source: Path, parameter: Planned, headers: dict[str, Header], dtype: torch.dtype | None) -> torch.dtype:
    dtypes = {headers[name].dtype for name in parameter.mapped.hf}
    if dtype is None and len(dtypes) > 1:
        raise WeightsError(_mixed(source, parameter.mapped.hf, headers))
    return dtype or dtypes.pop()


def _refuse_mixed(source: Path, plan: ModelPlan, dtypes: list[torch.dtype]) -> None:
    """Refuse different dtypes among tensors that are stored as one tensor, such as those of all layers."""
    first: dict[str, int] = {}
    for number, parameter in enumerate(plan.parameters):
        for piece in parameter.pieces:
            other = first.setdefault(piece.key, number)
            if dtypes[other] != dtypes[number]:
                names = (plan.parameters[other].mapped.hf[0], parameter.mapped.hf[0])
                kinds = f"{dtypes[other]} and {dtypes[number]}"
                raise WeightsError(f"{source}: tensors {', '.join(names)} are {kinds}: choose one with --dtype")


def _mixed(source: Path, names: tuple[str, ...], headers: dict[str, Header]) -> str:
    return f"{source}: tensors {', '.join(names)} are {[headers[n].dtype for n in names]}: choose one with --dtype"


def _bytes(headers: dict[str, Header], dtype: torch.dtype | None) -> int:
    return sum(torch.Size(h.shape).numel() * (dtype or h.dtype).itemsize for h in headers.values())


def _finish(source: Path, folder: Path, dtypes: set[torch.dtype]) -> None:
    """Copy the config and tokenizer files, and set the dtype in config.json if all tensors have the same."""
    copy_model_files(source, folder)
    if len(dtypes) == 1:
        set_dtype(folder / "config.json", dtypes.pop())
