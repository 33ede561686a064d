"""The language-model head of both passes: log-probs, entropy and the feature Φ, without the logits of a whole batch.

`score_tokens` is the score pass (no gradients, Φ), `token_logprobs` the update pass (gradients). Both go over tiles of
the table of logits: `tiles` cuts it, `products` multiplies with the vocabulary, `softmax` does the elementwise part and
joins the shards of the vocabulary. `policy.model.LanguageModelHead` calls them where the logits would be made. Nothing
here needs Megatron, or anything but torch.
"""

from megatron_g2rl.policy.head.device_timer import DeviceTimer
from megatron_g2rl.policy.head.score import TokenScores, score_tokens
from megatron_g2rl.policy.head.tiles import DEFAULT_CHUNK_TOKENS
from megatron_g2rl.policy.head.update import token_logprobs

__all__ = ["DEFAULT_CHUNK_TOKENS", "DeviceTimer", "TokenScores", "score_tokens", "token_logprobs"]
