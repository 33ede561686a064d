"""`g2rl doctor` reports what is installed and what a run uses, even with missing or broken packages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from quickstart_model import link_quickstart_model
from typer.testing import CliRunner

from megatron_g2rl import cli
from megatron_g2rl.commands import doctor
from megatron_g2rl.commands.doctor import BAD, GOOD, MISSING, Finding, Package
from megatron_g2rl.config.loading import load_config

pytestmark = pytest.mark.slow

CONFIG = "tests/data/run.yaml"


@pytest.fixture
def config(repository):
    return lambda *overrides: load_config(repository / CONFIG, overrides)


def test_missing_and_broken_packages_are_listed(tmp_path, monkeypatch):
    (tmp_path / "broken_here.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    (tmp_path / "crashes_here.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = [
        Package(name, (name,), "less", first="")
        for name in ("broken_here", "crashes_here", "is_nowhere", "a.b", "psutil")
    ]
    broken, crashed, missing, nested, good = doctor.packages(wanted)
    assert broken.state == BAD and "libcudart.so.12" in broken.note
    assert crashed.state == BAD and "exit code -6" in crashed.note
    assert missing.state == nested.state == MISSING and missing.note == "less"
    assert (good.state, good.note) == (GOOD, "") and good.value[0].isdigit()


def test_a_package_that_loads_the_libraries_of_torch_is_imported_after_it(tmp_path, monkeypatch):
    """Transformer Engine finds NCCL only in a process that has imported torch."""
    code = "import sys\nif 'torch' not in sys.modules:\n    raise OSError('libnccl.so.2: cannot open')\n"
    (tmp_path / "needs_torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = doctor.packages([Package("needs_torch", ("psutil",), "less")])
    assert (found.state, found.note) == (GOOD, "")


@pytest.mark.parametrize("cuda", [False, True])
def test_an_unsupported_version_of_megatron_is_reported_with_the_supported_range(cuda, monkeypatch):
    from megatron_g2rl.policy import megatron_compat

    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr(megatron_compat, "SUPPORTED", ("0.1.0", "0.2.0"))
    finding = next(f for f in doctor._attempt("megatron-core", doctor._megatron))
    assert finding.state == BAD and "is not supported: supported versions are 0.1.0 and 0.2.0" in finding.note


def test_a_run_with_an_unsupported_megatron_ends_at_the_start_with_one_message(tmp_path, repository):
    information = tmp_path / "packages" / "megatron_core-0.18.2.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.18.2\n")
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", str(repository / CONFIG)]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'packages'}:{repository}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    for words in ("megatron-core 0.18.2 is not supported", "0.16.1 and 0.19.2", "Python 3.12"):
        assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


def test_a_configuration_that_cannot_run_here_is_reported_with_every_reason(config, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_g2rl.config.checks._has_cuda", lambda: False)
    (tmp_path / "file").write_text("")
    found = doctor.check(config("policy.device=cuda", "trainer.group_size=1", f"run.directory={tmp_path}/file/runs"))
    reasons = "\n".join(finding.value for finding in found if finding.state == BAD)
    for words in ("policy.device=cuda", "trainer.group_size=1", "run.directory="):
        assert words in reasons


def test_a_broken_package_is_an_error_only_where_it_is_used(config):
    found = [Finding("vllm", "0.32", BAD, "does not import")]
    assert not [f for f in doctor.check(config(), found) if f.state == BAD]
    assert [f for f in doctor.check(config("rollout.engine=vllm"), found) if "does not import" in f.value]


def test_a_broken_transformer_engine_is_an_error_only_for_its_own_layers(config):
    found = [Finding("transformer-engine", "2.20.2", BAD, "does not import")]
    assert not [f for f in doctor.check(config(), found) if f.state == BAD]
    assert [f for f in doctor.check(config("policy.layer_spec=te"), found) if "does not import" in f.value]


def test_the_reason_is_the_line_that_names_the_error():
    output = "Traceback:\n  x\nRuntimeError: no extension\nRebuild it.\nThen try again.\n"
    assert doctor._last_error(output) == "RuntimeError: no extension"


def test_more_threads_than_cores_are_reported(config, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    notes = [f.value for f in doctor.check(config("trainer.ranks=2")) if f.state == MISSING]
    assert any("2 ranks of 4 threads on 2 cores" in note for note in notes)


def test_a_model_name_that_is_no_folder_is_reported_as_a_hub_name(config):
    notes = [f.value for f in doctor.check(config()) if f.state == MISSING]
    assert any(
        "model.path=org/model is not a local folder, so it is treated as a Hugging Face Hub name" in note
        for note in notes
    )


@pytest.mark.parametrize("can_run, code", [(True, 0), (False, 2)])
def test_the_exit_code_depends_on_whether_the_configuration_can_run(repository, monkeypatch, can_run, code):
    monkeypatch.setattr(doctor, "examine", lambda config, console: can_run)
    assert CliRunner().invoke(cli.app, ["doctor", str(repository / CONFIG)]).exit_code == code


@pytest.mark.same_for_both
def test_the_command_reports_everything_about_this_machine(tmp_path, repository):
    link_quickstart_model(tmp_path)
    config = repository / "examples/quickstart/g2rl.yaml"
    command = [sys.executable, "-m", "megatron_g2rl.cli", "doctor", str(config)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for words in ("Python", "torch", "megatron-core", "vllm", "transformer-engine", "apex", "layers", "can run here"):
        assert words in done.stdout
