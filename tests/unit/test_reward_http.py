"""The reward server's client against a server in a separate process that fails, delays and recovers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_g2rl.rewards import FunctionSpec, RewardError, RewardPool, http
from megatron_g2rl.rewards.binding import Sample
from megatron_g2rl.rewards.http import HttpReward, RewardServerError

SERVER = r'''
"""Plays the script in argv[2], one word a request, and then answers; notes each request in argv[3]."""
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCRIPT = sys.argv[2].split(",") if sys.argv[2] else []

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        word = SCRIPT.pop(0) if SCRIPT else "answer"
        note = {"at": time.time(), "word": word, "token": self.headers["Authorization"], "asked": asked}
        with open(sys.argv[3], "a") as notes:
            notes.write(json.dumps(note) + "\n")
        if word == "hang":
            time.sleep(30)
        if word == "drop":
            self.connection.close()
            return
        if word.isdigit():
            self.send_error(int(word))
            return
        rewards = [float(text) / 1000 for text in asked["responses"]]
        body = {"rewards": rewards}
        if word == "pairs":
            body["correct"] = [text == answer for text, answer in zip(asked["responses"], asked["answers"])]
        if word == "short":
            body["rewards"] = rewards[1:]
        data = b"<html>" if word == "html" else json.dumps([] if word == "list" else body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
place = Path(sys.argv[3] + ".port")
place.with_suffix(".new").write_text(str(server.server_address[1]))
place.with_suffix(".new").rename(place)
server.serve_forever()
'''


class Server:
    """A server process with a script."""

    def __init__(self, folder: Path, script: str, port: int = 0):
        self.notes = folder / f"notes-{script.replace(',', '-')[:40]}"
        file = folder / "server.py"
        file.write_text(SERVER)
        self.process = subprocess.Popen([sys.executable, str(file), str(port), script, str(self.notes)])
        place = Path(f"{self.notes}.port")
        while not place.exists():
            assert self.process.poll() is None
            time.sleep(0.01)
        self.port = int(place.read_text())
        self.url = f"http://127.0.0.1:{self.port}/rewards"

    def requests(self) -> list[dict]:
        return [json.loads(line) for line in self.notes.read_text().splitlines()]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(script: str = "", port: int = 0) -> Server:
        servers.append(Server(tmp_path, script, port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def ask(url: str, *texts: str, **settings) -> list:
    options = dict(deadline_s=20.0, backoff_s=0.01) | settings
    return HttpReward(url, **options)(list(texts), ["1"] * len(texts), ["p"] * len(texts), [{}] * len(texts))


def test_a_batch_is_one_complete_request_with_results_in_order(serve):
    server = serve("answer,pairs")
    assert ask(server.url, "3", "1", "2") == [0.003, 0.001, 0.002]
    assert ask(server.url, "3", "1") == [(0.003, False), (0.001, True)]
    (first, _) = server.requests()
    assert first["asked"] == {
        "responses": ["3", "1", "2"], "answers": ["1"] * 3, "prompts": ["p"] * 3, "columns": [{}] * 3,
    }  # fmt: skip


@pytest.mark.parametrize("script", ["503,500", "drop,drop", "429,408", "html", "hang"])
def test_a_server_that_fails_or_is_late_and_recovers_causes_retries_and_loses_no_reward(serve, script):
    server = serve(script)
    assert ask(server.url, "5", deadline_s=60.0, timeout_s=3.0 if script == "hang" else 20.0) == [0.005]
    words = [*script.split(","), "answer"]
    assert [request["word"] for request in server.requests()] == words
    assert all(request["asked"]["responses"] == ["5"] for request in server.requests())


def test_the_backoff_grows(serve):
    server = serve("503,503,503,503")
    assert ask(server.url, "5", backoff_s=0.2) == [0.005]
    times = [request["at"] for request in server.requests()]
    pauses = [after - before for before, after in zip(times, times[1:], strict=False)]
    # the lower bounds: half of 0.2 * 2 ** n seconds; a busy machine may wait longer
    assert all(pause >= 0.1 * 2**n for n, pause in enumerate(pauses)), pauses


@pytest.mark.parametrize(
    ("script", "message", "asked"),
    [
        ("404,answer", "refused the request: HTTP 404", 1),
        ("500,500,500", "after 3 attempts .*HTTP 500", 3),
        ("drop,drop,drop", "after 3 attempts", 3),
        ("html,html,html", "not JSON", 3),
        ("list", "not an object with a list", 1),
    ],
)
def test_a_server_that_never_succeeds_is_an_error_that_describes_the_failures(serve, script, message, asked):
    server = serve(script)
    with pytest.raises(RewardServerError, match=message) as error:
        ask(server.url, "5", attempts=3)
    assert server.url in str(error.value) and len(server.requests()) == asked


def test_no_server_is_an_error_and_not_an_incorrect_response(serve):
    server = serve()
    server.stop()
    spec = FunctionSpec("megatron_g2rl.rewards.http:HttpReward", {"url": server.url, "attempts": 4})
    with RewardPool([spec], 1, 60.0) as pool, pytest.raises(RewardError, match="no response from .*efused"):
        pool.score([("5", "1")])


def test_the_attempts_end_before_the_deadline_at_which_the_pool_kills_the_worker(serve, monkeypatch):
    server = serve()
    server.stop()
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(http, "time", clock)
    with pytest.raises(RewardServerError, match="no response from .*efused"):
        ask(server.url, "5", deadline_s=200.0, backoff_s=0.2, attempts=1000)
    assert 100 < now[0] <= 200 * (1 - http.MARGIN)


def test_a_pool_sends_batches_and_uses_a_recovered_server_again(serve, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    server = serve("503,pairs")
    arguments = {"url": server.url, "token_variable": "REWARD_TOKEN", "attempts": 100}
    spec = FunctionSpec("megatron_g2rl.rewards.http:HttpReward", arguments, batch_size=8)
    samples = [Sample(str(i), "1", "the prompt", columns={"level": i}) for i in range(8)]
    with RewardPool([spec], 1, 60.0) as pool:
        found = pool.score(samples)
        server.stop()
        again = serve("answer,", port=server.port)  # the trailing comma: a separate log file
        assert pool.score([("7", "1")]).rewards == [0.007]
    assert found.rewards == [i / 1000 for i in range(8)] and found.correct == [i == 1 for i in range(8)]
    assert [request["token"] for request in server.requests()] == ["Bearer abc"] * 2
    assert server.requests()[-1]["asked"]["columns"] == [{"level": i} for i in range(8)]
    assert len(again.requests()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "missing a required argument: 'url'"),
        ({"url": "node7:8000"}, "does not begin with http"),
        ({"url": "file:///etc/passwd"}, "does not begin with http"),
        ({"url": "http://x", "attempts": 0}, "too small"),
        ({"url": "http://x", "token_variable": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE.*not set"),
    ],
)
def test_invalid_settings_are_refused_at_the_start(arguments, message):
    with pytest.raises(RewardError, match=message):
        RewardPool([FunctionSpec("megatron_g2rl.rewards.http:HttpReward", arguments)], 1, 5.0)
