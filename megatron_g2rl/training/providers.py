"""Computes the inputs of exploration methods that are not from a pass of the policy: embeddings, classes of answers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.data.sentence_encoder import SentenceEncoder
from megatron_g2rl.distributed.hub import fetch_model
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
        settings, reward = config.exploration, config.reward
        needs = load_method(settings.method).needs
        self._encoder = self._classes = None
        if "embeddings" in needs:
            if settings.encoder is None:
                raise ConfigError(
                    f"exploration.method={settings.method} needs exploration.encoder, the folder or Hub name of a "
                    "sentence-transformers model, such as sentence-transformers/all-MiniLM-L6-v2"
                )
            folder = fetch_model(settings.encoder, f"exploration.encoder={settings.encoder}")
            self._encoder = SentenceEncoder(folder, settings.encoder_device, settings.encoder_batch_size)
        if "classes" in needs:
            self._classes = AnswerClasses(reward.workers, reward.deadline_s)

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
