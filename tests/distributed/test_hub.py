"""Models and datasets of the Hub are downloaded once for all ranks that share a cache, with the real client."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import datasets
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from random_models import write_random_model

pytestmark = [pytest.mark.distributed, pytest.mark.same_for_both]

MODEL, DATA = "someone/tiny", "someone/sums"
ROWS = [{"problem": f"{n}+1", "answer": str(n + 1)} for n in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_random_model(folder / "models" / MODEL, "llama", vocab_size=128, hidden_size=32, num_attention_heads=2)
    table = folder / "datasets" / DATA / "data" / "train-00000-of-00001.parquet"
    table.parent.mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(str(table))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def load_on_rank(rank: int, address: str, caches: list[Path], seconds: float) -> dict:
    """What one of four ranks on two machines downloads from the Hub at `address`; `caches` has each machine's cache."""
    from megatron_g2rl.config import Config
    from megatron_g2rl.data.sources import read_rows
    from megatron_g2rl.distributed.hub import fetch_model
    from megatron_g2rl.policy import runtime

    os.environ |= {"LOCAL_RANK": str(rank % 2), runtime.TIMEOUT_VARIABLE: str(seconds)}
    # The libraries read these from the environment when they are imported.
    constants.ENDPOINT = datasets.config.HF_ENDPOINT = address
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True
    # On two machines the same path means two folders.
    constants.HF_HUB_CACHE = str(caches[rank // 2] / "hub")
    datasets.config.HF_DATASETS_CACHE = caches[rank // 2] / "datasets"
    config = Config.model_validate({"model": {"path": MODEL}, "data": {"source": DATA}})
    runtime.start(config.policy, 0)
    model = fetch_model(MODEL, f"model.path={MODEL}")
    try:
        rows = [{"problem": row.problem, "answer": row.answer} for row in read_rows(config.data)]
        part = config.data.model_copy(update={"split": "train[1:3]"})
        return dict(model=digests(model), rows=rows, part=[row.problem for row in read_rows(part)])
    except Exception as error:
        return dict(model=digests(model), error=str(error))


@pytest.mark.parametrize("separate", [False, True], ids=["one cache", "a cache for each machine"])
def test_every_cache_is_filled_once(folder, tmp_path, ranks, separate):
    caches = [tmp_path / "a", tmp_path / ("b" if separate else "a")]
    # The other ranks wait longer than the timeout of a step's collectives.
    with HubServer(folder, delay_s=8.0) as server:
        found = ranks(4, load_on_rank, server.address, caches, 6.0)
    expected = dict(model=digests(folder / "models" / MODEL), rows=ROWS, part=["1+1", "2+1"])
    assert found == [expected] * 4
    files = [file.name for file in (folder / "models" / MODEL).iterdir()] + ["data/train-00000-of-00001.parquet"]
    downloads = [file for file in server.downloads() if not file.endswith((".py", ".yaml", "README.md"))]
    assert downloads == sorted(files * len(set(caches)))
    lists = [path for _, path in server.requests if path.startswith(f"/api/models/{MODEL}/revision")]
    assert len(lists) == len(set(caches))  # no other rank has sent a request
    assert not [file for cache in caches for file in cache.rglob(".g2rl-*")]


def test_a_name_missing_from_the_hub_is_the_same_single_error_on_all_ranks(folder, tmp_path, ranks):
    (tmp_path / "models").symlink_to(folder / "models")
    with HubServer(tmp_path) as server:
        found = ranks(4, load_on_rank, server.address, [tmp_path / "a"] * 2, 60.0)
    messages = {rank["error"] for rank in found}
    assert len(messages) == 1 and f"data.source='{DATA}'" in messages.pop()
