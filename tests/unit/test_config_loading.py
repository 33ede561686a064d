"""YAML with bases, overrides, and the error messages about both."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import pytest

from megatron_g2rl.config import renamed
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.loading import dump_config, load_config

MINIMAL = "model: {path: org/model}\ndata: {source: org/data}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides)
    return str(error.value)


def test_a_file_overrides_its_base_and_command_line_overrides_both(write):
    write(MINIMAL + "trainer: {steps: 1, group_size: 4, prompts_per_step: 8}", "shared/far.yaml")
    write("base: far.yaml\ntrainer: {steps: 2, group_size: 6}", "shared/near.yaml")
    file = write("base: shared/near.yaml\ntrainer: {steps: 3}")
    trainer = load_config(file).trainer
    assert (trainer.steps, trainer.group_size, trainer.prompts_per_step) == (3, 6, 8)
    assert load_config(file, ["trainer.steps=4", "trainer.steps=5"]).trainer.steps == 5


def test_circular_bases_are_refused_with_the_complete_circle(write):
    write("base: run.yaml", "other.yaml")
    message = refusal(write("base: other.yaml"))
    assert message.count("run.yaml") == 2 and "other.yaml" in message and "cycle" in message


def test_a_missing_base_is_reported_with_the_file_and_line_that_refers_to_it(write):
    file = write("# comment\nbase: nowhere.yaml\n" + MINIMAL)
    assert f"{file}:2" in refusal(file) and "nowhere.yaml" in refusal(file)


@pytest.mark.parametrize("written", ["5e-7", "0.5E-6", "5.0e-07", ".0000005"])
def test_a_number_with_an_exponent_is_a_number_in_files_and_overrides(write, written):
    file = write(MINIMAL + f"optimizer: {{learning_rate: {written}}}")
    assert math.isclose(load_config(file).optimizer.learning_rate, 5e-7)
    assert math.isclose(load_config(file, [f"optimizer.weight_decay={written}"]).optimizer.weight_decay, 5e-7)


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("run.name", "007", "007"),
        ("run.name", "1e-3", "1e-3"),
        ("run.directory", "5", Path("5")),
        ("data.plain_template", "Q: {problem}", "Q: {problem}"),
        ("data.plain_template", '"{problem}\\n"', "{problem}\n"),
        ("data.system_prompt", "", ""),
        ("data.subset", "null", None),
        ("algorithm.dual_clip", "null", None),
        ("trainer.steps", "010", 10),
        ("policy.sequence_parallel", "true", True),
        ("reward.function", "my.module:score", "my.module:score"),
    ],
)
def test_an_override_is_parsed_as_the_type_of_its_key(write, key, written, value):
    section, leaf = key.split(".")
    config = load_config(write(MINIMAL), [f"{key}={written}"])
    assert getattr(getattr(config, section), leaf) == value


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-option", "a/b", "a b", "$(id)"])
def test_a_run_name_is_one_folder_name_and_not_an_option(write, name):
    assert "run.name" in refusal(write(MINIMAL), f"run.name={name}")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("trainer.group_sze", "trainer.group_size"),
        ("trainer.temperature", "rollout.temperature"),
        ("kl_coefficient", "algorithm.kl_coefficient"),
        ("optimizer.lr_rate", "optimizer.learning_rate"),
        ("algorithm.kl_coeficient", "algorithm.kl_coefficient"),
    ],
)
def test_an_unknown_key_is_reported_with_the_most_similar_key(write, wrong, nearest):
    message = refusal(write(MINIMAL), f"{wrong}=1")
    assert f"unknown key {wrong}" in message and nearest in message


def test_a_renamed_key_or_value_is_an_error_that_names_the_new_one(write):
    file = write(MINIMAL + "checkpoint: {on_damage: previous}\n")
    assert "run.yaml:3: checkpoint.on_damage is now called checkpoint.on_corruption" in refusal(file)
    message = refusal(write(MINIMAL), "checkpoint.on_damage=error")
    assert "command line: checkpoint.on_damage is now called checkpoint.on_corruption" in message
    message = refusal(write(MINIMAL), "checkpoint.best_metric=majority_at_n")
    assert "majority_at_n is now called maj_at_n" in message
    assert load_config(write(MINIMAL), ["checkpoint.best_metric=maj_at_n"]).checkpoint.best_metric == "maj_at_n"


def test_the_new_names_of_renamed_keys_exist_and_the_old_ones_do_not():
    assert set(renamed.KEYS.values()) <= set(config_keys()) and not set(renamed.KEYS) & set(config_keys())


def test_an_unknown_key_is_reported_with_its_file_and_line(write):
    write(MINIMAL + "\ntrainer:\n  stepps: 3\n", "base.yaml")
    message = refusal(write("base: base.yaml\n"))
    assert "base.yaml:5: unknown key trainer.stepps. Nearest valid key: trainer.steps" in message


def test_an_unknown_section_is_one_error_and_not_one_per_key(write):
    message = refusal(write(MINIMAL + "trainr: {steps: 1, group_size: 2}"))
    assert message.count("\n") == 1 and "unknown section trainr. Nearest valid section: trainer" in message


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("trainer.steps", "ten"),
        ("trainer.steps", '"10"'),
        ("trainer.steps", "true"),
        ("trainer.steps", "1.5"),
        ("trainer.steps", "0"),
        ("trainer.steps", "null"),
        ("trainer.steps", "[1]"),
        ("trainer.steps", "{a: 1}"),
        ("policy.sequence_parallel", "yes"),
        ("policy.sequence_parallel", "1"),
        ("policy.precision", "fp16"),
        ("optimizer.learning_rate", ".nan"),
        ("optimizer.learning_rate", ".inf"),
        ("optimizer.learning_rate", "1e999"),
        ("algorithm.dual_clip", "1"),
        ("exploration.strength", "2.5"),
        ("run.name", "a/b"),
        ("model.path", "null"),
    ],
)
def test_an_invalid_value_is_refused_in_files_and_overrides_with_the_expected_type(write, key, written):
    section, leaf = key.split(".")
    base = write(MINIMAL, "base.yaml")
    file = write(f"base: {base.name}\n{section}:\n  {leaf}: {written}\n")
    for message, origin in ((refusal(file), f"{file}:3: "), (refusal(base, f"{key}={written}"), "command line: ")):
        assert origin + f"{key} = " in message
        assert config_keys()[key].allowed in message
        assert message.count("\n") == 1, "one mistake is one line"


def test_all_errors_of_all_files_and_overrides_are_in_one_message(write):
    write("trainer: {steps: ten}\ntypo: 1", "base.yaml")
    message = refusal(write("base: base.yaml\npolicy: 3\n"), "rollout.engine=hf", "algorithm.temperature=1")
    for part in ("trainer.steps", "typo", "policy = 3", "rollout.engine", "algorithm.temperature"):
        assert part in message
    assert "model.path is missing" in message and "data.source is missing" in message


@pytest.mark.parametrize(
    ("second", "line", "said"),
    [
        ("source: b, wieght: 2", 5, "unknown key data.sources.1.wieght. Nearest valid key: data.sources.1.weight"),
        ("source: b, weight: many", 5, "data.sources.1.weight = 'many' is not allowed"),
        ("source: b, weight: 0", 5, "data.sources.1.weight = 0 is not allowed"),
        ("weight: 2", 5, "data.sources.1.source is missing"),
        ("source: b, answer_regex: '(('", 5, "data.sources.1.answer_regex = '((' is not a valid regular expression"),
    ],
)
def test_a_mistake_in_a_list_of_sections_names_its_line_and_place(write, second, line, said):
    file = write(f"model: {{path: m}}\ndata:\n  sources:\n    - {{source: a}}\n    - {{{second}}}\n")
    message = refusal(file)
    assert f"{file}:{line}: {said}" in message and message.count("\n") == 1


def test_text_in_a_list_is_what_was_written(write):
    file = write(MINIMAL + "rollout: {stop: [007, true, 'null']}")
    assert load_config(file).rollout.stop == ("007", "true", "null")


def test_repeated_keys_are_refused_with_both_lines(write):
    message = refusal(write(MINIMAL + "trainer:\n  steps: 1\n  ranks: 1\n  steps: 2\ntrainer: {steps: 3}"))
    assert "run.yaml:6: steps is written twice" in message and "run.yaml:4" in message
    assert "run.yaml:7: trainer is written twice" in message


def test_dotted_keys_in_a_file_are_reported_with_the_nested_form(write):
    assert "put steps: under trainer:" in refusal(write(MINIMAL + "trainer.steps: 1"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("trainer:\n\tsteps: 1", "run.yaml:2: not valid YAML"),
        ("trainer: [", "not valid YAML"),
        ("- a", "mapping of sections"),
        ("a: &x {b: *x}", "nested too deeply"),
        ("trainer: {steps: !!python/object:os.system 3}", "tag"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_location(write, text, part):
    assert part in refusal(write(text))


def test_a_missing_file_is_reported_with_the_searched_path(tmp_path):
    assert str(Path.cwd()) in refusal(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["trainer.steps", "=3", "trainer.=3", ".steps=3"])
def test_a_malformed_override_is_refused(write, override):
    assert "section.key=value" in refusal(write(MINIMAL), override)


def test_an_optional_section_can_be_enabled_and_disabled(write):
    file = write(MINIMAL + "evaluation: {every_steps: 7}")
    assert load_config(file).evaluation.every_steps == 7
    assert load_config(file, ["evaluation=null"]).evaluation is None
    assert load_config(write(MINIMAL, "b.yaml"), ["evaluation={}"]).evaluation.every_steps == 20


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p"])
def test_truncated_sampling_in_training_is_refused_with_the_reason(write, key):
    message = refusal(write(MINIMAL), f"rollout.{key}=1")
    assert f"rollout.{key} does not exist: training samples from" in message and f"evaluation.{key}" in message


@pytest.mark.parametrize("written", ["{steps: 7}", "{}", "null"])
def test_the_removed_section_of_the_warm_start_is_refused_with_the_command_to_run(write, written):
    message = refusal(write(f"model: {{path: 'builtin:tiny'}}\ndata: {{source: x}}\nwarm_start: {written}\n"))
    assert message.count("\n") == 1
    assert "run.yaml:3: warm_start is no longer part of a run: `g2rl warm-start examples" in message
    assert "warm_start is no longer" in refusal(write(MINIMAL), "warm_start.steps=7")


def test_a_dumped_configuration_reads_back_the_same(write):
    file = write(MINIMAL + "run: {name: '1e-3'}\noptimizer: {learning_rate: 5e-7}\nevaluation: {}")
    config = load_config(file, ["data.plain_template=é: {problem}\n#", "algorithm.dual_clip=null"])
    assert load_config(write(dump_config(config), "dumped.yaml")) == config


def test_every_key_survives_a_dump_of_its_default(write):
    dumped = dump_config(load_config(write(MINIMAL + "evaluation: {}")))
    config = load_config(write(dumped, "dumped.yaml")).model_dump(mode="json")
    written = {f"{section}.{leaf}" for section, leaves in config.items() for leaf in leaves}
    assert written == set(config_keys()) and json.dumps(config)


@pytest.mark.parametrize(
    "text",
    ["Answer #1 carefully", "&x", "*x", "!important", "models/a #b", "a: b", "[a", "{a: 1}", "- a", 'say "yes"', "  a "]
    + ["two\nlines", "'it's'", '"a" and "b"', "%x", "@x", "`x`", "| x", "> x", "? x", "true", "1e3", "# x"],
)
def test_text_on_the_command_line_is_kept_verbatim(write, text):
    assert load_config(write(MINIMAL), [f"data.system_prompt={text}"]).data.system_prompt == text
    assert load_config(write(MINIMAL), [f"model.path={text}"]).model.path == text


@pytest.mark.parametrize("key", ["trainer.steps", "optimizer.learning_rate", "policy.sequence_parallel"])
def test_no_part_of_any_other_value_on_the_command_line_is_dropped(write, key):
    assert f"{key} = '1 # x' is not allowed" in refusal(write(MINIMAL), f"{key}=1 # x")


def _lots() -> str:
    names = "abcdefghij"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected_message"),
    [
        ("trainer: [1, 2]\n", "trainer"),
        ("trainer: {steps: [{a: 1}, {b: {c: 2}}]}\n", "trainer.steps"),
        ("trainer: {steps: {a: [{b: 1}]}}\n", "trainer.steps"),
        ("trainer: {[1, 2]: 3}\n", "a key must be a word"),
        ("x: " + "[" * 1000 + "]" * 1000 + "\n", "nested too deeply"),
        ("x: " + "[" * 20 + "]" * 20 + "\n", "nested too deeply"),
        (_lots(), "aliases"),
        ("trainer: {steps: " + "9" * 5000 + "}\n", "trainer.steps"),
        ("trainer: {steps: 1" + "0" * 35 + "}\n", "trainer.steps"),
        ("run: {seed: 18446744073709551616}\n", "run.seed"),
        ("x" * 900 + ": 1\n", "unknown key"),
        ("x" * 5000 + ": 1\n", "YAML"),
        ("#" + " " * 2**20 + "\n", "larger than"),
        ("trainer: {steps: \x01}\n", "YAML"),
    ],
)
def test_a_hostile_file_is_one_short_message_without_delay(write, text, expected_message):
    start = time.process_time()
    message = refusal(write(text))
    assert expected_message in message and len(message) < 4000 and time.process_time() - start < 10


@pytest.mark.parametrize(
    ("override", "expected_message"),
    [
        ("model.path=a\0b", "zero byte"),
        ("model.path=" + "a" * 5000, "longer than a path"),
        ("model.path=~nosuchuser/x", "nosuchuser"),
        ("data.source=" + "a/" * 3000, "longer than a path"),
        ("run.directory=" + "x" * 300, "longer than a path"),
        ("trainer.steps=" + "[" * 2000, "nested too deeply"),
        ("trainer.steps=" + "[" * 2000 + "]" * 2000, "nested too deeply"),
        ("trainer.steps=" + "9" * 4301, "trainer.steps"),
        ("run.seed=-1", "run.seed"),
        ("x" * 5000, "not an override"),
    ],
)
def test_a_hostile_override_is_one_short_message_without_delay(write, override, expected_message):
    message = refusal(write(MINIMAL), override)
    assert expected_message in message and len(message) < 2000


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "a\0b", "x" * 5000, "/proc/self/mem"])
def test_only_regular_files_are_read(path):
    with pytest.raises(ConfigError):
        load_config(path)
