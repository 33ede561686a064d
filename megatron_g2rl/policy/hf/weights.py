"""Streams weights between Hugging Face folders and Megatron shards, one tensor at a time, in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.hf.architecture import Architecture, read_architecture
from megatron_g2rl.policy.hf.families import Mapped, Rule, map_parameter
from megatron_g2rl.policy.hf.shards import Shapes, join, split
from megatron_g2rl.policy.hf.side_files import copy_side_files
from megatron_g2rl.policy.model import padded_vocab_size, unwrap


class WeightsError(UserError):
    """A checkpoint's tensors do not fit the model."""


@dataclass(frozen=True)
class _Local:
    """One parameter of this rank and where it comes from."""

    parameter: nn.Parameter
    mapped: Mapped

    @property
    def rule(self) -> Rule:
        return self.mapped.rule


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that holds no model we can train or whose files are incomplete, from their headers alone.

    Raises:
        UnsupportedModel: its architecture is not one we map.
        WeightsError: a file of weights is missing, incomplete or damaged.
    """
    read_architecture(folder)
    TensorFolder(folder).check()


def _opened(file: Path):
    """`safe_open`, whose errors do not name the file."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        why = "there is no such file" if not file.is_file() else f"it is incomplete or damaged ({error})"
        raise WeightsError(f"{file}: {why}; download or copy the model again") from error


class TensorFolder:
    """Reads single tensors from a Hugging Face folder of safetensors files, with or without an index."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self.files = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise WeightsError(f"{index}: no index of weights ({error}); download or copy it again") from error
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
            if not paths:
                raise WeightsError(f"{folder}: no .safetensors file; save the model with save_pretrained first")
            self.files = {}
            for path in paths:
                with _opened(path) as opened:
                    self.files |= dict.fromkeys(opened.keys(), path.name)

    def check(self) -> None:
        """Open every file once.

        Raises:
            WeightsError: one is missing, incomplete or damaged.
        """
        for name in sorted(set(self.files.values())):
            with _opened(self.folder / name):
                pass

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU.

        Raises:
            WeightsError: there is no such tensor.
        """
        if name not in self.files:
            raise WeightsError(f"{self.folder}: tensor {name!r} is missing")
        with _opened(self.folder / self.files[name]) as opened:
            return opened.get_tensor(name)


