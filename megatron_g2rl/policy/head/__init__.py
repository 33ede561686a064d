"""The language-model head of both passes: log-probs, entropy and the feature Φ, without the logits of a full batch.

`score_tokens` serves the old-log-prob pass (no gradients, with Φ), `token_logprobs` the update pass (gradients, and Φ
with `UpdateFeatures`). Both process the table of logits in tiles: `tiles` chooses them, `products` multiplies with the
vocabulary, `softmax` does the elementwise part and combines the shards of the vocabulary. `policy.model`'s
`LanguageModelHead` calls them in place of computing logits. This package needs torch only, not Megatron, and triton for
`triton_score`.
"""

from megatron_g2rl.policy.head.device_timer import DeviceTimer
from megatron_g2rl.policy.head.score import Kernel, TokenScores, score_tokens
from megatron_g2rl.policy.head.tiles import DEFAULT_CHUNK_TOKENS
from megatron_g2rl.policy.head.update import token_logprobs
from megatron_g2rl.policy.head.update_features import UpdateFeatures

__all__ = [
    "DEFAULT_CHUNK_TOKENS",
    "DeviceTimer",
    "Kernel",
    "TokenScores",
    "UpdateFeatures",
    "score_tokens",
    "token_logprobs",
]
