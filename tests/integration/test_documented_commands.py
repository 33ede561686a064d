"""Every command that README.md and docs/getting-started.md show runs as written, or is listed here with the reason.

Names in capitals are placeholders for files of the user; here those are small. Commands that train get few steps.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from training_runs import SMALL

from tools.fuzz.forking import ForkedCommand

pytestmark = [pytest.mark.slow, pytest.mark.same_for_both]

REPOSITORY = Path(__file__).parents[2]
PAGES = ("README.md", "docs/getting-started.md")
COMMAND = re.compile(
    r"^    (?P<text>(?:\S*/)?(?:g2rl|make|torchrun|hf|alias|train|python|pytest) .*|g2rl|make)$", re.MULTILINE
)

ELSEWHERE = {
    "make quickstart": "tests/install/test_quickstart.py runs it",
    "g2rl train examples/quickstart/grpo.yaml": "make quickstart runs it",
    "g2rl train examples/quickstart/g2rl.yaml": "make quickstart runs it",
    "g2rl doctor": "tests/unit/test_doctor.py runs it with a configuration",
    "g2rl doctor examples/quickstart/g2rl.yaml": "tests/unit/test_doctor.py runs it",
    "g2rl train examples/qwen3_1.7b_math/g2rl.yaml": "needs GPUs and a model of the hub",
    "torchrun --nproc-per-node=8 -m megatron_g2rl.cli train CONFIG": "needs eight processors; test_train.py has two",
    "g2rl launch CONFIG --cluster PROFILE --nodes 4": "tests/slurm/test_launch.py runs it on a real Slurm",
    "g2rl evaluate CONFIG --checkpoint runs/NAME --benchmark math500,aime24": "needs the hub; test_evaluate.py runs it",
    "g2rl analyze CONFIG evaluations": "tests/integration/test_analyze.py runs it",
    "hf download Qwen/Qwen3-4B-Base --local-dir models/qwen3-4b-base": "needs the hub",
    "alias train='g2rl train examples/qwen3_4b_math/g2rl.yaml model.path=models/qwen3-4b-base'": "defines an alias",
    "train": "needs GPUs",
    "train run.name=trial trainer.steps=2 rollout.max_response_tokens=1024": "needs GPUs",
    "train run.name=grpo exploration.method=none": "needs GPUs",
}
"""Commands that are not run here, with the reason."""
ALIAS = ["train", "examples/qwen3_4b_math/g2rl.yaml", "model.path=models/qwen3-4b-base"]
WARM_START = ["warm-start", "examples/quickstart/model.yaml", "steps=2"]
PROFILE = "partition: gpu\ntime: 1:00:00\nranks_per_node: 1\n"
SWEEP = """
config: CONFIG
name: s{run.seed}
grid: {run.seed: [1, 2]}
"""


def documented(page: str) -> list[str]:
    """The commands of a page's code blocks, without comments."""
    texts = [match["text"] for match in COMMAND.finditer((REPOSITORY / page).read_text())]
    return [shlex.join(shlex.split(text, comments=True)) if "#" in text else text.strip() for text in texts]


COMMANDS = list(dict.fromkeys(text for page in PAGES for text in documented(page)))
RUN_HERE = [text for text in COMMANDS if text not in ELSEWHERE]


@pytest.fixture(scope="module")
def place(tmp_path_factory, environment) -> Path:
    """A folder with the examples, the page's own files and two runs, as after the quickstart."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    (folder / "CONFIG").write_text("base: examples/quickstart/arithmetic.yaml\nrun: {name: NAME}\n")
    (folder / "PROFILE").write_text(PROFILE)
    (folder / "FILE").write_text(SWEEP)
    text = (REPOSITORY / "docs/getting-started.md").read_text()
    mine = re.search(r"^    # my.yaml\n((?:    .*\n)+)", text, re.MULTILINE)[1]
    (folder / "my.yaml").write_text(re.sub(r"^    ", "", mine, flags=re.MULTILINE))
    from megatron_g2rl.data.tiny_model import make_random_model

    model = make_random_model(folder / "models/qwen3-4b-base", "qwen3")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 40_960}))
    run(folder, environment, *WARM_START)
    run(folder, environment, "train", "CONFIG", *SMALL, "trainer.steps=1")
    for name in ("quickstart_grpo", "quickstart_g2rl", "qwen3_4b_math_g2rl", "grpo"):
        shutil.copytree(folder / "runs/NAME", folder / "runs" / name)
    saved = folder / "runs/NAME/checkpoints"
    shutil.copytree(saved / "step_00000001", saved / "step_00000200")
    return folder


def run(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    process = ForkedCommand(arguments, folder, folder / "output", environment=environment)
    code = process.wait(200)
    assert code == 0, process.read()[-3000:]
    return process.read()


def test_every_exempt_command_is_documented():
    assert len(RUN_HERE) > 8
    assert not set(ELSEWHERE) - set(COMMANDS)


@pytest.mark.parametrize("text", RUN_HERE)
def test_a_documented_command_runs(text, place, environment):
    program, *arguments = shlex.split(text)
    if program == "train":
        arguments = [*ALIAS, *arguments]
    assert Path(program).name in ("g2rl", "train"), f"say in ELSEWHERE why {text!r} is not run, or run it"
    if arguments[0] == "warm-start":
        arguments = WARM_START
    if arguments[0] == "train" and "--dry-run" not in arguments:
        arguments += [*SMALL, "trainer.steps=1", f"run.directory=runs_of_{RUN_HERE.index(text)}"]
    run(place, environment, *arguments)
