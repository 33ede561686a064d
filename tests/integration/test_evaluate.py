"""`g2rl evaluate` in real processes: its files, a kill and resume, several ranks, and equality with training."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import psutil
import pyarrow.parquet
import pytest
from evaluation_runs import SUMS, g2rl
from failing_runs import Place, assert_one_message

from megatron_g2rl.commands import offline_analysis, offline_evaluation
from megatron_g2rl.commands.offline_evaluation import convert
from megatron_g2rl.evaluation import pass_at_k
from megatron_g2rl.report.groups import setting_key
from megatron_g2rl.report.results import group_results, read_results
from megatron_g2rl.report.runs import read_runs
from megatron_g2rl.rewards.boxed import last_boxed
from megatron_g2rl.rollout.journal import JournaledRollout
from tools.fuzz.forking import ForkedCommand, Outcome, fork_ranks, preload, wait_for_all

pytestmark = [pytest.mark.slow, pytest.mark.same_for_both]

CHOICES = """
source: choices.jsonl
choices: [options]
prompt: "{problem} {choices}"
answer: letter
metrics: [pass@1, pass@2]
samples: 2
"""


@pytest.fixture
def sums(place) -> Place:
    """A folder with a model, a configuration and two benchmarks."""
    place.write("sums.yaml", SUMS)
    rows = [{"problem": f"{a}+{b}=?", "answer": str(a + b)} for a in range(5) for b in range(4)]
    place.write("sums.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    place.write("choices.yaml", CHOICES)
    rows = [{"problem": f"{n}?", "options": ["a", "b"], "answer": "AB"[n % 2]} for n in range(4)]
    place.write("choices.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return place


def evaluate(place: Place, *arguments: str) -> Outcome:
    return g2rl(place, "evaluate", "config.yaml", *arguments)


def succeed(place: Place, *arguments: str) -> str:
    outcome = evaluate(place, *arguments)
    assert outcome.code == 0, outcome.text[-3000:]
    return outcome.text


def results(folder: Path) -> dict[str, bytes]:
    """Content of every file, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def read(folder: Path) -> tuple[dict, list[dict]]:
    """The summary and the rows of the responses."""
    rows = pyarrow.parquet.read_table(folder / "responses.parquet").to_pylist()
    return json.loads((folder / "summary.json").read_text()), rows


def only(folder: Path) -> Path:
    """The only entry of a folder."""
    (entry,) = folder.iterdir()
    return entry


def test_the_command_writes_every_response_and_metrics_that_follow_from_them(sums):
    text = succeed(sums, "--benchmark", "sums.yaml,choices.yaml")
    folder = only(sums.folder / "evaluations")
    summary, rows = read(folder / "sums")
    assert len(rows) == summary["responses"] == 20 * 40 and summary["problems"] == 20
    assert summary["training"] is None, "the model is not that of a run"
    assert [row["index"] for row in rows[:40]] == list(range(40))
    groups = [rows[start : start + 40] for start in range(0, len(rows), 40)]
    assert all(row["answer"] == last_boxed(row["response"]) for row in rows)
    metrics = summary["metrics"]
    for k in (1, 8):
        expected = fmean(pass_at_k([row["correct"] for row in group], k) for group in groups)
        assert metrics[f"pass_at_{k}"] == pytest.approx(expected)
        low, high = summary["intervals"][f"pass_at_{k}"]
        assert low <= metrics[f"pass_at_{k}"] <= high
    assert metrics["truncated_fraction"] == fmean(row["finish_reason"] == "length" for row in rows)
    assert metrics["unparsed_fraction"] == fmean(row["answer"] is None for row in rows)
    assert metrics["response_length_mean"] == fmean(row["tokens"] for row in rows)
    assert 0 < metrics["truncated_fraction"] < 1 and len({row["response"] for row in rows}) > 400
    summary, rows = read(folder / "choices")
    assert len(rows) == 8 and "0? A. a\nB. b" in rows[0]["prompt"] and rows[0]["reference"] == "A"
    assert not list(folder.rglob("rollouts")), "the journal of a complete evaluation is removed"
    before = results(folder)
    assert "is complete" in succeed(sums, "--benchmark", "sums.yaml,choices.yaml") and "is complete" not in text
    assert results(folder) == before
    assert_one_message(
        evaluate(sums, "--benchmark", "sums.yaml", "--temperature", "0.5"), 2, ("other settings", "--output")
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)], ids=["SIGKILL", "SIGTERM"])
def test_an_interrupted_evaluation_resumes_to_the_same_bytes(sums, number, code):
    command = ["evaluate", "config.yaml", "--benchmark", "sums.yaml,choices.yaml", "--output", "killed"]
    output = sums.folder.parent / "killed.out"

    def write_slowly() -> None:
        append = JournaledRollout._append

        def slow(self, *arguments) -> None:
            append(self, *arguments)
            time.sleep(0.5)

        JournaledRollout._append = slow

    environment = os.environ | sums.environment
    process = ForkedCommand(command, sums.folder, output, environment=environment, before=write_slowly)
    deadline = time.monotonic() + 200
    while not (journals := list(sums.folder.rglob("rollouts/*.jsonl"))) or not journals[0].stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline, process.read()[-3000:]
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(300) == code and not list(sums.folder.rglob("summary.json")), "killed too late to test"
    lines = journals[0].read_bytes().count(b"\n")
    assert 0 < lines < 20, "some groups are journaled, not all"
    succeed(sums, "--benchmark", "sums.yaml,choices.yaml", "--output", "killed")
    succeed(sums, "--benchmark", "sums.yaml,choices.yaml", "--output", "undisturbed")
    resumed, undisturbed = results(sums.folder / "killed"), results(sums.folder / "undisturbed")
    assert len(resumed) == 4 and resumed == undisturbed


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    "command, module, work",
    [
        (["evaluate", "config.yaml", "--benchmark", "sums.yaml"], offline_evaluation, "load_benchmark"),
        (["analyze", "config.yaml", "evaluations"], offline_analysis, "read_responses"),
    ],
    ids=["evaluate", "analyze"],
)
def test_a_signal_while_loading_ends_the_command_immediately(
    sums, tmp_path_factory, command, module, work, number, code
):
    succeed(sums, "--benchmark", "choices.yaml")
    place = tmp_path_factory.mktemp("interrupted")
    loading, output = place / "loading", place / "output"

    def load_forever(*_: object) -> None:
        loading.touch()
        while True:  # a signal right before a long sleep would not interrupt it
            time.sleep(0.1)

    environment = os.environ | sums.environment
    before = functools.partial(setattr, module, work, load_forever)
    process = ForkedCommand(command, sums.folder, output, environment=environment, before=before)
    deadline = time.monotonic() + 200
    while not loading.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.read()[-3000:]
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(200) == code, process.read()[-3000:]
    assert f"{signal.Signals(number).name}: stopping; there is nothing to save yet" in process.read()


