"""GPU packages that are installed but unusable here do not fail a run that does not need them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_g2rl.device import unusable_gpu

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
WORKING = {
    "transformer_engine/__init__.py": "__version__ = '2.20.2'\n",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/optimizers.py": (
        "import torch\n"
        "class FusedAdam(torch.optim.AdamW):\n"
        "    pass\n"
        "class FusedSGD(torch.optim.SGD):\n"
        "    pass\n"
        "def _fail(*args, **kwargs):\n"
        "    raise RuntimeError('CUDA driver version is insufficient')\n"
        "multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = _fail\n"
    ),
}
BROKEN = WORKING | {"transformer_engine/pytorch/__init__.py": "raise OSError('libnccl.so.2: cannot open')\n"}
LOST = {"transformer_engine/__init__.py": "raise FileNotFoundError('Could not find shared object file')\n"}
UPDATE = """
import sys, tempfile
sys.path[:0] = [{root!r}, {tests!r}]
import os
os.environ |= dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from random_models import write_random_model
from small_policy import make_policy, train
policy = make_policy(write_random_model(tempfile.mkdtemp()), {{}})
print("losses", train(policy, 2)[0], "with", type(policy.optimizer.megatron.chained_optimizers[0].optimizer).__name__)
"""
CHECK = """
from rich.console import Console
from megatron_g2rl.commands import doctor
from megatron_g2rl.config.loading import load_config
console = Console(width=250)
names = ("transformer-engine", "megatron-core")
found = doctor.packages([p for p in doctor.PACKAGES if p.distributions[0] in names])
assert [f.state for f in found if f.name == "megatron-core"] == [doctor.GOOD], found
assert not list(doctor._broken(load_config("{config}"), found))
console.print(doctor.table("Packages", [*found, *doctor.paths(doctor.PolicyConfig())]))
"""


def install(folder: Path, files: dict[str, str]) -> Path:
    """Packages made of `files`, with the metadata of an installed Transformer Engine."""
    files = files | {"transformer_engine-2.20.2.dist-info/METADATA": "Name: transformer-engine\nVersion: 2.20.2\n"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{folder}:{TESTS.parent}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    "files, words",
    [
        (WORKING, ("2.20.2", "installed, not used without a GPU", "torch AdamW")),
        (BROKEN, ("does not import", "libnccl.so.2", "policy.layer_spec=torch works", "torch AdamW")),
        (LOST, ("does not import", "Could not find shared object file", "policy.layer_spec=torch works")),
    ],
    ids=["working", "broken", "lost"],
)
def test_an_update_on_a_cpu_avoids_transformer_engine_and_doctor_explains_why(files, words, tmp_path):
    check = CHECK.format(config=TESTS.parent / "examples/quickstart/arithmetic.yaml")
    update = UPDATE.format(root=str(TESTS.parent), tests=str(TESTS))
    done = python(check + update, install(tmp_path, files))
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("with AdamW", *words):
        assert word in done.stdout, done.stdout


HIDE = """
import logging, sys
logging.basicConfig(level="WARNING", format="%(message)s")
from megatron_g2rl.policy import transformer_engine as hiding
sys.modules.pop("transformer_engine", None)  # what importing the policy has hidden on this machine
hiding.hide_unusable(cuda=True)
try:
    import transformer_engine.pytorch
except ImportError:
    print("hidden", hiding.why_not())
from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.policy.specs import choose_layer_spec
import torch
try:
    choose_layer_spec(PolicyConfig(layer_spec="te", precision="bf16"), torch.device("cuda"))
except Exception as error:
    print(error)
print(choose_layer_spec(PolicyConfig(precision="bf16"), torch.device("cuda")))
"""


def test_on_a_gpu_a_broken_one_is_hidden_with_a_warning_and_torch_layers_are_used(tmp_path):
    done = python(HIDE, install(tmp_path, BROKEN))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hidden OSError: libnccl.so.2" in done.stdout and done.stdout.splitlines()[-1] == "torch"
    assert "policy.layer_spec=te needs CUDA" in done.stdout and "not used: OSError" in done.stdout
    assert done.stderr.count("transformer_engine is installed but broken") == 1


def test_a_gpu_that_torch_cannot_use_is_reported_with_the_reason(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the GPU of this machine can be used")
    there, absent = tmp_path / "nvidia0", tmp_path / "nothing"
    there.touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unusable_gpu((absent,)) is None
    reason = unusable_gpu((absent, there))
    assert "is a CPU-only build" in reason if torch.version.cuda is None else "cannot start CUDA" in reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unusable_gpu((there,)) is None
