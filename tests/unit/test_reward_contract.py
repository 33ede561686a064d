"""The supported forms of reward functions: parameters, batch functions, async functions, classes."""

from __future__ import annotations

import inspect

import pytest

from megatron_g2rl.rewards import FunctionSpec, RewardError, RewardPool
from megatron_g2rl.rewards.binding import ALL_COLUMNS, BindingError, Sample, bind, possible_columns
from megatron_g2rl.rewards.contract import parameters_of

SAMPLE = Sample("the response", "42", "the prompt", (5, 6), "length", {"level": 3, "data_source": "math"})


def arguments_of(function, columns=("level", "data_source"), sample=SAMPLE):
    """Arguments that a function of one response is called with, by its own parameters."""
    positional, keywords = bind(parameters_of(function), columns).arguments(sample)
    bound = inspect.signature(function).bind(*positional, **keywords)
    bound.apply_defaults()
    return bound.arguments


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda response_text, answer: 0, ["the response", "42"]),
        (lambda t, a: 0, ["the response", "42"]),
        (lambda text, gold: 0, ["the response", "42"]),
        (lambda ground_truth, response: 0, ["42", "the response"]),
        (lambda answer, response: 0, ["42", "the response"]),
        (lambda *both: 0, [("the response", "42")]),
        (lambda *both, **others: 0, [("the response", "42"), {}]),
        (lambda t, a, /: 0, ["the response", "42"]),
        (lambda answer, response, /: 0, ["42", "the response"]),
        (lambda response, level: 0, ["the response", 3]),
        (lambda response: 0, ["the response"]),
        (lambda response, answer, tolerance=0.1: 0, ["the response", "42", 0.1]),
        (lambda t, a, finish_reason=None: 0, ["the response", "42", "length"]),
        (lambda response, *, prompt, tokens: 0, ["the response", "the prompt", [5, 6]]),
        (lambda response, columns: 0, ["the response", {"level": 3, "data_source": "math"}]),
        (lambda completion, level=1, absent=7: 0, ["the response", 3, 7]),
        (lambda completion, level, absent=7: 0, ["the response", 3, 7]),
        # verl's compute_score
        (lambda data_source, solution_str, ground_truth, extra_info=None: 0, ["math", "the response", "42", None]),
        (lambda completion, **row: 0, ["the response", {"level": 3, "data_source": "math"}]),
    ],
)
def test_a_parameter_receives_the_value_of_its_name(function, expected):
    assert list(arguments_of(function, sample=SAMPLE._replace(complete=True)).values()) == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda response, answer, difficulty: 0, "difficulty cannot be filled.*response, answer, prompt.*level"),
        (lambda response, answer, *, b, a: 0, "parameters b, a cannot"),
        (lambda answer, gold: 0, "gold cannot be filled"),
        (lambda prompt, x: 0, "x cannot be filled"),
        (lambda: 0, "takes no argument"),
        (lambda prompts, completions, difficulty: 0, "difficulty cannot be filled.*completion_ids|responses"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_known_ones(function, message):
    with pytest.raises(BindingError, match=message):
        bind(parameters_of(function), ("level",))


def test_columns_are_required_only_if_a_function_can_take_them():
    assert possible_columns(parameters_of(lambda response, answer: 0)) == set()
    assert possible_columns(parameters_of(lambda response, level, tolerance=0.1: 0)) == {"level", "tolerance"}
    assert possible_columns(parameters_of(lambda response, columns: 0)) == {ALL_COLUMNS}
    assert possible_columns(parameters_of(lambda completions, **row: 0)) == {ALL_COLUMNS}
    assert possible_columns(parameters_of(lambda *both, **others: 0)) == set()


def test_an_incomplete_response_is_empty_except_for_functions_that_can_detect_it():
    cut = SAMPLE._replace(complete=False)
    assert arguments_of(lambda response, answer: 0, sample=cut)["response"] == ""
    assert arguments_of(lambda response, **row: 0, sample=cut)["response"] == ""
    assert list(arguments_of(lambda response, finish_reason: 0, sample=cut).values()) == ["the response", "length"]
    assert list(arguments_of(lambda response, tokens: 0, sample=cut).values()) == ["the response", [5, 6]]


def test_a_batch_function_with_two_other_names_gets_responses_and_answers():
    bound = bind(parameters_of(lambda completions, difficulty: 0), ())
    assert bound.is_batch
    assert bound.batch_arguments([SAMPLE]) == ([], {"completions": ["the response"], "difficulty": ["42"]})


def test_a_default_is_used_where_a_row_lacks_the_column_which_is_then_optional():
    bare = SAMPLE._replace(columns={})
    assert list(arguments_of(lambda response, level=1: 0, sample=bare).values()) == ["the response", 1]
    assert bind(parameters_of(lambda response, level=1: 0), ("level",)).needed_columns == set()
    assert bind(parameters_of(lambda response, level: 0), ("level",)).needed_columns == {"level"}
    batch = bind(parameters_of(lambda responses, level=1: 0), ("level",))
    assert batch.batch_arguments([SAMPLE, bare])[1]["level"] == [3, None]
    assert "level" not in batch.batch_arguments([bare, bare])[1]


def test_configured_arguments_may_be_between_the_two(forms):
    with forms("between", arguments={"scale": 0.5}) as pool:
        assert pool.score([("10", "20")]).rewards == [0.015]


def test_columns_in_kwargs_do_not_override_configured_arguments():
    bound = bind(parameters_of(lambda response, **row: 0), ("level",), frozenset({"level"}))
    assert bound.arguments(SAMPLE) == ([], {"response": "the response", "data_source": "math"})


FORMS = r'''
import asyncio, os, pathlib, time

def trl(prompts, completions, completion_ids, level, **others):
    """As TRL calls it: lists, columns by name."""
    assert len({len(x) for x in (prompts, completions, completion_ids, level, *others.values())}) == 1
    assert set(others) == {"kind"}
    return [float(text) / 1000 if kind == "a" else (0.0, True) for text, kind in zip(completions, others["kind"])]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str) / 1000, "acc": data_source == "math"}

def nemo_rl(ground_truth: str, response: str, tag: str = "answer") -> tuple[float, bool]:
    return float(response) / 1000, tag == ground_truth

barrier = None

async def together(response, answer):
    """Returns only when four calls are running."""
    global barrier
    barrier = barrier or asyncio.Barrier(4)
    if response == "raise":
        raise KeyError("not this one")
    if response == "hang":
        await asyncio.sleep(3600)
    if answer == "4":
        await barrier.wait()
    return float(response) / 1000

async def batch_async(responses, answers):
    await asyncio.sleep(0)
    return [float(text) / 1000 for text in responses]

def batch(responses, answers, mode=""):
    if "hang" in responses:
        time.sleep(3600)
    if "exit" in responses:
        os._exit(3)
    if "short" in responses:
        return [0.0] * (len(responses) - 1)
    if "bad" in responses:
        return [float("nan") if text == "bad" else 0.0 for text in responses]
    if mode == "sizes":
        return [len(responses) / 1000] * len(responses)
    return [float(text) / 1000 for text in responses]

def awaitable(response, answer):
    return AsyncJudge()(response, answer)

def between(t, scale, a):
    return scale * (float(t) + float(a)) / 1000

def constant(response, answer):
    return 0.1

class Scorer:
    def __init__(self, folder, bonus=0.0, deadline_s=None):
        self.folder, self.bonus, self.deadline_s, self.calls = pathlib.Path(folder), bonus, deadline_s, 0
        if bonus > 1:
            raise ValueError("too much of a bonus")
        (self.folder / f"opened {os.getpid()}").touch()

    def __call__(self, response, answer):
        self.calls += 1
        return float(response) / 1000 + self.bonus, self.deadline_s == 7

    def close(self):
        (self.folder / f"closed {os.getpid()} {self.calls}").touch()

class AsyncJudge:
    async def __call__(self, response, answer):
        return float(response) / 1000

    async def close(self):
        print("closed")

class Mute:
    pass

instance = AsyncJudge()
'''


@pytest.fixture
def forms(tmp_path, monkeypatch):
    (tmp_path / "reward_forms.py").write_text(FORMS)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, *others, workers=1, deadline_s=20.0, **settings: RewardPool(
        [FunctionSpec(f"reward_forms:{name}", **settings)], workers, deadline_s
    )


def items(*texts: str, answer: str = "") -> list[tuple[str, str]]:
    return [(text, answer) for text in texts]


def test_a_trl_function_gets_lists_and_columns_by_name(forms):
    samples = [Sample(str(i), "", "p", (1,), "stop", {"level": i, "kind": "ab"[i % 2]}) for i in range(7)]
    with forms("trl", batch_size=3) as pool:
        assert pool.possible_columns == {ALL_COLUMNS}
        assert pool.bind({"level", "kind"}) == {"level"}
        result = pool.score(samples)
    assert result.rewards == [0.0, 0.0, 0.002, 0.0, 0.004, 0.0, 0.006]
    assert result.correct == [None, True] * 3 + [None]


def test_a_verl_function_and_a_nemo_rl_function_define_correctness(forms):
    with forms("verl") as pool:
        pool.bind({"data_source"})
        found = pool.score([Sample("5", "42", columns={"data_source": source}) for source in ("math", "code")])
    assert (found.rewards, found.correct) == ([0.005, 0.005], [True, False])
    with forms("nemo_rl") as pool:
        found = pool.score([("5", "answer"), ("6", "42")])
    assert (found.rewards, found.correct) == ([0.005, 0.006], [True, False])


def test_a_column_missing_from_the_data_is_refused_before_a_call(forms):
    with forms("verl") as pool, pytest.raises(RewardError, match=r"reward_forms:verl cannot.*data_source.*\(level\)"):
        pool.bind({"level"})


def test_async_calls_of_a_worker_run_concurrently_with_independent_results(forms):
    with forms("together") as pool:
        assert pool.score(items("1", "2", "3", "4", answer="4")).rewards == [0.001, 0.002, 0.003, 0.004]
        with pytest.raises(RewardError, match="1 of 3 responses, first for item 1 .*not this one"):
            pool.score(items("1", "raise", "3"))


@pytest.mark.parametrize("name", ["batch_async", "awaitable", "AsyncJudge", "instance", "batch"])
def test_async_batches_awaitables_and_async_objects_are_awaited(forms, name):
    with forms(name, workers=2) as pool:
        assert pool.score(items(*map(str, range(50)))).rewards == [i / 1000 for i in range(50)]


@pytest.mark.parametrize(
    ("name", "fault", "reason"),
    [("together", "hang", "timed_out"), ("batch", "hang", "timed_out"), ("batch", "exit", "died")],
)
def test_of_responses_scored_together_only_the_faulty_one_is_lost(forms, name, fault, reason):
    with forms(name, deadline_s=5.0) as pool:
        found = pool.score(items("1", "2", fault, "4", "5"))
        assert pool.score(items("7")).rewards == [0.007]
    assert found.rewards == [0.001, 0.002, -1.0, 0.004, 0.005]
    assert getattr(found, reason) == [False, False, True, False, False]
    assert found.correct == [None, None, False, None, None]


@pytest.mark.parametrize(("fault", "message"), [("short", "2 results for a batch of 3"), ("bad", "it returned nan")])
def test_a_batch_with_an_invalid_result_stops_the_run_with_the_reason(forms, fault, message):
    with forms("batch") as pool, pytest.raises(RewardError, match=message):
        pool.score(items("1", fault, "3"))


def test_a_batch_is_at_most_the_configured_size(forms):
    with forms("batch", batch_size=4, arguments={"mode": "sizes"}) as pool:
        assert pool.score(items(*"1234567890")).rewards == [0.004] * 8 + [0.002] * 2


def test_a_class_is_instantiated_once_per_worker_and_closed_at_the_end(forms, tmp_path):
    arguments = {"folder": str(tmp_path), "bonus": 0.5}
    with forms("Scorer", workers=2, arguments=arguments, deadline_s=7.0) as pool:
        pids = {str(worker.process.pid) for worker in pool._workers}
        found = [pool.score(items(*map(str, range(20)))) for _ in range(3)]
    assert all(one.rewards == [0.5 + i / 1000 for i in range(20)] and all(one.correct) for one in found)
    assert {file.name for file in tmp_path.glob("opened *")} == {f"opened {pid}" for pid in pids}
    closed = [file.name.split()[1:] for file in tmp_path.glob("closed *")]
    assert {pid for pid, _ in closed} == pids and sum(int(calls) for _, calls in closed) == 60


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Scorer", {}, "do not fit Scorer.*missing a required argument: 'folder'"),
        ("Scorer", {"folder": ".", "speed": 3}, "unexpected keyword argument 'speed'"),
        ("Scorer", {"folder": ".", "bonus": 2}, "ValueError: too much of a bonus"),
        ("Mute", {}, "instances are not callable: add __call__"),
        ("batch", {"speed": 3}, "do not fit batch.*'speed'"),
    ],
)
def test_an_unusable_class_or_arguments_are_refused_at_the_start(forms, name, arguments, message, tmp_path):
    with pytest.raises(RewardError, match=message):
        forms(name, arguments=arguments)


def test_several_functions_score_the_same_responses_each_with_its_own_deadline(tmp_path, monkeypatch):
    (tmp_path / "several.py").write_text(
        "import time\n"
        "def slow(response, answer):\n    time.sleep(3600 if response == '3' else 0)\n    return 0.25, True\n"
        "def length(responses, answers):\n    return [len(text) for text in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    specs = [
        FunctionSpec("several:slow", deadline_s=5.0),
        FunctionSpec("several:length", bounded=False, batch_size=100),
    ]
    with RewardPool(specs, 2, 60.0) as pool:
        slow, length = pool.score_all(items("1", "22", "3", "4444"))
    assert slow.rewards == [0.25, 0.25, -1.0, 0.25] and slow.timed_out == [False, False, True, False]
    assert slow.correct == [True, True, False, True]
    assert length.rewards == [1, 2, 1, 4] and length.correct == [None] * 4


def test_an_error_names_the_failing_one_of_several_functions(forms):
    specs = [FunctionSpec("reward_forms:constant"), FunctionSpec("reward_forms:together")]
    message = r"reward\.functions: reward_forms:together"
    with RewardPool(specs, 1, 20.0, "reward.functions") as pool, pytest.raises(RewardError, match=message):
        pool.score(items("1", "raise"))