def test_two_ranks_share_the_work_and_give_the_same_responses(sums):
    succeed(sums, "--benchmark", "sums.yaml", "--samples", "4", "--output", "one")
    preload()

    command = ["evaluate", "config.yaml", "--benchmark", "sums.yaml", "--samples", "4", "--output", "two"]
    ranks = fork_ranks(2, command, sums.folder, sums.folder.parent / "rank", os.environ | sums.environment)
    assert wait_for_all(ranks, 240) == [0, 0], [process.read()[-2000:] for process in ranks]
    (one, rows), (two, others) = (read(only(sums.folder / name) / "sums") for name in ("one", "two"))
    for row, other in zip(rows, others, strict=True):
        assert row["logprob"] == pytest.approx(other.pop("logprob"), abs=1e-3)  # float32 sums in other batches
        del row["logprob"]
    assert rows == others and one == two


def test_evaluation_in_training_and_of_its_checkpoint_give_the_same_numbers(sums):
    sums.write("sums.yaml", SUMS.replace("samples: 40", "samples: 8"))
    shutil.copy(sums.folder / "sums.jsonl", sums.folder / "test.jsonl")
    settings = [
        "evaluation.source=test.jsonl",
        "evaluation.responses_per_prompt=3",
        "evaluation.benchmarks=[sums.yaml, choices.yaml]",
        "checkpoint.every_steps=1",
        "optimizer.learning_rate=0.01",
        "trainer.steps=2",
        "checkpoint.keep=3",
    ]
    outcome = g2rl(sums, "train", "config.yaml", *settings)
    assert outcome.code == 0, outcome.text[-3000:]
    run = sums.folder / "runs" / "run"
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    online = {line["step"]: line for line in lines}
    succeed(sums, *settings, f"--checkpoint={run}")  # its latest checkpoint, on all sets of the configuration
    folder = sums.folder / "evaluations" / "run_step_00000002"
    for prefix, name in (("", "evaluation"), ("sums/", "sums"), ("choices/", "choices")):
        summary, rows = read(folder / name)
        expected = {f"evaluation/{prefix}{key}": value for key, value in summary["metrics"].items()}
        assert expected == {key: online[2][key] for key in expected} and len(expected) > 5
        assert summary["step"] == 2 and len({row["response"] for row in rows}) > 5
        assert summary["training"]["trainer"]["steps"] == 2
    group, *_ = group_results(read_results([folder]))
    assert setting_key(group.settings) == setting_key(read_runs([run])[0].settings | {"step": 2})
    # the weights of another step give other responses, so that the equality above says something
    earlier = run / "checkpoints" / "step_00000001"
    succeed(sums, *settings, f"--checkpoint={earlier}", "--benchmark", "sums.yaml")
    others = read(sums.folder / "evaluations" / "run_step_00000001" / "sums")[1]
    assert [row["response"] for row in others] != [row["response"] for row in read(folder / "sums")[1]]
    assert not list(sums.folder.rglob("converted"))


