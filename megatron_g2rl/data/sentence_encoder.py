"""Embeds the texts of responses with a sentence encoder, for the exploration method `semantic`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.distributed.collectives import on_all_ranks
from megatron_g2rl.distributed.hub import fetch_model
from megatron_g2rl.errors import UserError
from megatron_g2rl.records import ResponseGroup, responses_of

EXTRA = "semantic"
"""The extra of setup.py that installs sentence-transformers."""


class EncoderError(UserError):
    """The sentence encoder cannot be loaded, or its embeddings are not usable."""


def load_encoder(name: str, device: str, batch_size: int) -> SentenceEncoder:
    """The encoder of `exploration.encoder`, downloaded if it is a Hub name; a collective.

    Args:
        name: folder or Hub name.
        device, batch_size: as in `SentenceEncoder`.

    Raises:
        UserError: the download failed, or the encoder cannot be loaded on some rank; on every rank.
    """
    folder = fetch_model(name, f"exploration.encoder={name}")
    loaded: list[SentenceEncoder] = []
    on_all_ranks(lambda: loaded.append(SentenceEncoder(folder, device, batch_size)))
    return loaded[0]


class SentenceEncoder:
    """A sentence-transformers model on this rank."""

    def __init__(self, folder: Path, device: str, batch_size: int):
        """Load the encoder and try it.

        Args:
            folder: a folder that sentence-transformers saved.
            device: torch device of the encoder; the policy and the rollout engine do not share its memory.
            batch_size: texts per forward pass.

        Raises:
            EncoderError: sentence-transformers is not installed, the folder holds no encoder, or its embeddings are not
                finite.
        """
        self._label, self._batch_size = f"exploration.encoder={folder}", batch_size
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EncoderError(
                f"{self._label}: sentence-transformers cannot be imported ({error}); install it with: "
                f"pip install 'megatron-g2rl[{EXTRA}]'"
            ) from error
        try:
            # No code of the folder, and no pickles: docs/security.md.
            options = dict(trust_remote_code=False, local_files_only=True, model_kwargs=dict(use_safetensors=True))
            self._model = SentenceTransformer(str(folder), device=device, **options)
        except Exception as error:  # any error in the folder, or of the device
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EncoderError(f"{self._label} cannot be loaded on device {device}: {reason}") from error
        self._model.requires_grad_(False)
        self._encode(["1 + 1 = 2"])

    def embed(self, groups: Sequence[ResponseGroup]) -> Float[Tensor, "responses embedding"]:
        """Embedding of every response, float32 on the host; a collective. Each rank encodes its part.

        Encoded is the text after the reasoning tag `</think>`, or the complete response without one.

        Raises:
            EncoderError: an embedding is not finite, or the encoder failed; on every rank.
        """
        return self.embed_texts([response.text for response in responses_of(groups)])

    def embed_texts(self, responses: Sequence[str]) -> Float[Tensor, "responses embedding"]:
        """`embed` of the texts of responses, the same on every rank; a collective."""
        texts = [text.rpartition("</think>")[2] for text in responses]
        rank, world = dist.get_rank(), dist.get_world_size()
        parts = on_all_ranks(lambda: self._encode(texts[rank::world]), f"{self._label} failed", EncoderError)
        embeddings = torch.empty(len(texts), max(part.shape[1] for part in parts))
        for place, part in enumerate(parts):
            embeddings[place::world] = part
        return embeddings

    def _encode(self, texts: Sequence[str]) -> Float[Tensor, "texts embedding"]:
        size = self._model.get_embedding_dimension()
        if not texts:
            return torch.empty(0, size)
        found = self._model.encode(
            list(texts), batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        found = found.float().cpu()
        bad = (~found.isfinite().all(1)).nonzero().flatten().tolist()
        if found.shape != (len(texts), size) or bad:
            what = (
                f"an embedding that is not finite, for {texts[bad[0]]!r:.100}" if bad else f"shape {list(found.shape)}"
            )
            raise EncoderError(f"{self._label} returned {what}")
        return found
