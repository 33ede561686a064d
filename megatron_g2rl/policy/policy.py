"""The policy: computes log-probs of responses, updates the weights and streams them out, under any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core import parallel_state
from torch import Tensor

from megatron_g2rl.config.ledger import head_chunk_tokens
from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig
from megatron_g2rl.data.batching import plan_groups, plan_microbatches
from megatron_g2rl.distributed.collectives import broadcast, gather, on_all_ranks
from megatron_g2rl.policy import model, packing
from megatron_g2rl.policy.head import DeviceTimer
from megatron_g2rl.policy.hf.tensor_folder import WeightsError
from megatron_g2rl.policy.hf.weights import HFWeights, save_folder
from megatron_g2rl.policy.model import HeadRequest
from megatron_g2rl.policy.models import flops
from megatron_g2rl.policy.models.architecture import read_architecture
from megatron_g2rl.policy.optimizer import Optimizer, UpdateResult, gather_parameters, wrap_data_parallel
from megatron_g2rl.policy.packing import PackedBatch, TokenSequence
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.policy.schedule import forward_pass, update_pass
from megatron_g2rl.policy.topk_features import features_on_ranks, seconds_on_ranks
from megatron_g2rl.records import Response, ScoredBatch, TokenStatistics

RowLoss = Callable[
    [Float[Tensor, "responses positions"], Float[Tensor, "responses positions"], PackedBatch],
    tuple[Tensor, dict[str, Tensor]],
]
"""(log-probs, entropy, batch) -> (this micro-batch's part of the update's loss, additive metrics).

