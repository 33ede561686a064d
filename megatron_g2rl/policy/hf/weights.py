"""Streams weights between Hugging Face folders and Megatron shards, one tensor at a time, in both directions."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_g2rl.config.run_files import is_megatron_folder
from megatron_g2rl.distributed.collectives import gather
from megatron_g2rl.policy.checkpoint.model_files import copy_model_files
from megatron_g2rl.policy.checkpoint.shared_reading import SharedReading, data_parallel_group
from megatron_g2rl.policy.hf.megatron_folder import MegatronTensors
from megatron_g2rl.policy.hf.megatron_loading import load_chunks
from megatron_g2rl.policy.hf.tensor_folder import SHARD_BYTES, Header, TensorFolder, WeightsError, write_tensors
from megatron_g2rl.policy.model import padded_vocab_size, unwrap
from megatron_g2rl.policy.models.architecture import Architecture, read_architecture
from megatron_g2rl.policy.models.families import Mapped, Rule, map_parameter
from megatron_g2rl.policy.models.shards import Shapes, join, split

EXPERT_BYTES = 256 << 20
"""Bytes of experts that one call gathers, unless a single one is larger."""


@dataclass(frozen=True)
class _Local:
    """One parameter of this rank and the Hugging Face tensors that it maps to."""

    parameter: nn.Parameter
    mapped: Mapped

    @property
    def rule(self) -> Rule:
        return self.mapped.rule


def check_folder(folder: str | Path, family: str | None = None) -> None:
    """Refuse a folder with an unsupported model or incomplete files, reading only the files' headers.

    Args:
        folder: a Hugging Face folder, or a Megatron folder (converted, or a checkpoint of a run).
        family: `model.family`; None: the registered one of its `model_type`.

    Raises:
        UnsupportedModel: its architecture is not supported.
        WeightsError: a weights file is missing, incomplete or corrupt, or a tensor is missing or unexpected.
        UnsafePickle: a Megatron folder contains a pickle that could run code.
    """
    architecture = read_architecture(folder, family)
    if is_megatron_folder(folder):
        MegatronTensors(folder).check()
    else:
        source = TensorFolder(folder)
        check_tensors(source, architecture)
        refuse_own_head(source, architecture)


def refuse_own_head(source: TensorFolder, architecture: Architecture) -> None:
    """Refuse a tied model with a separate output embedding that differs from the input embedding: one is wrong.

    Raises:
        WeightsError: names both tensors.
    """
    embedding, output = architecture.family.embedding_names()
    if not architecture.tied or output not in source.files:
        return
    first, second = source.read(embedding), source.read(output)
    if first.shape != second.shape or not torch.equal(first, second.to(first.dtype)):
        raise WeightsError(
            f"{source.folder}: config.json sets tie_word_embeddings, but {output!r} differs from {embedding!r}: set "
            "tie_word_embeddings to false there if the model has a separate head, or remove the tensor if it does not"
        )


def check_tensors(source: TensorFolder, architecture: Architecture) -> dict[str, Header]:
    """Check that a Hugging Face folder has all tensors of the model and no others; return their headers.

    Two extra tensors are allowed and left out: the rotary embedding frequencies that old checkpoints store, and the
    output embedding of a tied model, which repeats the input embedding.

    Raises:
        WeightsError: a tensor is missing, has another shape or is not part of the model; or a file cannot be read.
    """
    a = architecture
    expected = a.family.hf_names(a.layers, a.experts or 0, a.tied)
    headers = source.headers()
    _, output = a.family.embedding_names()
    ignored = {name for name in headers if name.endswith(".rotary_emb.inv_freq") or (a.tied and name == output)}
    missing, extra = [n for n in expected if n not in headers], sorted(headers.keys() - ignored - set(expected))
    for what, names in (("is missing", missing), ("is not part of this architecture", extra)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise WeightsError(
                f"{source.folder}: tensor {names[0]!r}{more} {what}; does config.json belong to this checkpoint?"
            )
    for name in expected:
        shape, actual = a.shape_of(name), headers[name].shape
        if shape is not None and actual != shape:
            raise WeightsError(
                f"{source.folder}: tensor {name!r} has shape {actual}, but config.json implies {shape}; does "
                "config.json belong to this checkpoint?"
            )
    return {name: headers[name] for name in expected}


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
        self.chunks = [unwrap(chunk) for chunk in chunks]
        self.local = [entry for chunk in self.chunks for entry in self._map(chunk)]
        self._gathered: dict[int, list[Tensor]] = {}
        """Experts that were gathered in one call and not yet requested: parameter -> its shards by rank."""
        self._plan: list[list[tuple[tuple[str, ...], list[torch.Size], torch.dtype]]] | None = None

    def _map(self, model) -> Iterator[_Local]:
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        first_expert = self.expert_rank * ((self.architecture.experts or 0) // self.expert_size)
        for name, parameter in model.named_parameters():
            yield _Local(parameter, map_parameter(self.architecture.family, name, layers, first_expert))

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Fill every local parameter from a Hugging Face folder, or from a Megatron folder of any layout; a collective.

        Of the ranks with the same shard, one reads it and broadcasts it to the others.

        Raises:
            WeightsError: a tensor is missing, has another shape, is not part of the model or cannot be read; the
                message names it and is the same on every rank.
        """
        if is_megatron_folder(folder):
            load_chunks(folder, self.chunks)
            return
        reading = SharedReading()
        source = reading.attempt(lambda: self._open(folder))
        reading.finish()
        for entry in self.local:
            read = functools.partial(self._read_shard, source, entry)
            reading.fill(entry.parameter.detach(), read, data_parallel_group(entry.rule.megatron))
        reading.finish()

    def _open(self, folder: str | Path) -> TensorFolder:
        source = TensorFolder(folder)
        check_tensors(source, self.architecture)
        return source

    def _read_shard(self, source: TensorFolder, entry: _Local) -> Tensor:
        """The part of a parameter's Hugging Face tensors that this rank holds, in their dtype, on the CPU."""
        embedding, output = self.architecture.family.embedding_names()
        names = entry.mapped.hf
        if self.architecture.tied and names == (output,):
            names = (embedding,)
        tensors = [source.read(name) for name in names]
        rank, size = (0, 1) if self._is_spread(entry) else (self.tensor_rank, self.tensor_size)
        try:
            shard = split(entry.rule.kind, tensors, self.shapes, rank, size)
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"{source.folder}: {', '.join(names)} cannot be split: {error}") from error
        if shard.shape != entry.parameter.shape:
            raise WeightsError(
                f"{source.folder}: {', '.join(names)} of shape {[tuple(t.shape) for t in tensors]} do "
                f"not match Megatron's {entry.rule.megatron} of shape {tuple(entry.parameter.shape)}"
            )
        return shard

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model as (Hugging Face name, full tensor), the same on all ranks, one at a time.

        A collective: all ranks of a model replica participate and must consume it to the end.
        """
        plan = self._gather_plan()
        stages = dist.get_process_group_ranks(self.pipeline_group)
        self._gathered.clear()
        for stage, i in self._order():
            mine, pieces = stages[stage] == dist.get_rank(), plan[stage][i]
            tensors = self._join(i) if mine else [None] * len(pieces)
            for (name, shape, dtype), tensor in zip(pieces, tensors, strict=True):
                if len(stages) > 1:
                    if tensor is None:
                        tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
                    tensor = tensor.contiguous()
                    dist.broadcast(tensor, src=stages[stage], group=self.pipeline_group)
                if name is not None:
                    yield name, tensor

    def _order(self) -> list[tuple[int, int]]:
        """(stage, parameter) in the order of `stream`: the embeddings, which are the largest, come last.

        A rollout engine buffers tensors that it cannot use yet; embeddings are buffered until the end in any order.
        """
        vocabulary = {*self.architecture.family.embedding_names(), None}
        entries = [(stage, i) for stage, parameters in enumerate(self._gather_plan()) for i in range(len(parameters))]
        return sorted(entries, key=lambda entry: self._gather_plan()[entry[0]][entry[1]][0][0] in vocabulary)

    def headers(self) -> dict[str, Header]:
        """Headers of the tensors that `stream` yields, in the same order; a collective."""
        pieces = [piece for stage, i in self._order() for piece in self._gather_plan()[stage][i]]
        return {name: Header(tuple(shape), dtype) for name, shape, dtype in pieces if name is not None}

    def _join(self, i: int) -> list[Tensor]:
        """Full tensors of one local parameter; for an expert, of all expert-parallel ranks in rank order."""
        entry = self.local[i]
        if self._is_spread(entry):
            if i not in self._gathered:
                self._gather_experts(i)
            return [t for shard in self._gathered.pop(i) for t in join(entry.rule.kind, [shard], self.shapes)]
        return join(entry.rule.kind, _all_gather(entry.parameter.detach(), self.tensor_group), self.shapes)

    def _is_spread(self, entry: _Local) -> bool:
        return entry.rule.expert and self.expert_size > 1

    def _gather_experts(self, first: int) -> None:
        """Gather experts, starting at `first`, in one call: a large model has tens of thousands of small ones."""
        chosen: list[int] = []
        size = 0
        for i in range(first, len(self.local)):
            parameter = self.local[i].parameter
            size += parameter.numel() * parameter.element_size() * self.expert_size
            other = parameter.dtype != self.local[first].parameter.dtype
            if chosen and (size > EXPERT_BYTES or other or not self._is_spread(self.local[i])):
                break
            chosen.append(i)
        parameters = [self.local[i].parameter.detach() for i in chosen]
        flat = [parameter.reshape(-1) for parameter in parameters]
        ranks = _all_gather(flat[0] if len(flat) == 1 else torch.cat(flat), self.expert_group)
        parts = [rank.split([parameter.numel() for parameter in parameters]) for rank in ranks]
        for number, (i, parameter) in enumerate(zip(chosen, parameters, strict=True)):
            self._gathered[i] = [part[number].view(parameter.shape) for part in parts]

    def _gather_plan(self):
        """For every stage and parameter, its pieces (name, shape, dtype) in the order of `_join`.

        The tied copy of the embedding on the last stage has the name None: it is not part of a checkpoint.
        """
        if self._plan is None:
            mine = []
            gathered = gather([entry.mapped.hf for entry in self.local], self.expert_group)
            output = self.architecture.family.embedding_names()[1]
            for i, entry in enumerate(self.local):
                spread = self._is_spread(entry)
                names = [name for part in gathered for name in part[i]] if spread else list(entry.mapped.hf)
                if self.architecture.tied and names == [output]:
                    names = [None]
                # On the meta device: only the shapes are needed.
                shard = entry.parameter.detach().to("meta")
                pieces = join(entry.rule.kind, [shard] * (1 if spread else self.tensor_size), self.shapes)
                pieces = pieces * self.expert_size if spread else pieces
                mine.append([(n, t.shape, t.dtype) for n, t in zip(names, pieces, strict=True)])
            self._plan = gather(mine, self.pipeline_group)
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
    headers: dict[str, Header],
    folder: str | Path,
    model_path: str | Path,
    *,
    write: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder: safetensors shards with an index, and config and tokenizer files of `model_path`.

    Args:
        weights: output of `HFWeights.stream`; consumed on every rank, because it is a collective.
        headers: headers of its tensors (`HFWeights.headers`).
        folder: destination.
        model_path: folder that the config, tokenizer and chat template files are copied from.
        write: whether this rank writes (exactly one rank does).
        shard_bytes: size at which a new file is started.
    """
    if not write:
        deque(weights, maxlen=0)
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder, headers, weights, shard_bytes)
        copy_model_files(Path(model_path), folder)
    finally:
        deque(weights, maxlen=0)  # after an error, the other ranks still take part in what is left
