"""Reward function that calls a reward server (batches over HTTP, with retries); an example of a class-based function.

    reward:
      function: megatron_g2rl.rewards.http:HttpReward
      arguments: {url: "http://node7:8000/rewards"}
      deadline_s: 60

The server gets a POST with the JSON object {"responses": [...], "answers": [...], "prompts": [...], "columns": [...]},
lists of equal length, and returns {"rewards": [...]} in the same order, optionally with "correct": [...].
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
"""Fraction of the deadline reserved for reporting an error if the server does not respond."""
LONGEST_WAIT_S = 30.0
"""Longest pause between two attempts."""
_TEMPORARY = (408, 425, 429)
"""Client errors (HTTP 4xx) that are retried, like all server errors."""


class RewardServerError(Exception):
    """The server did not respond in time, or its response is invalid."""


class HttpReward:
    """Requests rewards from a server.

    Args:
        url: URL of the server.
        deadline_s: seconds for a batch, all attempts included; the worker passes `reward.deadline_s`.
        timeout_s: seconds without data after which one attempt fails; None: limited only by the deadline.
        attempts: maximum number of attempts per batch. Failed connections, timeouts, server errors (5xx) and 408, 425
            and 429 are retried; other client errors are not.
        backoff_s: the pause after attempt n is drawn from the upper half of backoff_s * 2**(n - 1), at most
            `LONGEST_WAIT_S`, so that the workers of a run do not retry simultaneously.
        token_variable: environment variable with a token, sent as `Authorization: Bearer TOKEN`; the configuration is
            saved in the run folder and must not contain secrets.
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
        """Rewards of a batch, or pairs (reward, correct) if the server returns "correct".

        Raises:
            RewardServerError: no valid response from the server before the deadline.
        """
        payload = {"responses": responses, "answers": answers, "prompts": prompts, "columns": columns}
        reply = self._post(json.dumps(payload).encode())
        rewards = reply.get("rewards") if isinstance(reply, dict) else None
        if not isinstance(rewards, list):
            raise RewardServerError(f'{self._url} returned {reply!r:.200}, not an object with a list "rewards"')
        correct = reply.get("correct")
        if correct is None:
            return rewards
        if not isinstance(correct, list) or len(correct) != len(rewards):
            raise RewardServerError(
                f'{self._url} returned {reply!r:.200}: "correct" is not a list as long as "rewards"'
            )
        return list(zip(rewards, correct, strict=True))

    def _post(self, body: bytes) -> Any:
        """The server's JSON response, from the first attempt that succeeds."""
        start, failure = time.monotonic(), ""
        for attempt in range(1, self._attempts + 1):
            left = start + self._deadline_s - time.monotonic()
            if left <= 0:
                break
            try:
                request = urllib.request.Request(self._url, body, self._headers, method="POST")
                with urllib.request.urlopen(request, timeout=min(left, self._timeout_s or left)) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code} {error.reason}: {error.read(200)!r}"
                if error.code < 500 and error.code not in _TEMPORARY:
                    raise RewardServerError(f"{self._url} refused the request: {failure}") from None
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and lost connections
                failure = f"{getattr(error, 'reason', None) or error}" or type(error).__name__
            except ValueError as error:
                failure = f"its response is not JSON ({error})"
            left = start + self._deadline_s - time.monotonic()
            pause = min(self._backoff_s * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            if attempt == self._attempts or pause >= left:
                break
            time.sleep(pause)
        raise RewardServerError(
            f"no response from {self._url} after {attempt} attempts in {time.monotonic() - start:.1f} s; last error: "
            f"{failure or 'the deadline passed'}. Check that it is running; reward.deadline_s covers all attempts"
        )
