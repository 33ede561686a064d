"""Incompatible values are refused before anything starts, with a message that names keys and remedy."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_g2rl import cli
from megatron_g2rl.commands import doctor
from megatron_g2rl.config import checks
from megatron_g2rl.config.checks import _divisors, check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.model_shape import ModelShape, read_model_shape
from megatron_g2rl.config.world import launched_world_size

DENSE = ModelShape(layers=28, heads=16, key_value_groups=8, experts=0, max_positions=32768, vocab_size=151936)
MOE = ModelShape(layers=48, heads=32, key_value_groups=4, experts=128, max_positions=32768, vocab_size=151936)


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: org/model}\ndata: {source: org/data}\n")
    return lambda *overrides: load_config(file, overrides)


def refusal(config, model=None, ranks=None) -> str:
    with pytest.raises(ConfigError) as error:
        check_config(config, model, ranks)
    return str(error.value)


def test_the_defaults_are_compatible(config):
    check_config(config(), DENSE, 1)


@pytest.mark.parametrize(
    ("overrides", "ranks", "named"),
    [
        (["policy.tensor_parallel=2"], 3, ["policy.tensor_parallel", "3 ranks", "trainer.ranks"]),
        (["policy.pipeline_parallel=2", "policy.context_parallel=2"], 6, ["pipeline_parallel", "context_parallel"]),
        (["policy.sequence_parallel=true"], 1, ["policy.sequence_parallel", "policy.tensor_parallel > 1"]),
        (["policy.virtual_stages=2"], 1, ["policy.virtual_stages", "policy.pipeline_parallel > 1"]),
        (["policy.expert_parallel=4"], 2, ["policy.expert_parallel", "2 ranks"]),
        (["policy.layer_spec=te", "policy.device=cpu"], 1, ["policy.layer_spec=te", "policy.device=cpu"]),
        (["trainer.responses_per_update=48"], 1, ["trainer.responses_per_update", "256", "32 or 64"]),
        (["trainer.responses_per_update=512"], 1, ["trainer.responses_per_update to 256,"]),
        (["trainer.tokens_per_microbatch=9215"], 1, ["trainer.tokens_per_microbatch", "9216 or more"]),
        (
            ["trainer.tokens_per_microbatch=9217", "data.max_prompt_tokens=1025", "policy.context_parallel=2"],
            2,
            ["padding for context parallelism", "9220 or more"],
        ),
        (["trainer.group_size=1"], 1, ["trainer.group_size", "2 or more"]),
        (["trainer.group_size=1", "exploration.method=none"], 1, ["trainer.group_size", "2 or more"]),
        (
            ["algorithm.dynamic_sampling_rounds=2", "algorithm.drop_uniform_groups=false"],
            1,
            ["algorithm.dynamic_sampling_rounds", "algorithm.drop_uniform_groups"],
        ),
        (
            ["algorithm.use_kl_in_reward=true", "algorithm.kl_coefficient=0"],
            1,
            ["algorithm.use_kl_in_reward", "algorithm.kl_coefficient"],
        ),
        (
            ["algorithm.importance_level=sequence", "algorithm.importance_cap=null"],
            1,
            ["algorithm.importance_level", "algorithm.importance_cap"],
        ),
        (["algorithm.baseline=critic"], 1, ["algorithm.drop_uniform_groups=true", "set it to false"]),
        (["algorithm.critic_warmup_steps=3"], 1, ["algorithm.critic_warmup_steps=3", "algorithm.baseline"]),
        (
            ["trainer.group_size=1", "algorithm.baseline=critic", "algorithm.drop_uniform_groups=false"],
            1,
            ["trainer.group_size=1", "exploration.method=gradient"],
        ),
        (["algorithm.overlong_buffer_tokens=9000"], 1, ["algorithm.overlong_buffer_tokens=9000", "lower it"]),
        (
            ["optimizer.min_learning_rate=1", "optimizer.schedule=cosine"],
            1,
            ["optimizer.min_learning_rate", "optimizer.learning_rate"],
        ),
        (["optimizer.min_learning_rate=1e-8"], 1, ["optimizer.min_learning_rate", "cosine or linear"]),
        (
            ["exploration.source=sampler_topk", "exploration.method=none", "exploration.measure_geometry=false"],
            1,
            ["exploration.source=sampler_topk", "measure_geometry", "set it to auto"],
        ),
        (["rollout.tensor_parallel=2"], 3, ["rollout.tensor_parallel", "3 ranks"]),
        (["rollout.tensor_parallel=2", "rollout.engine=transformers"], 2, ["rollout.tensor_parallel", "engine=vllm"]),
        (["model.path=builtin:tiny"], 1, ["model.path", "g2rl warm-start examples/quickstart/model.yaml"]),
        (["model.path=./nowhere"], 1, ["model.path", "no such folder"]),
        (["model.path="], 1, ["model.path", "no such folder"]),
        (["data.source=/nowhere/at/all"], 1, ["data.source", "no such file"]),
        (["data.source=train.jsonl"], 1, ["data.source", "no such file"]),
        (["data.template=plain", "data.plain_template=x"], 1, ["data.plain_template", "{problem}"]),
        (["reward.function=no_such_module:f"], 1, ["reward.function", "no_such_module"]),
        (["reward.function=no.such.module:f"], 1, ["reward.function", "no.such.module"]),
    ],
)
def test_incompatible_values_are_refused(config, overrides, ranks, named):
    message = refusal(config(*overrides), ranks=ranks)
    assert message.count("\n") == 1, message
    for part in named:
        assert part in message


def test_a_critic_needs_no_groups(config):
    settings = ["algorithm.baseline=critic", "algorithm.drop_uniform_groups=false", "exploration.method=none"]
    with_critic = config(*settings, "trainer.group_size=1", "algorithm.critic_warmup_steps=2", "trainer.steps=5")
    check_config(with_critic)
    assert with_critic.policy_updates == 3 and not checks.cautions(with_critic)
    (caution,) = checks.cautions(config(*settings, "algorithm.critic_warmup_steps=100"))
    assert "algorithm.critic_warmup_steps=100" in caution and "never updated" in caution


def test_bounds_of_the_rejection_enclose_the_ratio_of_agreement(config):
    assert config("algorithm.rejection_bounds=[0.5, 2]").algorithm.rejection_bounds == (0.5, 2.0)
    for written in ("[2, 3]", "[0.1, 0.9]", "[0.5]", "[-1, 2]"):
        with pytest.raises(ConfigError, match=r"algorithm\.rejection_bounds"):
            config(f"algorithm.rejection_bounds={written}")


@pytest.mark.parametrize(
    ("overrides", "ranks", "model", "named"),
    [
        (["policy.pipeline_parallel=3"], 3, DENSE, ["28 layers", "policy.pipeline_parallel"]),
        (["policy.pipeline_parallel=4", "policy.virtual_stages=2"], 4, DENSE, ["28 layers", "virtual_stages"]),
        (["policy.tensor_parallel=3"], 3, DENSE, ["16 attention heads", "policy.tensor_parallel"]),
        (["policy.tensor_parallel=8"], 8, MOE, ["4 key-value heads", "policy.tensor_parallel"]),
        (["rollout.tensor_parallel=3"], 3, DENSE, ["16 attention heads", "rollout.tensor_parallel"]),
        (
            ["exploration.source=sampler_topk", "exploration.top_k=200000"],
            1,
            DENSE,
            ["exploration.top_k=200000", f"vocabulary of {DENSE.vocab_size}"],
        ),
        (["policy.expert_parallel=2"], 2, DENSE, ["no experts", "policy.expert_parallel"]),
        (["policy.expert_parallel=3"], 3, MOE, ["128 experts", "policy.expert_parallel"]),
        (
            ["rollout.max_response_tokens=32000", "trainer.tokens_per_microbatch=40000"],
            1,
            DENSE,
            ["max_position_embeddings=32768", "rollout.max_response_tokens"],
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(config, overrides, ranks, model, named):
    message = refusal(config(*overrides), model, ranks)
    for part in named:
        assert part in message


@pytest.mark.parametrize("path", ["./models/qwen", "/models/qwen3", "~/no/model", "a/b/c", "org/no--name", "org/a b"])
def test_a_model_path_that_is_no_folder_and_no_hub_name_is_a_missing_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("data: {source: org/data}\n")
    Path("run.yaml").write_text(f"base: base.yaml\nmodel:\n  path: {path}\n")
    problem = f"run.yaml:3: model.path={path}: there is no such folder (relative paths start at {tmp_path})"
    config = load_config("run.yaml")
    assert problem in refusal(config)
    found = doctor.check(config)
    assert any(finding.state == doctor.BAD and problem in finding.value for finding in found)
    assert not any("hub" in finding.value for finding in found if finding.state == doctor.MISSING)
    for command in (["train", "run.yaml"], ["train", "run.yaml", "--dry-run"]):
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 2 and problem in result.output and result.stdout == ""


def test_a_missing_model_that_a_warm_start_beside_the_configuration_creates_is_reported_with_the_command(tmp_path):
    (tmp_path / "other.yaml").write_text("output: models/other\n")
    (tmp_path / "model.yaml").write_text("output: ./models/small\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "run.yaml").write_text("model: {path: models/deep/small}\ndata: {source: org/data}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.yaml").write_text("base: ../run.yaml\n")
    missing = load_config(tmp_path / "mine/run.yaml")
    assert "warm-start" not in refusal(missing)
    (tmp_path / "model.yaml").write_text("output: ./models/deep/small\n")
    command = re.escape(f"no such folder (relative paths start at {Path.cwd()}). To create it: g2rl warm-start ")
    assert re.search(rf"{command}\S*/model\.yaml$", refusal(missing), re.MULTILINE)


def test_a_model_path_that_is_a_file_is_reported(config, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file: name the folder" in refusal(config(f"model.path={tmp_path}/model.safetensors"))


def test_the_reported_location_is_that_of_the_first_key_in_a_problem(config, tmp_path):
    both = refusal(config("trainer.group_size=1", "evaluation={split: train}"))
    assert "\n  - command line: trainer.group_size=1" in both
    assert f"\n  - {tmp_path}/run.yaml:2: evaluation would use the training problems (data.source" in both


def test_all_violations_come_in_one_message(config):
    message = refusal(config("trainer.group_size=1", "policy.sequence_parallel=true", "model.path=./no"), DENSE, 1)
    assert message.count("\n") == 3


def test_a_strength_that_can_rank_incorrect_above_correct_is_allowed(config):
    check_config(config("exploration.mapping=literal", "exploration.strength=2"), DENSE, 1)


def test_the_world_size_is_that_of_the_launcher(config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_config(config("policy.tensor_parallel=4", "trainer.ranks=1"))
    assert "does not divide the 4 ranks" in refusal(config("policy.tensor_parallel=3", "trainer.ranks=3"))


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # the shell of a batch job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, None),
    ],
)
def test_a_launcher_is_recognized_by_its_environment(environment, size):
    assert launched_world_size(environment) == size


def test_local_files_and_folders_of_prompts_are_checked(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    check_config(config(f"data.source={tmp_path / 'rows.jsonl'}"), ranks=1)
    check_config(config(f"data.source={tmp_path}"), ranks=1)
    assert "ends in one of" in refusal(config(f"data.source={tmp_path / 'run.yaml'}"), ranks=1)
    (tmp_path / "empty").mkdir()
    assert "the folder has no file that ends in" in refusal(config(f"data.source={tmp_path / 'empty'}"), ranks=1)


def test_missing_packages_and_devices_are_reported_with_what_to_install(config, monkeypatch):
    monkeypatch.setattr(checks, "_has_cuda", lambda: False)
    asked = config("rollout.engine=vllm", "policy.device=cuda", "policy.layer_spec=te", "logging.wandb_project=g2rl")
    problems = "\n".join(checks._machine(asked, lambda name: None))
    packages = ("constraints.txt", "rollout.engine=transformers", "Transformer Engine", "pip install wandb")
    for part in (*packages, "policy.device=cuda", "no CUDA"):
        assert part in problems


def test_a_machine_that_has_everything_is_accepted(config, monkeypatch):
    monkeypatch.setattr(checks, "_has_cuda", lambda: True)
    assert not list(checks._machine(config("policy.device=cuda", "policy.layer_spec=te"), lambda name: object()))


def test_an_untested_vllm_version_is_refused_before_it_is_imported(config, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.33.0")
    problems = "\n".join(checks._machine(config("rollout.engine=vllm"), lambda name: object()))
    assert "vllm 0.33.0 is not supported; supported: 0.32.0" in problems
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.0+cpu")
    assert not list(checks._machine(config("rollout.engine=vllm"), lambda name: object()))


def test_a_package_hidden_from_megatron_counts_as_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert checks._find_spec("psutil") is not None and checks._find_spec("is_nowhere") is None


def test_checks_without_cuda_do_not_import_torch():
    code = (
        "import sys\n"
        "from megatron_g2rl.config.checks import check_machine\n"
        "from megatron_g2rl.config.tree import Config\n"
        "check_machine(Config(model={'path': 'a'}, data={'source': 'b'}, rollout={'engine': 'transformers'}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_architecture_of_a_model_is_read_from_its_folder(tmp_path):
    from transformers import Qwen3Config, Qwen3MoeConfig

    Qwen3Config(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, vocab_size=1000).save_pretrained(
        tmp_path / "dense"
    )
    Qwen3MoeConfig(num_experts=12).save_pretrained(tmp_path / "moe")
    dense = read_model_shape(tmp_path / "dense")
    assert (dense.layers, dense.heads, dense.key_value_groups, dense.vocab_size) == (6, 8, 2, 1000)
    assert dense.experts == 0 and dense.max_positions == Qwen3Config().max_position_embeddings
    assert read_model_shape(tmp_path / "moe").experts == 12
    assert read_model_shape("org/model") is None


@pytest.mark.parametrize("content", [None, "{", json.dumps({"num_attention_heads": 2})])
def test_a_folder_without_a_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.path"):
        read_model_shape(tmp_path)


def test_large_numbers_are_refused_immediately(config):
    start = time.process_time()
    message = refusal(config("trainer.prompts_per_step=1000000007", "trainer.group_size=4294967291"), ranks=1)
    assert "responses cannot be split" in message and time.process_time() - start < 5


@pytest.mark.parametrize("factors", [(1,), (12, 10), (7, 7), (97, 89), (2**31 - 1, 6)])
def test_divisors_are_complete(factors):
    product = math.prod(factors)
    found = _divisors(*factors)
    assert found == sorted(set(found)) and all(product % n == 0 for n in found)
    assert [n for n in range(1, 200) if product % n == 0] == [n for n in found if n < 200]
