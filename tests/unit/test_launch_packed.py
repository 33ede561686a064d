"""`packager: git` sends a copy of HEAD: what it lacks is reported before a job is queued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from g2rl_launch.preflight import check_packed
from g2rl_launch.submit import Launch
from megatron_g2rl.config.errors import ConfigError

CONFIG = """
base: base.yaml
data: {source: data/problems.jsonl}
reward: {function: rewards.mine:score}
"""
BASE = """
run: {name: run, directory: runs}
model: {path: ./model}
rollout: {engine: transformers}
policy: {device: cpu, precision: fp32}
trainer: {steps: 1}
"""

MODEL = dict(model_type="qwen3", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
MODEL |= dict(
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=32768
)


def git(folder: Path, *words: str) -> None:
    # protocol.file: allows a submodule from a local folder
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all", "--allow-empty")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository in which everything that a run needs is committed."""
    root = tmp_path / "repository"
    files = {
        "mine.yaml": CONFIG,
        "base.yaml": BASE,
        "model/config.json": json.dumps(MODEL),
        "model/model.safetensors": "weights",
        "data/problems.jsonl": '{"problem": "1+1", "answer": "2"}',
        "rewards/__init__.py": "",
        "rewards/mine.py": "import json\nfrom . import words\ndef score(text, answer): return 1.0\n",
        "rewards/words.py": "from shared_parts import part\n",
        "shared_parts/part.py": "x = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    commit(root)
    monkeypatch.chdir(root)
    # Where a reward function is searched for; the interpreter caches packages of earlier folders.
    monkeypatch.syspath_prepend(root)
    for name in ("rewards", "parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return root


def check(root: Path, *overrides: str) -> None:
    profile = root.parent / "cluster.yaml"
    profile.write_text(f"partition: p\ntime: 1:00:00\npackager: git\nfolder: {root}\n")
    launch = Launch(Path("mine.yaml"), list(overrides), str(profile))
    check_packed(launch.job, launch.config, launch.config_path)


def ignore(root: Path, name: str) -> None:
    """Remove a file from HEAD and keep it in the folder, as if it had never been added."""
    with (root / ".gitignore").open("a") as file:
        file.write(f"/{name}\n")
    git(root, "rm", "-rq", "--cached", name)
    commit(root)


def test_a_complete_repository_is_sent(root):
    check(root)


def test_uncommitted_files_are_reported(root):
    (root / "new.py").touch()
    with pytest.raises(ConfigError, match="new.py"):
        check(root)


@pytest.mark.parametrize(
    "name, key",
    [
        ("base.yaml", "the configuration"),
        ("data/problems.jsonl", "data.source"),
        ("model/model.safetensors", "model.path"),
        ("rewards/mine.py", "reward.function"),
        ("rewards/words.py", "reward.function"),
        ("shared_parts/part.py", "reward.function"),
    ],
)
def test_an_ignored_file_that_the_run_needs_is_reported_with_its_key(name, key, root):
    ignore(root, name)
    with pytest.raises(ConfigError, match=rf"(?s){key}.*{name} is ignored by git"):
        check(root)


def test_each_of_several_sources_is_checked(root):
    for name in ("first", "second"):
        (root / "data" / f"{name}.jsonl").write_text("{}\n")
    commit(root)
    sources = "data.sources=[{source: data/first.jsonl}, {source: data/second.jsonl}]"
    check(root, "data.source=null", sources)
    ignore(root, "data/first.jsonl")
    with pytest.raises(ConfigError, match="data.sources=data/first.jsonl: data/first.jsonl is ignored"):
        check(root, "data.source=null", sources)


def test_a_base_outside_the_repository_is_accepted_if_its_path_is_absolute(root):
    outside = root.parent / "outside.yaml"
    (root / "base.yaml").rename(outside)
    (root / "mine.yaml").write_text(CONFIG.replace("base.yaml", str(outside)))
    commit(root)
    check(root)
    (root / "mine.yaml").write_text(CONFIG.replace("base.yaml", "../outside.yaml"))
    commit(root)
    with pytest.raises(ConfigError, match="the configuration: .*outside.yaml is not in the repository"):
        check(root)


def test_an_ignored_file_that_no_key_refers_to_is_no_problem(root):
    (root / "notes.txt").write_text("")
    (root / ".gitignore").write_text("notes.txt\n")
    commit(root)
    check(root)


def test_a_model_folder_that_looks_like_a_hub_name_is_a_folder(root):
    ignore(root, "model/model.safetensors")
    with pytest.raises(ConfigError, match="model.path=model: model/model.safetensors is ignored"):
        check(root, "model.path=model")


def test_a_file_excluded_from_archives_is_reported(root):
    (root / ".gitattributes").write_text("data export-ignore\n")
    commit(root)
    with pytest.raises(ConfigError, match="data/problems.jsonl is excluded from archives"):
        check(root)


def test_submodules_that_would_be_missing_or_in_the_wrong_folder_are_reported(root, tmp_path):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder in (inner, outer):
        folder.mkdir()
        git(folder, "init", "-q")
    commit(inner)
    git(outer, "submodule", "add", str(inner), "inner")
    commit(outer)
    git(root, "submodule", "add", str(outer), "parts")
    commit(root)
    with pytest.raises(ConfigError, match="the submodule parts/inner is not checked out"):
        check(root)
    git(root, "submodule", "update", "--init", "--recursive")
    with pytest.raises(ConfigError, match="the submodule parts/inner is inside another one"):
        check(root)
    git(root, "submodule", "deinit", "--all", "--force")
    with pytest.raises(ConfigError, match="the submodule parts is not checked out"):
        check(root)


def test_a_reward_function_in_a_submodule_is_sent_with_it(root, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    (outer / "mine.py").write_text("def score(text, answer): return 1.0\n")
    commit(outer)
    git(root, "submodule", "add", str(outer), "parts")
    commit(root)
    check(root, "reward.function=parts.mine:score")
    ignored = root / "parts" / "helper.py"
    ignored.write_text("")
    (root / "parts" / "mine.py").write_text("import parts.helper\ndef score(text, answer): return 1.0\n")
    (root / "parts" / ".gitignore").write_text("helper.py\n")
    commit(root / "parts")
    commit(root)
    with pytest.raises(ConfigError, match="parts/helper.py is ignored by git"):
        check(root, "reward.function=parts.mine:score")


def test_a_path_relative_to_a_subfolder_is_reported(root, monkeypatch):
    monkeypatch.chdir(root / "data")
    (root / "data" / "here.yaml").write_text(CONFIG.replace("base.yaml", "../base.yaml"))
    commit(root)
    profile = root.parent / "cluster.yaml"
    profile.write_text(f"partition: p\ntime: 1:00:00\npackager: git\nfolder: {root}\n")
    overrides = ["data.source=problems.jsonl", "model.path=../model"]
    launch = Launch(Path("here.yaml"), overrides, str(profile))
    with pytest.raises(ConfigError, match="data.source=problems.jsonl is .*jobs start in"):
        check_packed(launch.job, launch.config, launch.config_path)
