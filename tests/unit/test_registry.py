"""Choosing code by name: one line per name, import paths from the configuration alone, errors that help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from megatron_g2rl import registry
from megatron_g2rl.algorithm import group_advantages
from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.code_files import named_code
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.tree import Config
from megatron_g2rl.exploration import shape_rewards
from megatron_g2rl.policy.models.architecture import UnsupportedModel, read_architecture
from megatron_g2rl.policy.models.families import Family
from megatron_g2rl.registry import BASELINES, ENGINES, FAMILIES, MAPPINGS, ExtensionError, Registry
from megatron_g2rl.training.contents import contents
from megatron_g2rl.training.extensions import check_extensions

CONFIG = Path(__file__).parents[1] / "data/run.yaml"
KEYS = {
    "exploration.mapping": MAPPINGS,
    "algorithm.baseline": BASELINES,
    "rollout.engine": ENGINES,
    "model.family": FAMILIES,
}
REWARDS, SCORES = torch.tensor([1.0, -1.0, 0.5], dtype=torch.double), torch.tensor([0.0, 0.5, 1.0], dtype=torch.double)
ONE_GROUP = torch.zeros(3, dtype=torch.long)


def load(*overrides: str) -> Config:
    return load_config(CONFIG, overrides)


@pytest.fixture
def own_code(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Writes a module that can be imported until the test ends."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        sys.path_importer_cache.clear()

    return write


def test_every_registered_name_is_code_of_its_kind():
    assert all(callable(code) for names in (MAPPINGS, BASELINES, ENGINES) for code in names.values())
    assert all(isinstance(family, Family) for family in FAMILIES.values())


@pytest.mark.parametrize("key", KEYS)
def test_the_documented_values_of_a_key_are_the_registered_names(key):
    for name in KEYS[key]:
        assert name in config_keys()[key].allowed
        assert name in str(load(f"{key}={name}").model_dump())


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("exploration.mapping=centred", "centered"),
        ("algorithm.baseline=leave-one-out", "leave_one_out"),
        ("rollout.engine=vLLM", "vllm"),
        ("model.family=qwen3moe", "qwen3_moe"),
        ("exploration.mapping=my_module.logistic", "logistic"),
        ("exploration.mapping=../mine:g", None),
        ("exploration.mapping=os;x:g", None),
        ("exploration.mapping=:g", None),
        ("exploration.mapping=", None),
    ],
)
def test_an_unknown_name_is_refused_with_all_names_and_the_nearest(written, nearest):
    key = written.partition("=")[0]
    with pytest.raises(ConfigError) as refused:
        load(written)
    message = str(refused.value)
    assert key in message and ", ".join(KEYS[key]) in message and "package.module:name" in message
    assert f"did you mean {nearest or ''}" in message


def test_a_mapping_is_one_file_and_one_registry_line(own_code, monkeypatch):
    own_code("one_new_file", "def doubled(scores, rewards):\n    return 2 * scores - 1\n")
    monkeypatch.setitem(MAPPINGS.paths, "doubled", "one_new_file:doubled")
    config = load("exploration.mapping=doubled")
    assert Config.model_validate(config.model_dump()) == config and not [*named_code(config)][1:]
    shaped = shape_rewards(REWARDS, SCORES, config.exploration.mapping, strength=0.5)
    assert shaped.tolist() == [1 * (1 - 0.5), -1 * (1 + 0), 0.5 * (1 + 0.5)]


def test_a_baseline_is_one_file_and_one_registry_line(own_code, monkeypatch):
    own_code("one_new_file", "def median(rewards):\n    return rewards.median()\n")
    monkeypatch.setitem(BASELINES.paths, "median", "one_new_file:median")
    advantages = group_advantages(
        REWARDS, ONE_GROUP, normalize_std=False, baseline=load("algorithm.baseline=median").algorithm.baseline
    )
    assert advantages.tolist() == [0.5, -1.5, 0.0]


def test_groups_have_each_their_own_baseline_whatever_their_order(own_code):
    own_code("own_baseline", "def largest(rewards):\n    return rewards.max()\n")
    rewards, group = torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0]), torch.tensor([7, 2, 7, 7, 2])
    advantages = group_advantages(rewards, group, normalize_std=False, baseline="own_baseline:largest")
    assert advantages.tolist() == [-2.0, 0.0, 0.0, -1.0, -1.0]


WRONG = {
    "def f(*_): return 0.5": "number per response",
    "import torch\ndef f(*_): return torch.zeros(2)": "number per response",
    "import torch\ndef f(*_): return torch.full((3,), float('nan'))": "number per response",
    "def f(*_): return 1 / 0": "raises ZeroDivisionError: division by zero (",
    "def g(*_): return 1": "cannot be imported: AttributeError",
    "import no_such_package_at_all": "cannot be imported: ModuleNotFoundError",
    "def f(:": "cannot be imported: SyntaxError",
}


@pytest.mark.parametrize("key", ["exploration.mapping", "algorithm.baseline"])
@pytest.mark.parametrize("text", WRONG)
def test_wrong_code_is_refused_before_a_model_is_built_with_key_and_reason(key, text, own_code):
    own_code("own_function", text)
    config = load(f"{key}=own_function:f")
    with pytest.raises(ConfigError) as refused:
        check_extensions(config)
    assert str(refused.value).startswith(f"{key}=own_function:f") and WRONG[text] in str(refused.value)


@pytest.mark.parametrize("key", ["rollout.engine", "model.family"])
def test_an_engine_and_a_family_have_the_right_type(key, own_code):
    own_code("own_object", "thing = 3\n")
    with pytest.raises(ConfigError, match=f"{key}=own_object:thing: is not a"):
        check_extensions(load(f"{key}=own_object:thing"))


@pytest.mark.parametrize("key", KEYS)
def test_a_module_that_does_not_exist_is_refused_with_the_other_mistakes(key):
    with pytest.raises(ConfigError, match=f"{key}=no_such_file:f: there is no module no_such_file"):
        check_config(load(f"{key}=no_such_file:f"))


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_function_is_noticed_when_a_run_resumes(key, own_code, tmp_path):
    config, seen = load(f"{key}=own_extension:f"), set()
    assert (key, "own_extension:f") in named_code(config)
    for number in range(2):
        own_code("own_extension", f"def f(*_):\n    return {number}\n")
        digest = contents(config, tmp_path, [], {})[key]
        assert digest.startswith("own_extension.py, ")
        seen.add(digest)
    assert len(seen) == 2
    assert key not in contents(load(), tmp_path, [], {})


def test_a_checkpoint_cannot_name_code_to_import(tmp_path, own_code):
    own_code("planted", "raise SystemExit('this code must not run')\n")
    with pytest.raises(UnsupportedModel, match="is not one of|does not describe a model"):
        (tmp_path / "config.json").write_text(
            '{"model_type": "planted:FAMILY", "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8,'
            ' "max_position_embeddings": 8}'
        )
        read_architecture(tmp_path)
    assert FAMILIES.get("planted:FAMILY") is None and "planted" not in sys.modules


def test_checking_a_configuration_imports_no_code_that_it_names(own_code):
    own_code("imported_later", "raise SystemExit('this code must not run')\n")
    check_config(load(*(f"{key}=imported_later:f" for key in KEYS)))
    assert "imported_later" not in sys.modules


def test_names_are_known_without_torch():
    code = "import megatron_g2rl.registry as r, sys; print(len(r.MAPPINGS)); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and int(done.stdout) == len(MAPPINGS)


def test_a_registry_knows_unregistered_and_wrong_names_apart():
    made_up = Registry("thing", {"pi": "math:pi", "tau": "math:tau"})
    assert made_up.load("pi") == made_up["pi"] == 3.141592653589793 and made_up.load("math:e") > 2.7
    assert "math:e" not in made_up and list(made_up) == ["pi", "tau"] and made_up != Registry("thing", made_up.paths)
    with pytest.raises(ExtensionError, match="unknown thing 'taw'; valid: one of pi, tau; .*did you mean tau"):
        made_up.load("taw")
    with pytest.raises(KeyError):
        made_up["math:e"]


def test_a_tree_built_in_code_is_checked_like_a_file():
    with pytest.raises(ValidationError, match="did you mean linear"):
        Config(model={"path": "m"}, data={"source": "s"}, exploration={"mapping": "linea"})
    assert registry.is_import_path("a.b:c") and not registry.is_import_path("a.b.c")
