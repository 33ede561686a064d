"""Computes the inputs of exploration methods that are not from a pass of the policy: embeddings, classes of answers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.method_checks import MISSING_ENCODER
from megatron_g2rl.data.sentence_encoder import load_encoder
from megatron_g2rl.distributed.collectives import on_all_ranks
from megatron_g2rl.exploration.methods import load_method
from megatron_g2rl.records import ResponseGroup
from megatron_g2rl.rewards.classes import AnswerClasses


class InputProviders:
    """The sentence encoder and the workers that compare answers, if the method needs them."""

    def __init__(self, config: Config):
        """Load what the method needs; a collective.

        Raises:
            ConfigError: the method needs an encoder and the configuration names none.
            EncoderError: the encoder cannot be loaded.
            RewardError: the workers cannot be started.
        """
        settings, self._reward = config.exploration, config.reward
        needs = load_method(settings.method).needs
        self._encoder = self._classes = None
        if "embeddings" in needs:
            if settings.encoder is None:
                raise ConfigError(f"exploration.method={settings.method} {MISSING_ENCODER}")
            self._encoder = load_encoder(settings.encoder, settings.encoder_device, settings.encoder_batch_size)
        if "classes" in needs:
            on_all_ranks(self._start_workers)

    def _start_workers(self) -> None:
        self._classes = AnswerClasses(self._reward.workers, self._reward.deadline_s)

    def inputs(self, groups: Sequence[ResponseGroup]) -> dict[str, Tensor]:
        """Fields of `StepInputs`; a collective."""
        found = {}
        if self._encoder is not None:
            found["embeddings"] = self._encoder.embed(groups)
        if self._classes is not None:
            found["classes"] = self._classes.of(groups)
        return found

    def close(self) -> None:
        """Stop this rank's workers."""
        if self._classes is not None:
            self._classes.close()
