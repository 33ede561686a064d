"""Files that a configuration refers to are compared by content when a run resumes."""

from __future__ import annotations

import sys

import pytest

from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.records import Prompt
from megatron_g2rl.training.contents import (
    SAMPLE_BYTES,
    SAMPLES,
    check_contents,
    code_digest,
    contents,
    folder_digest,
    rows_digest,
)


def prompts(*rows: tuple[str, str]) -> list[Prompt]:
    return [Prompt(i, text, (1,), answer) for i, (text, answer) in enumerate(rows)]


def test_the_digest_of_rows_changes_when_one_is_added_edited_or_moved():
    rows = [("a", "1"), ("b", "2"), ("c", "3")]
    changed = [rows[::-1], [*rows, ("d", "4")], [("a", "1"), ("b", "2 "), ("c", "3")], rows[:2]]
    assert len({rows_digest(prompts(*r)) for r in [rows, *changed]}) == 5
    assert rows_digest(prompts(*rows)) == rows_digest(prompts(*rows)) and rows_digest(prompts(*rows)).startswith(
        "3 rows"
    )


def test_the_digest_of_a_model_folder_covers_all_of_its_model_files(tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "megatron" / "x.distcp").write_bytes(bytes(100))
    seen = {folder_digest(tmp_path)}
    (tmp_path / "config.json").write_text("[]")
    seen.add(folder_digest(tmp_path))
    (tmp_path / "megatron" / "x.distcp").write_bytes(bytes(99) + b"x")
    seen.add(folder_digest(tmp_path))
    (tmp_path / "chat_template.jinja").touch()
    seen.add(folder_digest(tmp_path))
    assert len(seen) == 4


def test_other_files_in_a_model_folder_are_ignored(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = folder_digest(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.json").write_text("{}")
    (tmp_path / "notes.md").write_text("x")
    assert folder_digest(tmp_path) == before


def test_the_digest_of_a_large_file_covers_its_start_end_and_size(tmp_path):
    size = 2 * SAMPLES * SAMPLE_BYTES
    seen = set()
    for content in (bytes(size), b"x" + bytes(size - 1), bytes(size - 1) + b"x", bytes(size + 1)):
        (tmp_path / "x.safetensors").write_bytes(content)
        seen.add(folder_digest(tmp_path))
    assert len(seen) == 4


def test_the_digest_of_a_reward_function_covers_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "graders_of_mine.py").write_text("def score(text, answer): return 1.0\n")
    first = code_digest("graders_of_mine:score")
    (tmp_path / "graders_of_mine.py").write_text("def score(text, answer): return 0.0\n")
    sys.path_importer_cache.clear()
    assert first != code_digest("graders_of_mine:score") and "graders_of_mine.py" in first
    assert code_digest("no_such_module_at_all:score") is None


def test_the_digest_of_reward_code_covers_the_files_it_imports_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "judges_of_mine/__init__.py": "",
        "judges_of_mine/server.py": "from . import words\nclass Scorer:\n    def f(self): import late_part\n",
        "judges_of_mine/words.py": "from shared_of_mine import part\n",
        "shared_of_mine.py": "part = 1\n",
        "late_part.py": "",
        "unrelated_part.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    seen = {code_digest("judges_of_mine.server:Scorer")}
    for name in files:
        (tmp_path / name).write_text(files[name] + "# changed\n")
        changed = code_digest("judges_of_mine.server:Scorer")
        assert (changed in seen) == (name == "unrelated_part.py"), name
        seen.add(changed)
    assert code_digest("megatron_g2rl.rewards.http:HttpReward").startswith("http.py, ")


def test_every_one_of_several_rewards_is_compared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "first_of_two.py").write_text("def score(text, answer): return 1.0\n")
    (tmp_path / "second_of_two.py").write_text("class Scorer: pass\n")
    functions = [{"function": "first_of_two:score"}, {"function": "second_of_two:Scorer"}]
    settings = Config(model={"path": "m"}, data={"source": "s"}, reward={"functions": functions})
    seen = set()
    for name in ("first_of_two.py", "second_of_two.py", "second_of_two.py"):
        found = contents(settings, tmp_path, prompts(("a", "1")), {})
        assert "reward.function" not in found
        seen.add(found["reward.functions"])
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
    assert len(seen) == 3


def config(allowed: str = "") -> Config:
    return Config(model={"path": "m"}, data={"source": "s"}, checkpoint={"allow_changed": allowed})


def test_changed_contents_are_refused_by_name_unless_allowed():
    before = {"data.source": "3 rows, aa", "model.path": "2 files, bb"}
    now = {"data.source": "4 rows, cc", "model.path": "2 files, bb", "reward.function": "new"}
    check_contents(before, before, config(), "step_1")
    with pytest.raises(ConfigError) as error:
        check_contents(before, now, config(), "step_1")
    assert "data.source: 3 rows, aa -> 4 rows, cc" in str(error.value) and "model.path" not in str(error.value)
    assert "checkpoint.allow_changed=data.source" in str(error.value)
    check_contents(before, now, config("data.source"), "step_1")
