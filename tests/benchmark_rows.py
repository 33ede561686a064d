"""Rows in the exact columns of the datasets of the shipped benchmarks, with invented content."""

from __future__ import annotations

from pathlib import Path

import datasets

COUNT = 5
OPTIONS = [f"{color} paint" for color in ("red", "green", "blue", "white", "black", "pink", "brown")]


def _math500(n: int) -> dict:
    problem, answer = f"What is $\\frac{{{n}}}{{7}}$?", f"\\frac{{{n}}}{{7}}"
    row = {"problem": problem, "solution": f"It is $\\boxed{{{answer}}}$.", "answer": answer}
    return row | {"subject": "Algebra", "level": 1, "unique_id": f"test/algebra/{n}.json"}


def _amc23(n: int) -> dict:
    return {"id": n, "question": f"What is ${n}+20$?", "answer": f"{n + 20}.0", "url": "https://example.org"}


def _aime24(n: int) -> dict:
    row = {"id": 60 + n, "problem": f"Find ${n}+7$.", "solution": f"$\\boxed{{{n + 7:03d}}}$", "answer": f"{n + 7:03d}"}
    return row | {"url": "https://example.org", "year": "2024"}


def _aime25(n: int) -> dict:
    return {"problem": f"Find ${n}+9$.", "answer": str(n + 9), "id": str(n)}


def _gpqa(n: int) -> dict:
    wrong = {f"Incorrect Answer {i}": f"{n} and {i}\n" for i in (1, 2, 3)}
    return {"Question": f"Which pair has {n} twice?\n", "Correct Answer": f"{n} and {n}, again", **wrong} | {
        "Explanation": "Both are the same.",
        "Subdomain": "Arithmetic",
        "Record ID": f"rec{n}",
        "High-level domain": "Mathematics",
    }


def _mmlu_pro(n: int) -> dict:
    options = OPTIONS[: 4 + n % 3] + ["N/A"] * (n % 2)
    row = {"question_id": 70 + n, "question": f"Which paint is number {n}?", "options": options}
    row |= {"answer": "ABCDEFGHIJ"[n % 4], "answer_index": n % 4, "cot_content": "", "category": "business"}
    return row | {"src": "invented"}


def _gsm8k(n: int) -> dict:
    return {"question": f"Ann has {n} and gets 1000.", "answer": f"It is <<{n}+1000={n + 1000}>>.\n#### 1,00{n}"}


ROWS = {
    "math500": _math500,
    "amc23": _amc23,
    "aime24": _aime24,
    "aime25": _aime25,
    "gpqa_diamond": _gpqa,
    "mmlu_pro": _mmlu_pro,
    "gsm8k": _gsm8k,
}
"""Benchmark -> function that makes row n."""


def write(folder: Path, name: str, subset: str | None, split: str) -> Path:
    """Write the rows of a benchmark in the layout of its Hub repository; returns the folder."""
    place = folder / (subset or "data")
    place.mkdir(parents=True)
    rows = datasets.Dataset.from_list([ROWS[name](n) for n in range(COUNT)])
    rows.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
    if subset:
        files = f"  - split: {split}\n    path: {subset}/{split}-*\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n")
    return folder