def test_greedy_decoding_of_an_exported_folder_and_of_a_checkpoint_agree(sums):
    outcome = g2rl(sums, "train", "config.yaml", "checkpoint.export_hf_every=1", "trainer.steps=1")
    assert outcome.code == 0, outcome.text[-3000:]
    run = sums.folder / "runs" / "run"
    options = ["--benchmark", "sums.yaml", "--samples", "1", "--temperature", "0"]
    succeed(sums, f"--checkpoint={run / 'model'}", f"--checkpoint={run / 'checkpoints/step_00000001'}", *options)
    texts = [
        [row["response"] for row in read(sums.folder / "evaluations" / label / "sums")[1]]
        for label in ("run_model", "run_step_00000001")
    ]
    assert texts[0] == texts[1]


def test_everything_that_names_and_files_show_is_one_message_before_anything_is_loaded(sums):
    arguments = [
        "--benchmark",
        "maht500,./none.yaml,sums.yaml",
        "--checkpoint",
        "runs/none",
        "--checkpoint",
        "sums.yaml",
    ]
    (sums.folder / "sums.jsonl").unlink()
    outcome = evaluate(sums, *arguments, "rollout.tensor_parallel=3")
    expected = (
        "unknown benchmark 'maht500': the known ones are aime24, aime25, amc23, gpqa_diamond, gsm8k, math500, mmlu_pro",
        "there is no benchmark file ./none.yaml",
        "sums.yaml is a file",
        "rollout.tensor_parallel=3 does not divide",
    )
    assert_one_message(outcome, 2, expected)
    (sums.folder / "runs" / "none").mkdir(parents=True)
    outcome = evaluate(sums, "--benchmark", "sums.yaml", "--checkpoint", "runs/none")
    assert_one_message(outcome, 2, ("neither a model", "sums.jsonl: there is no such file"))
    assert_one_message(evaluate(sums), 2, ("nothing to evaluate: give --benchmark",))


def test_wrong_columns_of_all_benchmarks_are_one_message_before_the_model_is_loaded(sums):
    for name in ("sums", "choices"):
        file = sums.folder / f"{name}.yaml"
        file.write_text(file.read_text() + "prompt_column: question\n")
    next((sums.folder / "model").glob("*.safetensors")).unlink()  # reading the weights would be another error
    outcome = evaluate(sums, "--benchmark", "sums.yaml,choices.yaml")
    assert_one_message(outcome, 2, ("benchmark sums: prompt_column:", "benchmark choices: prompt_column:", "problem"))


@pytest.mark.vllm
def test_vllm_and_transformers_give_the_same_greedy_responses(sums):
    options = ["--benchmark", "sums.yaml", "--samples", "1", "--temperature", "0"]
    succeed(sums, *options, "--output", "transformers")
    succeed(sums, *options, "--output", "vllm", "rollout.engine=vllm", "rollout.kv_cache_mb=64")
    texts = [
        [row["response"] for row in read(only(sums.folder / name) / "sums")[1]] for name in ("transformers", "vllm")
    ]
    agreeing = sum(one == other for one, other in zip(*texts, strict=True))
    assert agreeing >= 19, texts  # nearly equal logits of a random model can be ordered differently


def test_a_stop_ends_a_conversion_and_its_process(tmp_path):
    assert not convert(tmp_path / "checkpoint", tmp_path / "converted", None, stop=lambda: True)
    assert not psutil.Process().children()


CONVERSION = """
from pathlib import Path
from megatron_g2rl.commands import offline_evaluation as module
start = module._CONVERT.partition("from megatron_g2rl.cli")[0]
module._CONVERT = start + "import pathlib, time; pathlib.Path('started').touch(); time.sleep(600)"
module.convert(Path("checkpoint"), Path("converted"), None)
"""
"""A conversion that does not end by itself."""


def test_a_signal_to_the_ranks_does_not_reach_a_conversion_and_a_killed_rank_takes_it_along(tmp_path):
    with subprocess.Popen([sys.executable, "-c", CONVERSION], cwd=tmp_path, start_new_session=True) as rank:
        try:
            deadline = time.monotonic() + 200
            while not (tmp_path / "started").exists():
                assert time.monotonic() < deadline and rank.poll() is None
                time.sleep(0.02)
            (conversion,) = psutil.Process(rank.pid).children()
            assert os.getsid(conversion.pid) != os.getsid(rank.pid)
        finally:
            rank.kill()
    assert not psutil.wait_procs([conversion], 60)[1]
