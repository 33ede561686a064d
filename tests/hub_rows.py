"""Rows in the exact format of public datasets, with invented content, stored as those are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets

from megatron_g2rl.config.sections.data import DataConfig

COUNT = 4
"""Number of rows of each."""


def _table(folder: Path, rows: list[dict], name: str = "data/train-00000-of-00001.parquet") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(folder / name))
    return folder


def _user(text: str) -> list[dict[str, str]]:
    return [{"content": text, "role": "user"}]


def dapo(folder: Path) -> dict:
    """BytedTsinghua-SIA/DAPO-Math-17k."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": _user(f"Solve: what is {n}+1? Answer: $Answer"),
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"00-{n}"},
        }
        for n in range(COUNT)
    ]
    return dict(source=_table(folder, rows), prompt_column="prompt", answer_column="reward_model.ground_truth")


def verl_gsm8k(folder: Path) -> dict:
    """The output of verl's GSM8K preprocessing."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": _user(f"Ann has {n} and gets 1. Output after ####."),
            "ability": "math",
            "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
            "extra_info": {"answer": f"#### {n + 1}", "index": n, "question": "Ann?", "split": "train"},
        }
        for n in range(COUNT)
    ]
    file = _table(folder, rows, "train.parquet") / "train.parquet"
    return dict(source=file, prompt_column="prompt", answer_column="reward_model.ground_truth")


def trl(folder: Path) -> dict:
    """Conversational prompts with an additional column, as TRL's GRPO takes them."""
    system = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [system, *_user(f"{n}+1=?")], "solution": f"{n + 1}"} for n in range(COUNT)]
    return dict(source=_table(folder, rows), prompt_column="prompt", answer_column="solution")


def gsm8k(folder: Path) -> dict:
    """openai/gsm8k: two configurations, solutions that end with ####."""
    for name in ("main", "socratic"):
        for split in ("train", "test"):
            rows = [
                {"question": f"{name} {split} {n}+1000?", "answer": f"It is <<{n}+1000={n + 1000}>>\n#### 1,00{n}"}
                for n in range(COUNT)
            ]
            _table(folder, rows, f"{name}/{split}-00000-of-00001.parquet")
    files = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "test"))
        for name in ("main", "socratic")
    )
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{files}---\n# GSM8K\n")
    return dict(source=folder, subset="main", prompt_column="question", answer_regex="gsm8k")


def math(folder: Path) -> dict:
    """MATH: solutions with a box."""
    rows = [
        {"problem": f"Find ${n}+1$.", "level": "Level 1", "type": "Algebra", "solution": f"It is $\\boxed{{{n + 1}}}$."}
        for n in range(COUNT)
    ]
    return dict(source=_table(folder, rows), answer_column="solution", answer_regex="boxed")


def numina(folder: Path) -> dict:
    """AI-MO/NuminaMath-CoT: a solution, and the same as messages."""
    rows = [
        {
            "source": "cn_k12",
            "problem": f"Find ${n}/2$.",
            "solution": f"So $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
            "messages": [*_user(f"Find ${n}/2$."), {"content": f"So $\\boxed{{{n}/2}}$.", "role": "assistant"}],
        }
        for n in range(COUNT)
    ]
    return dict(source=_table(folder, rows), answer_column="solution", answer_regex="boxed")


SHAPES: dict[str, tuple[Callable[[Path], dict], str, str]] = {
    "dapo": (dapo, "Solve: what is 2+1? Answer: $Answer", "3"),
    "verl_gsm8k": (verl_gsm8k, "Ann has 2 and gets 1. Output after ####.", "3"),
    "trl": (trl, "2+1=?", "3"),
    "gsm8k": (gsm8k, "main train 2+1000?", "1002"),
    "math": (math, "Find $2+1$.", "3"),
    "numina": (numina, "Find $2/2$.", r"\frac{2}{2}"),
}
"""Name -> function that writes it and returns the keys of `data`; problem and answer of its third row."""


def write(shape: str, folder: Path) -> dict:
    """Write the rows of a format; returns the keys of `data` that load them."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = SHAPES[shape][0](folder)
    return keys | {"source": str(keys["source"])}


def config(shape: str, folder: Path, **changes) -> DataConfig:
    """The configuration that loads a format."""
    return DataConfig(**write(shape, folder), **changes)