Rows are the responses of the micro-batch, `batch.sources` their indices in the update; `packing.row_mask` marks the
positions that exist on this rank.
"""


class Policy:
    """A model on Megatron with its optimizer; every method is a collective over all ranks."""

    def __init__(
        self,
        model_path: str | Path,
        policy: PolicyConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        *,
        temperature: float,
        tokens_per_microbatch: int,
        total_updates: int,
        family: str | None = None,
        keep_reference: bool = False,
    ):
        """Build the model, load its weights, create the optimizer.

        Args:
            model_path: Hugging Face folder.
            policy: layout, precision, layers.
            optimizer: Adam and its schedule.
            runtime: this rank's position in the layout.
            temperature: softmax temperature of the head; the sampling temperature of the rollout engine.
            tokens_per_microbatch: token budget of one micro-batch.
            total_updates: number of optimizer updates of the run; the length of the schedule.
            family: `model.family`; None: the registered one of the checkpoint's `model_type`.
            keep_reference: keep a copy of the loaded weights for `reference_weights`.
        """
        self.model_path, self.settings, self.runtime = Path(model_path), policy, runtime
        self.temperature, self.tokens_per_microbatch = temperature, tokens_per_microbatch
        self.flops = 0
        """Operations of all passes on all ranks since `take_flops` (`models/flops.py`)."""
        self.architecture = read_architecture(model_path, family)
        config = model.transformer_config(self.architecture, policy, runtime.device)
        chunks = model.build_chunks(self.architecture, config, policy, runtime)
        self.hf = HFWeights(chunks, self.architecture)
        self.hf.load(model_path)
        self._refuse_lost_numbers()
        self.chunks = wrap_data_parallel(chunks, config, policy)
        self.optimizer = Optimizer(self.chunks, config, policy, optimizer, total_updates)
        rows = model.padded_vocab_size(self.architecture.vocab_size, policy.tensor_parallel) // policy.tensor_parallel
        self.chunk_tokens = head_chunk_tokens(policy.head_memory_mb, rows)
        self._reference = self._copy_to_host() if keep_reference else None
        self.context_group = parallel_state.get_context_parallel_group() if policy.context_parallel > 1 else None
        """Ranks that split the tokens of a sequence; None without context parallelism."""

    @torch.no_grad()
    def _refuse_lost_numbers(self) -> None:
        """Refuse non-finite weights on every rank: a rollout engine would generate garbage or fail without a reason."""
        finite = [entry.parameter.isfinite().all() for entry in self.hf.local]
        flags = torch.stack(finite).tolist() if finite else []
        local_names = sorted(
            name for entry, good in zip(self.hf.local, flags, strict=True) if not good for name in entry.mapped.hf
        )
        if names := sorted({name for part in gather(local_names[:3]) for name in part}):
            raise WeightsError(
                f"{self.model_path}: the weights {', '.join(names[:3])} contain numbers that are not finite in "
                f"policy.precision={self.settings.precision}: use another checkpoint"
            )

    # ------------------------------------------------------------------ old-log-prob pass
    def score(
        self,
        sequences: Sequence[TokenSequence],
        *,
        features: bool,
        hidden: bool = False,
        prior_logprobs: Sequence[Sequence[float]] | None = None,
        prior_tolerance: float = 0.0,
    ) -> ScoredBatch:
        """Log-probs and entropy of every response token, and optionally Φ of every response; the same on every rank.

        Args:
            sequences: prompts with their responses, the same list on every rank.
            features: whether to compute Φ.
            hidden: whether to compute the mean hidden state of every response.
            prior_logprobs: log-probs of each response's tokens from the rollout engine, for a faster sweep.
            prior_tolerance: as in `score_tokens`; 0: the exact sweep.
        """
        batches = self.microbatches(sequences)
        self.flops += flops.forward_flops(self.architecture, sequences)
        timer = DeviceTimer(self.runtime.device) if features else None
        options = dict(features=features, hidden=hidden, timer=timer)
        for chunk in self.chunks:
            chunk.eval()
        if prior_logprobs is not None and prior_tolerance > 0 and self.takes_prior:
            options |= dict(prior_tolerance=prior_tolerance, kernel=self.settings.head_kernel)

        def make_request(batch: PackedBatch) -> HeadRequest:
            prior = packing.chosen_values(prior_logprobs, batch) if "prior_tolerance" in options else None
            return HeadRequest(batch, self.temperature, self.chunk_tokens, prior_logprobs=prior, **options)

        scores = forward_pass(self.chunks, batches, make_request)
        for chunk in self.chunks:
            chunk.train()
        scored = list(zip(batches, scores, strict=True)) if scores else []
        statistics = self.gather_statistics(
            sequences, [(batch, torch.stack([one.logprobs, one.entropy], 1)) for batch, one in scored]
        )
        means = self._hidden_means(sequences, [(batch, one.hidden_sums) for batch, one in scored]) if hidden else None
        if timer is None:
            return ScoredBatch(statistics.logprobs, statistics.entropy, hidden=means)
        phi = self.gather_features(len(sequences), [(batch, one.features) for batch, one in scored], timer)
        seconds = seconds_on_ranks(timer, self.runtime.device)
        return ScoredBatch(statistics.logprobs, statistics.entropy, phi, seconds, means)

    @property
    def takes_prior(self) -> bool:
        """Whether the head uses the rollout engine's log-probs; otherwise it computes Φ by the exact sweep."""
        return self.runtime.device.type == "cpu" or self.settings.head_kernel != "torch"

    def features_from_topk(
        self, responses: Sequence[Response]
    ) -> tuple[Float[Tensor, "responses hidden"], dict[str, float]]:
        """Φ from the rollout engine's top-K log-probs, and its time in seconds (`ScoredBatch.feature_seconds`).

        Args:
            responses: the same list on every rank, at least one, all with `top_ids`, sampled from the current weights.

        Raises:
            ValueError: their log-probs do not form a valid distribution.
        """
        timer = DeviceTimer(self.runtime.device)
        self.gather_parameters()
        phi = features_on_ranks(self.chunks, self.runtime, self.architecture.vocab_size, responses, timer)
        return phi.cpu(), seconds_on_ranks(timer, self.runtime.device)

    def gather_statistics(
        self, sequences: Sequence[TokenSequence], values: Sequence[tuple[PackedBatch, Tensor]]
    ) -> TokenStatistics:
        """Log-probs and entropies of a pass on every rank.

        Args:
            sequences: sequences of the pass, the same list on every rank.
            values: this rank's micro-batches with log-prob and entropy of their tokens, [tokens, 2]; empty before the
                last stage.
        """
        return TokenStatistics(*self.gather_tokens(sequences, values, 2))

    def gather_tokens(
        self, sequences: Sequence[TokenSequence], values: Sequence[tuple[PackedBatch, Tensor]], columns: int
    ) -> list[tuple[Float[Tensor, "_tokens"], ...]]:
        """Combine the results of all ranks: each rank writes its part into a table of zeros, and the tables are summed.

        Args:
            sequences: sequences of the pass, the same list on every rank.
            values: this rank's micro-batches with numbers of their tokens, [tokens, columns]; empty before the last
                stage.
            columns: numbers per token.

        Returns:
            For each column, the numbers of the response tokens of every response, on the host.
        """
        lengths = [len(s.response) for s in sequences]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        device = self.runtime.device
        table = torch.zeros(columns, int(starts[-1]), device=device)
        if self.runtime.reports:
            for batch, numbers in values:
                begin = packing.to_device(starts[list(batch.sources)], device)
                row, offset = (x.index_select(0, batch.chosen) for x in (batch.row, batch.offset))
                table.index_copy_(1, begin[row] + offset, numbers.index_select(0, batch.chosen).T)
        dist.all_reduce(table)
        return [column.split(lengths) for column in table.cpu()]

    def gather_features(
        self, count: int, parts: Sequence[tuple[PackedBatch, Float[Tensor, "_responses hidden"]]], timer: DeviceTimer
    ) -> Float[Tensor, "responses hidden"]:
        """Φ of all `count` responses of a pass, on the host of every rank.

        Args:
            count: responses of the pass.
            parts: this rank's micro-batches with Φ of their responses; empty before the last stage.
            timer: measures the sum over ranks as `reduce`.
        """
        phi = torch.zeros(count, self.architecture.hidden, device=self.runtime.device)
        if self.runtime.reports and self.runtime.context_rank == 0:
            for batch, part in parts:
                rows = torch.tensor(batch.sources, dtype=torch.long)
                phi[packing.to_device(rows, self.runtime.device)] = part
        with timer.measure("reduce"):
            dist.all_reduce(phi)
        return phi.cpu()

    def _hidden_means(
        self,
        sequences: Sequence[TokenSequence],
        parts: Sequence[tuple[PackedBatch, Float[Tensor, "_responses hidden"]]],
    ) -> Float[Tensor, "responses hidden"]:
        """Mean hidden state of every response, on the host of every rank; zero for an empty one.

        Args:
            sequences: sequences of the pass.
            parts: this rank's micro-batches with the sums over its tokens of each response; empty before the last
                stage.
        """
        sums = torch.zeros(len(sequences), self.architecture.hidden, device=self.runtime.device)
        if self.runtime.reports:  # each context-parallel rank adds its tokens
            for batch, part in parts:
                rows = torch.tensor(batch.sources, dtype=torch.long)
                sums[packing.to_device(rows, self.runtime.device)] = part
        dist.all_reduce(sums)
        return sums.cpu() / torch.tensor([max(len(s.response), 1) for s in sequences])[:, None]

    # ------------------------------------------------------------------ update pass
    def update(
        self, sequences: Sequence[TokenSequence], loss: RowLoss, *, statistics: bool = False
    ) -> tuple[UpdateResult, dict[str, float], TokenStatistics | None]:
        """One optimizer update on `sequences`.

        Args:
            sequences: the responses of the update, the same list on every rank.
            loss: called once per micro-batch on the last stage; its parts add up to the update's loss.
            statistics: whether to return the log-probs and entropies that the loss was computed from.

        Returns:
            The optimizer's result; the sums of the metrics over micro-batches and ranks, including `loss`; and
            statistics under the weights before the update, or None.
        """
        self.optimizer.zero_gradients()
        self.flops += flops.UPDATE * flops.forward_flops(self.architecture, sequences)
        metrics, values = self._accumulate(sequences, loss)
        result = self.optimizer.apply(metrics["loss"])
        return result, metrics, self.gather_statistics(sequences, values) if statistics else None

    def take_flops(self) -> int:
        """Operations of all passes on all ranks since the last call. Not a collective."""
        taken, self.flops = self.flops, 0
        return taken

    def rest(self) -> None:
        """Free memory that only updates need; the next update allocates it again. Not a collective."""
        self.optimizer.rest()

    def accumulate_gradients(self, sequences: Sequence[TokenSequence], loss: RowLoss) -> dict[str, float]:
        """Forward and backward of `update` without the optimizer; gradients stay in the chunks' buffers."""
        return self._accumulate(sequences, loss)[0]

    def _accumulate(
        self, sequences: Sequence[TokenSequence], loss: RowLoss
    ) -> tuple[dict[str, float], list[tuple[PackedBatch, Tensor]]]:
        """Sum the gradients of all micro-batches; returns the metrics and the values, as in `gather_statistics`."""
        seen: list[tuple[PackedBatch, Tensor]] = []

        def packed_loss(values: Tensor, request: HeadRequest):
            batch = request.batch
            seen.append((batch, values.detach()))
            return loss(*(packing.to_rows(values[:, i], batch) for i in (0, 1)), batch)

        results = update_pass(
            self.chunks,
            self.microbatches(sequences),
            lambda b: HeadRequest(b, self.temperature, self.chunk_tokens, with_gradient=True),
            packed_loss,
        )
        return self.sum_metrics(results), seen

    def sum_metrics(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums of the metrics over this rank's micro-batches (none before the last stage) and over all ranks."""
        # The last rank is on the last pipeline stage and has the names.
        names = broadcast(sorted(results[0]) if results else [], source=dist.get_world_size() - 1)
        total = torch.zeros(len(names), dtype=torch.float64, device=self.runtime.device)
        if self.runtime.reports:
            for result in results:
                total += torch.stack([result[name].double() for name in names])
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def microbatches(
        self, sequences: Sequence[TokenSequence], group_sizes: Sequence[int] | None = None
    ) -> list[PackedBatch]:
        """This rank's micro-batches of a pass over `sequences`.

        Args:
            sequences: the same list on every rank.
            group_sizes: sequences of each group, if groups must not be split (`plan_groups`); None: split anywhere.
        """
        r, p = self.runtime, self.settings
        sequence_multiple, batch_multiple = packing.alignment(r.tensor_size, r.context_size, p.sequence_parallel)
        options = dict(
            data_parallel=r.data_size,
            tokens_per_microbatch=self.tokens_per_microbatch,
            alignment=sequence_multiple,
            multiple_of=p.pipeline_parallel if p.virtual_stages > 1 else 1,
            work=[flops.sequence_flops(self.architecture, s) for s in sequences],
        )
        lengths = [s.length for s in sequences]
        if group_sizes is None:
            plan = plan_microbatches(lengths, **options)
        else:
            plan = plan_groups(lengths, group_sizes, **options)
        pack = partial(
            packing.pack,
            sequences,
            sequence_multiple=sequence_multiple,
            batch_multiple=batch_multiple,
            context_rank=r.context_rank,
            context_size=r.context_size,
            device=r.device,
            few_shapes=r.device.type == "cuda",
        )
        batches = [pack(sources) for sources in plan[r.data_rank]]
        if r.pipeline_size > 1:
            # Stages exchange tensors of equal shape: every micro-batch is padded to the length of the longest.
            longest = max(b.bounds[-1] for b in batches)
            batches = [pack(b.sources, total=longest) for b in batches]
        return batches

    # ------------------------------------------------------------------ weights
    @torch.no_grad()
    def _copy_to_host(self) -> list[Tensor]:
        """A copy of the current weights in host memory, pinned if they are on a GPU."""
        self.gather_parameters()
        pinned = self.runtime.device.type == "cuda"
        options = dict(device="cpu", pin_memory=pinned)
        return [torch.empty(p.shape, dtype=p.dtype, **options).copy_(p) for p in self._parameters()]

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Inside this context, the model uses the reference weights (`keep_reference`); the trained ones are unchanged.

        The parameters point to a copy of the reference in device memory that the sleeping rollout engine has freed:
        this is one copy from pinned memory, and no copy to the host.
        """
        self.gather_parameters()
        parameters = self._parameters()
        trained = [p.data for p in parameters]
        try:
            for parameter, stored in zip(parameters, self._reference, strict=True):
                parameter.data = torch.empty_like(parameter.data).copy_(stored, non_blocking=True)
            yield
        finally:
            for parameter, data in zip(parameters, trained, strict=True):
                parameter.data = data

    def _parameters(self) -> list[Tensor]:
        return [p for chunk in self.chunks for p in chunk.parameters()]

    def gather_parameters(self) -> None:
        """Complete the parameter gathering that overlap_communication defers to the next forward."""
        gather_parameters(self.chunks, self.settings)

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as (Hugging Face name, full tensor), one at a time; consume it to the end on every rank."""
        self.gather_parameters()
        yield from self.hf.stream()

    def save_hf(self, folder: str | Path) -> None:
        """Write the weights as a Hugging Face folder, with the config and tokenizer files of the original.

        Raises:
            OSError: the folder cannot be written; on every rank.
        """
        weights, headers, write = self.hf_weights(), self.hf.headers(), dist.get_rank() == 0
        on_all_ranks(lambda: save_folder(weights, headers, folder, self.model_path, write=write))
