"""A reward server as a reward function, and an example of a class with a set-up: batches over HTTP, with retries.

    reward:
      function: megatron_g2rl.rewards.http:HttpReward
      arguments: {url: "http://node7:8000/rewards"}
      deadline_s: 60

The server gets a POST with the JSON object {"responses": [...], "answers": [...], "prompts": [...], "columns": [...]},
lists of one length, and answers {"rewards": [...]} in the same order, with "correct": [...] if it knows that.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from typing import Any

MARGIN = 0.05
"""Fraction of the deadline that is left for the error message when the server does not answer."""
LONGEST_WAIT_S = 30.0
"""Longest pause between two attempts."""
_TEMPORARY = (408, 425, 429)
"""Client errors after which the same request may succeed, as after any server error."""


class RewardServerError(Exception):
    """The server did not answer in time, or its answer cannot be used."""


class HttpReward:
    """Asks a reward server.

    Args:
        url: where the server listens.
        deadline_s: seconds for a batch with all attempts; the worker gives it `reward.deadline_s`.
        timeout_s: seconds that the server may be silent in one attempt; None: as long as the deadline allows.
        attempts: how often a batch is sent at most. Connections that fail, time-outs, server errors (5xx) and 408, 425
            and 429 are tried again; other client errors are not.
        backoff_s: the pause after attempt n is drawn from the upper half of backoff_s * 2**(n - 1), at most
            `LONGEST_WAIT_S`, so that the workers of a run do not return all at once.
        token_variable: environment variable with a token, sent as `Authorization: Bearer TOKEN`; the configuration is
            written to the run's folder and is no place for a secret.
    """

    def __init__(
        self,
        url: str,
        deadline_s: float,
        timeout_s: float | None = None,
        attempts: int = 6,
        backoff_s: float = 0.2,
        token_variable: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url {url!r} does not begin with http:// or https://")
        if attempts < 1 or backoff_s < 0 or (timeout_s is not None and timeout_s <= 0):
            raise ValueError(f"attempts={attempts}, backoff_s={backoff_s} or timeout_s={timeout_s} is too small")
        self._url, self._attempts, self._backoff_s = url, attempts, backoff_s
        self._deadline_s, self._timeout_s = deadline_s * (1 - MARGIN), timeout_s
        self._headers = {"Content-Type": "application/json"}
        if token_variable is not None:
            if token_variable not in os.environ:
                raise ValueError(f"the environment variable {token_variable} (token_variable) is not set")
            self._headers["Authorization"] = f"Bearer {os.environ[token_variable]}"

    def __call__(
        self, responses: list[str], answers: list[str], prompts: list[str], columns: list[dict[str, Any]]
    ) -> list[Any]:
        """Rewards of a batch, or pairs (reward, correct) where the server says what is correct.

        Raises:
            RewardServerError: the server does not answer before the deadline, or not with a result for each response.
        """
        asked = {"responses": responses, "answers": answers, "prompts": prompts, "columns": columns}
        answer = self._ask(json.dumps(asked).encode())
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise RewardServerError(f'{self._url} answered {answer!r:.200}, not an object with a list "rewards"')
        correct = answer.get("correct")
        if correct is None:
            return rewards
        if not isinstance(correct, list) or len(correct) != len(rewards):
            raise RewardServerError(f'{self._url} answered {answer!r:.200}: "correct" is no list as long as "rewards"')
        return list(zip(rewards, correct, strict=True))

    def _ask(self, body: bytes) -> Any:
        """The server's answer, from the first attempt that succeeds."""
        start, failure = time.monotonic(), ""
        for attempt in range(1, self._attempts + 1):
            left = start + self._deadline_s - time.monotonic()
            if left <= 0:
                break
            try:
                request = urllib.request.Request(self._url, body, self._headers, method="POST")
                with urllib.request.urlopen(request, timeout=min(left, self._timeout_s or left)) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code} {error.reason}: {error.read(200)!r}"
                if error.code < 500 and error.code not in _TEMPORARY:
                    raise RewardServerError(f"{self._url} refused the request: {failure}") from None
            except (OSError, http.client.HTTPException) as error:  # URLError, time-outs and lost connections
                failure = f"{getattr(error, 'reason', None) or error}" or type(error).__name__
            except ValueError as error:
                failure = f"its answer is no JSON ({error})"
            left = start + self._deadline_s - time.monotonic()
            pause = min(self._backoff_s * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            if attempt == self._attempts or pause >= left:
                break
            time.sleep(pause)
        raise RewardServerError(
            f"no answer from {self._url} after {attempt} attempts in {time.monotonic() - start:.1f} s; the last one: "
            f"{failure or 'the deadline passed'}. Is it running? reward.deadline_s bounds all attempts of a batch"
        )