class HFWeights:
    """The Hugging Face view of this rank's model chunks."""

    def __init__(self, chunks: Sequence[nn.Module], architecture: Architecture):
        self.architecture = architecture
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        self.expert_group = parallel_state.get_expert_model_parallel_group()
        self.expert_rank = parallel_state.get_expert_model_parallel_rank()
        self.expert_size = parallel_state.get_expert_model_parallel_world_size()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        a = architecture
        self.shapes = Shapes(
            a.head_dim, a.key_value_groups, a.vocab_size, padded_vocab_size(a.vocab_size, self.tensor_size)
        )
        self.local = [entry for chunk in chunks for entry in self._map(unwrap(chunk))]
        self._plan: list[list[tuple[tuple[str, ...], list[torch.Size], torch.dtype]]] | None = None

    def _map(self, model) -> Iterator[_Local]:
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        first_expert = self.expert_rank * ((self.architecture.experts or 0) // self.expert_size)
        for name, parameter in model.named_parameters():
            yield _Local(parameter, map_parameter(self.architecture.family, name, layers, first_expert))

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Fill every local parameter from a Hugging Face folder.

        Raises:
            WeightsError: a tensor is missing or has another shape; the message names it.
        """
        source = TensorFolder(folder)
        for entry in self.local:
            names = entry.mapped.hf
            if self.architecture.tied and names == ("lm_head.weight",):
                names = ("model.embed_tokens.weight",)
            tensors = [source.read(name) for name in names]
            rank, size = (0, 1) if entry.rule.expert and self.expert_size > 1 else (self.tensor_rank, self.tensor_size)
            try:
                shard = split(entry.rule.kind, tensors, self.shapes, rank, size)
            except (RuntimeError, ValueError) as error:
                raise WeightsError(f"{folder}: {', '.join(names)} cannot be split: {error}") from error
            if shard.shape != entry.parameter.shape:
                raise WeightsError(
                    f"{folder}: {', '.join(names)} of shape {[tuple(t.shape) for t in tensors]} "
                    f"do not fill Megatron's {entry.rule.megatron} of shape {tuple(entry.parameter.shape)}"
                )
            entry.parameter.copy_(shard)

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model as (Hugging Face name, full tensor), the same on all ranks, one at a time.

        A collective: all ranks of a model replica take part and must consume it to the end.
        """
        plan = self._gather_plan()
        stages = dist.get_process_group_ranks(self.pipeline_group)
        for stage, entries in enumerate(plan):
            mine = stages[stage] == dist.get_rank()
            for i, pieces in enumerate(entries):
                tensors = self._join(self.local[i]) if mine else [None] * len(pieces)
                for (name, shape, dtype), tensor in zip(pieces, tensors, strict=True):
                    if len(stages) > 1:
                        if tensor is None:
                            tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
                        tensor = tensor.contiguous()
                        dist.broadcast(tensor, src=stages[stage], group=self.pipeline_group)
                    if name is not None:
                        yield name, tensor

    def _join(self, entry: _Local) -> list[Tensor]:
        """Full tensors of one local parameter; for experts, those of all expert-parallel ranks in rank order."""
        parameter = entry.parameter.detach()
        if entry.rule.expert and self.expert_size > 1:
            shards = _all_gather(parameter, self.expert_group)
            return [t for shard in shards for t in join(entry.rule.kind, [shard], self.shapes)]
        return join(entry.rule.kind, _all_gather(parameter, self.tensor_group), self.shapes)

    def _gather_plan(self):
        """For every stage and parameter, its pieces (name, shape, dtype) in the order `_join` gives them.

        The tied copy of the embedding on the last stage has the name None: it is not part of a checkpoint.
        """
        if self._plan is None:
            mine = []
            for entry in self.local:
                names = list(entry.mapped.hf)
                if entry.rule.expert and self.expert_size > 1:
                    gathered: list = [None] * self.expert_size
                    dist.all_gather_object(gathered, names, group=self.expert_group)
                    names = [name for part in gathered for name in part]
                if self.architecture.tied and names == ["lm_head.weight"]:
                    names = [None]
                mine.append([(n, t.shape, t.dtype) for n, t in zip(names, self._join(entry), strict=True)])
            plan: list = [None] * dist.get_world_size(self.pipeline_group)
            dist.all_gather_object(plan, mine, group=self.pipeline_group)
            self._plan = plan
        return self._plan


def _all_gather(tensor: Tensor, group) -> list[Tensor]:
    size = dist.get_world_size(group)
    if size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def save_folder(
    weights: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    model_path: str | Path,
    *,
    write: bool,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a Hugging Face folder: safetensors shards with an index, and configuration and tokenizer of `model_path`.

    Args:
        weights: the stream of `HFWeights.stream`; consumed on every rank, because it is a collective.
        folder: destination.
        model_path: folder that the configuration, tokenizer and chat template are copied from.
        write: whether this rank writes (one rank does).
        shard_bytes: size at which a new file is begun.
    """
    folder, part, size, files, total = Path(folder), {}, 0, {}, 0
    if write:
        folder.mkdir(parents=True, exist_ok=True)

    def flush():
        nonlocal part, size
        if part:
            name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            save_file(part, folder / name, metadata={"format": "pt"})
            files.update(dict.fromkeys(part, name))
            part, size = {}, 0

    for name, tensor in weights:
        if not write:
            continue
        bytes_ = tensor.numel() * tensor.element_size()
        if part and size + bytes_ > shard_bytes:
            flush()
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size, total = size + bytes_, total + bytes_
    if not write:
        return
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    copy_side_files(Path(model_path), folder)
