"""Where the model of a run comes from, and the error when it is unavailable."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import snapshot_download

from megatron_g2rl.distributed.hub import _not_fetched


class Hub(BaseHTTPRequestHandler):
    """Has no model, and responds as the Hub does."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_a_model_missing_from_the_hub_is_reported_as_missing_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Exception) as error:
            snapshot_download("a/b", endpoint=f"http://127.0.0.1:{server.server_port}", cache_dir=tmp_path)
        server.shutdown()
    assert "has no model of that name that you can access. Correct the name" in _not_fetched(error.value)
