"""Computes the geometry of saved responses with the models that generated them.

    g2rl evaluate CONFIG --checkpoint runs/a --checkpoint runs/b --benchmark math500 --problems 30 --samples 8
    g2rl analyze CONFIG evaluations

Φ of every response is computed on Megatron, under any layout, as in training. With `exploration.encoder`, the cosines
of text embeddings are added.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.commands.analyze import AnalyzedResult
from megatron_g2rl.commands.offline_evaluation import hf_folder
from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.data.sentence_encoder import SentenceEncoder, load_encoder
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.distributed.heartbeat import Heartbeat
from megatron_g2rl.distributed.hub import fetch_model
from megatron_g2rl.errors import as_disk_error, as_lost_rank_error
from megatron_g2rl.evaluation.geometry_study import INTERVAL_METHOD, effective_ranks, study
from megatron_g2rl.evaluation.results import ProblemResponses, read_responses
from megatron_g2rl.policy import runtime as policy_runtime
from megatron_g2rl.policy.packing import TokenSequence
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.report.geometry import write_pages
from megatron_g2rl.training.stopping import end_on_signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """A result with its responses."""

    result: AnalyzedResult
    problems: list[ProblemResponses]


def analyze(config: Config, results: Sequence[AnalyzedResult], output: Path) -> None:
    """Analyze all results and write `geometry.json`, `geometry.md` and `geometry.html`; a collective of all ranks.

    Raises:
        UserError: an input is invalid, or a file cannot be written.
    """
    runtime = policy_runtime.start(config.policy, config.run.seed, f"{output.absolute()}\n{results}")
    end_on_signals()
    try:
        with ExitStack() as opened, Heartbeat():
            loaded = on_first_rank(lambda: [_Loaded(result, read_responses(result.folder)) for result in results])
            encoder = _encoder(config)
            found = []
            for each in loaded:
                found.append(_analyze(config, each, runtime, output, encoder, opened))
                _free_memory()  # the next policy may need all of it
            on_first_rank(lambda: _write(output, found))
    except OSError as error:
        raise as_disk_error(error, output) from error
    except RuntimeError as error:
        raise as_lost_rank_error(error) from error
    finally:
        policy_runtime.stop()


def _encoder(config: Config) -> SentenceEncoder | None:
    settings = config.exploration
    if settings.encoder is None:
        return None
    return load_encoder(settings.encoder, settings.encoder_device, settings.encoder_batch_size)


def _analyze(
    config: Config,
    loaded: _Loaded,
    runtime: policy_runtime.Runtime,
    output: Path,
    encoder: SentenceEncoder | None,
    opened: ExitStack,
) -> dict[str, Any]:
    """The study of one result."""
    result, problems = loaded.result, loaded.problems
    log.info("%s: %d problems", result.label, len(problems))
    fetched = fetch_model(result.model.path, f"{result.folder}: {result.model.path}")
    weights = hf_folder(result.model, fetched, output / "converted", config.model.family, opened)
    policy = Policy(
        weights,
        config.policy,
        config.optimizer,
        runtime,
        temperature=result.temperature,
        tokens_per_microbatch=config.trainer.tokens_per_microbatch,
        total_updates=1,
        family=config.model.family,
    )
    sequences = [TokenSequence(each.prompt, tokens) for each in problems for tokens in each.responses]
    largest = max(max((*s.prompt, *s.response)) for s in sequences)
    if largest >= policy.architecture.vocab_size:
        raise ConfigError(f"{result.folder} has the token {largest}, which {result.model.path} does not have")
    scored = policy.score(sequences, features=True)
    sizes, correct = [len(each.responses) for each in problems], [each.correct for each in problems]
    features = scored.features.split(sizes)
    found: dict[str, Any] = {
        "label": result.label,
        "model": result.model.path,
        "results": str(result.folder),
        "temperature": result.temperature,
        "problems": len(problems),
        "responses": len(sequences),
        "correct_fraction": sum(map(sum, correct)) / max(len(sequences), 1),
        "logprob_difference": _difference(scored.logprobs, problems),
        "gradient": study(features, correct),
        "effective_rank": effective_ranks(features, correct),
        "interval_method": INTERVAL_METHOD,
    }
    if encoder is not None:
        texts = [text for each in problems for text in each.texts]
        embeddings = encoder.embed_texts(texts).split(sizes)
        found["semantic"] = study(embeddings, correct)
    return found


def _difference(logprobs: Sequence[Float[Tensor, "_tokens"]], problems: Sequence[ProblemResponses]) -> float:
    """Mean absolute difference per token (nats) of the responses' log-probs between the engine and this model."""
    reported = torch.tensor([value for each in problems for value in each.logprobs])
    computed = torch.stack([values.double().sum() for values in logprobs])
    tokens = torch.tensor([max(len(values), 1) for values in logprobs])
    return float(((computed - reported).abs() / tokens).mean())


def _free_memory() -> None:
    """Free the tensors of the last policy, which is part of reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(output: Path, found: Sequence[dict[str, Any]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    partial = output / ".geometry.json"
    partial.write_text(json.dumps(list(found), indent=1, ensure_ascii=False) + "\n")
    partial.replace(output / "geometry.json")
    write_pages(output, found)
