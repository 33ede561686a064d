"""Folders of runs: existing, corrupt, changed, removed or on a full disk; the error names the cause and the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from failing_runs import SCORE, assert_one_message, train

# In a step, not when the function is smoke-tested on an empty and a correct response.
ONCE = (
    "import os, pathlib, shutil\ndef score(t, a):\n  if t and 'boxed' not in t: once()\n  return 1.0\ndef once():\n  "
)
REMOVE = "shutil.rmtree('runs/run', ignore_errors=True)\n"
MOVE = "os.path.exists('runs/run') and os.rename('runs/run', 'runs/other')\n"
REPLACE = f"{MOVE}  pathlib.Path('runs/run').mkdir(exist_ok=True), pathlib.Path('runs/run/run.lock').touch()\n"
EVERY = ("trainer.steps=3", "checkpoint.every_steps=1", "checkpoint.export_hf_every=1", SCORE)


def _truncate_largest(checkpoint: Path, name: str, size: int) -> None:
    os.truncate(max(checkpoint.rglob(name), key=lambda file: file.stat().st_size), size)


def test_an_existing_run_is_reported_and_a_corrupt_checkpoint_named(place):
    assert (fine := train(place)).code == 0, fine.text
    checkpoint = place.folder / "runs" / "run" / "checkpoints" / "step_00000001"
    assert_one_message(train(place, "checkpoint.resume=false"), 2, ("step_00000001", "run.name", "checkpoint.resume"))
    for name, size in [("*.distcp", 1000), (".metadata", 50), ("trainer.json", 5)]:
        _truncate_largest(checkpoint, name, size)
        expected = (checkpoint.name, "is corrupt", "remove this folder")
        assert_one_message(train(place, "trainer.steps=2"), 1, expected)


def test_inputs_changed_since_the_run_started_are_named_before_it_resumes(place):
    place.write("mine.py", "def score(t, a): return 1.0\n")
    assert (first := train(place, SCORE)).code == 0, first.text
    rows, config = (place.folder / "problems.jsonl").read_text(), (place.folder / "model" / "config.json").read_text()
    changes = {
        "data.source": lambda: place.write("problems.jsonl", rows + '{"problem": "9+9=?", "answer": "18"}\n'),
        "model.path": lambda: place.change_model(transformers_version="0"),
        "reward.function": lambda: place.write("mine.py", "def score(t, a): return 0.5\n"),
    }
    for key, change in changes.items():
        change()
        expected = (key, "have changed since", f"checkpoint.allow_changed={key}")
        assert_one_message(train(place, SCORE, "trainer.steps=2"), 2, expected)
        place.write("problems.jsonl", rows)
        place.write("model/config.json", config)
        place.write("mine.py", "def score(t, a): return 1.0\n")
    changes["data.source"]()
    allowed = train(place, SCORE, "trainer.steps=2", "checkpoint.allow_changed=data.source")
    assert allowed.code == 0, allowed.text


@pytest.mark.parametrize(
    ("how", "left"), [(REMOVE, []), (MOVE, []), (REPLACE, ["run.lock"])], ids=["rm", "mv", "other"]
)
def test_a_run_whose_folder_is_removed_ends_at_the_next_write_and_does_not_recreate_it(how, left, place):
    place.write("mine.py", ONCE + how)
    outcome = train(place, *EVERY)
    assert_one_message(outcome, 1, ("runs/run is no longer the folder of this run", "put the folder back"))
    run = place.folder / "runs" / "run"
    assert [path.name for path in run.glob("*")] == left and run.exists() == bool(left)


@pytest.mark.same_for_both
def test_two_ranks_whose_folder_is_removed_report_it_once(place):
    place.write("mine.py", ONCE + REMOVE)
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", "config.yaml", "trainer.ranks=2", *EVERY]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=600)
    messages = [line for line in done.stderr.splitlines() if "is no longer the folder of this run" in line]
    assert len(messages) == 1 and messages[0].startswith("runs/run is"), done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr and "rank 1" not in done.stderr
    assert not (place.folder / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("room", "where"),
    [(0, "runs/run:"), (1_000_000, "runs/run:"), (8_000_000, "the checkpoint of step 2")],
    ids=["metrics", "export", "checkpoint"],
)
def test_a_disk_that_fills_up_ends_the_run_with_one_message_and_keeps_the_files_written(room, where, place):
    place.write("mine.py", "def score(t, a): return 1.0\n")
    assert (first := train(place, *EVERY[1:])).code == 0, first.text
    run, disk = place.folder / "runs" / "run", place.folder / "disk"
    shutil.copytree(place.folder / "runs", disk)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "small", str(place.folder / "runs")])
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    place.closing.callback(subprocess.run, ["umount", "--lazy", str(place.folder / "runs")], check=True)
    shutil.copytree(disk, place.folder / "runs", dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fill = "free = os.statvfs('runs')\n  if not os.path.exists('runs/ballast'):\n    "
    fill += f"pathlib.Path('runs/ballast').write_bytes(bytes(free.f_bavail * free.f_frsize - {room}))\n"
    place.write("mine.py", ONCE + fill)
    settings = ("checkpoint.allow_changed=reward.function", "checkpoint.asynchronous=false")
    outcome = train(place, *EVERY, *settings)
    assert_one_message(outcome, 1, (where, "No space left on device", "disk space", "resumes from step 1"))
    rewritten = ("metrics.jsonl", "responses.jsonl", "config.yaml", "status.json", "run.lock")
    for path, content in before.items():
        assert path.read_bytes().startswith(content) or path.name in rewritten, path
    (place.folder / "runs" / "ballast").unlink()
    place.write("mine.py", "def score(t, a): return 1.0\n")
    assert (resumed := train(place, *EVERY)).code == 0, resumed.text
