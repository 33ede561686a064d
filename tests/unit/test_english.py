"""All text has the terms of the field: no banned word in help, messages, documentation, comments and names of tests."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import pytest
import typer

from megatron_g2rl import cli

REPOSITORY = Path(__file__).resolve().parents[2]

ROOMS = ("megatron_g2rl", "launch", "tools", "examples", "tests")
"""Folders of code whose messages, docstrings and comments are checked."""
NAMED_ROOM = "tests"
"""Folder in which the names of functions and classes are checked too."""
DOCUMENTS = ("*.md", "docs/**/*.md", "launch/**/*.md", "launch/**/*.yaml", "examples/**/*.yaml", "tests/**/*.md")
"""Pages that are checked, as glob patterns."""

GLOSSARY = {
    r"(go|goes|going|went) on": "resume",
    r"told|tells": "reported, logged",
    r"said": "reported, logged",
    r"mend(s|ed|ing)?": "fix",
    r"judg(e|es|ed|ing)": "score, verify",
    r"samplers?": "rollout engine",
    r"score pass(es)?": "old-log-prob pass",
    r"exploration scores?": "novelty",
    r"cuts?( off)?(?!-)": "truncated; of an update: split",
    r"(a|the|its|their|largest|smallest|equal|\w+'s) shares?|shares? of": "fraction",
    r"damag(e|es|ed|ing)": "corruption, corrupt",
    r"(?<!as\sa\s)whole(?! numbers?)": "complete",
    r"present (weights|one|configuration|policy|version)": "current",
    r"taught": "fine-tuned",
    r"held[ -]out": "evaluation set",
    r"side files?": "config and tokenizer files",
    r"stands?(?!-)(?! for)": "is",
    r"lies?": "is",
    r"under way": "running",
    r"anew": "again",
    r"at once": "immediately",
    r"besides": "also, in addition to",
    r"for ever": "forever",
    r"all the same": "anyway",
    r"at the keyboard": "user",
    r"what \S+ took": "time of",
    r"addends?": "partial sum",
    r"newest": "latest",
}
"""Pattern of a word that is not used, and what is used instead."""
BANNED = [(re.compile(rf"\b(?:{old})\b".replace(" ", r"\s+"), re.IGNORECASE), new) for old, new in GLOSSARY.items()]

ALLOWED = {
    ("docs/dev/gpu.md", "attention and sampler it uses"): "vLLM's own name of its module",
    ("docs/rewards.md", "own_rewards:Judge"): "the name of a class in examples/rewards",
    ("megatron_g2rl/rewards/answers/sets.py", "between cuts. A cut is"): "a cut of the number line",
}
"""(file, text around a match): why it stays."""


def banned_words(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Every banned word in a text, and what to use instead."""
    for pattern, new in BANNED:
        yield from ((match, new) for match in pattern.finditer(text))


def violations(name: str, text: str, first_line: int = 1, by_line: bool = True) -> list[str]:
    """`file:line: word (use ...): text` of every banned word.

    Args:
        name: file or command, for the message.
        text: what to search.
        first_line: number of its first line in the file.
        by_line: whether line ends in `text` are line ends of the file; else every match is at `first_line`.
    """
    found = []
    for match, new in banned_words(text):
        around = " ".join(text[max(0, match.start() - 60) : match.end() + 60].split())
        if not any(file == name and words in around for file, words in ALLOWED):
            line = first_line + (text.count("\n", 0, match.start()) if by_line else 0)
            found.append(f"{name}:{line}: {' '.join(match[0].split())!r} (use {new}): {around}")
    return found


def text_of(node: ast.AST) -> str | None:
    """The text of a string or f-string, with `{}` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of the string literals of at least three words that are no docstrings: messages, labels, help."""
    for node in ast.iter_child_nodes(tree):
        text = text_of(node)
        if isinstance(node, ast.Expr) and text_of(node.value) is not None:
            continue
        if text is None:
            yield from messages(node)
            continue
        if len(text.split()) >= 3:
            yield node.lineno, text
        for part in getattr(node, "values", ()):
            if isinstance(part, ast.FormattedValue):
                yield from messages(part)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of all docstrings, those of fields included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and (text := text_of(node.value)) is not None:
            yield node.lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of all comments."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name as words) of all functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name.replace("_", " ")


def python_files() -> list[Path]:
    """All checked files of code: this one lists the banned words itself."""
    files = (file for room in ROOMS for file in (REPOSITORY / room).rglob("*.py"))
    return sorted(file for file in files if file != Path(__file__).resolve())


def page_files(patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in REPOSITORY.glob(pattern)})


def of_code(texts: Callable[[str], Iterable[tuple[int, str]]], room: str = "") -> list[str]:
    """Violations in what `texts` yields of the source of every checked file, or of those of one folder."""
    files = [file for file in python_files() if file.is_relative_to(REPOSITORY / room)]
    return [
        violation
        for file in files
        for line, text in texts(file.read_text())
        for violation in violations(str(file.relative_to(REPOSITORY)), text, line, by_line=False)
    ]


def of_pages(patterns: tuple[str, ...]) -> list[str]:
    files = page_files(patterns)
    return [v for file in files for v in violations(str(file.relative_to(REPOSITORY)), file.read_text())]


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of `g2rl` with its name."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        for sub, child in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {sub}", child)

    yield from walk("g2rl", typer.main.get_command(cli.app))


def help_of(command: click.Command) -> str:
    """All texts that `--help` shows of a command."""
    texts = [command.help, command.epilog, *(getattr(parameter, "help", None) for parameter in command.params)]
    return "\n".join(text for text in texts if text)


def of_help() -> list[str]:
    return [v for name, command in commands() for v in violations(f"{name} --help", help_of(command))]


def test_the_help_uses_the_terms_of_the_field():
    texts = {name: help_of(command) for name, command in commands()}
    assert {"g2rl", "g2rl train", "g2rl report", "g2rl convert hf-to-megatron", "g2rl launch"} <= set(texts)
    assert "Train a model" in texts["g2rl train"] and "then exit" in texts["g2rl train"]
    found = of_help()
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("texts", "room"),
    [
        (lambda source: messages(ast.parse(source)), ""),
        (lambda source: docstrings(ast.parse(source)), ""),
        (comments, ""),
        (lambda source: names(ast.parse(source)), NAMED_ROOM),
    ],
    ids=["messages", "docstrings", "comments", "names_of_tests"],
)
def test_code_uses_the_terms_of_the_field(texts, room):
    found = of_code(texts, room)
    assert not found, "\n".join(["", *found])


def test_the_documentation_of_configuration_keys_uses_the_terms_of_the_field():
    files = sorted((REPOSITORY / "megatron_g2rl/config/sections").glob("*.py"))
    texts = [(file, *text) for file in files for text in docstrings(ast.parse(file.read_text()))]
    assert len(texts) > 100
    found = [v for file, line, text in texts for v in violations(str(file.relative_to(REPOSITORY)), text, line)]
    assert not found, "\n".join(["", *found])


def test_pages_and_the_report_use_the_terms_of_the_field():
    found = of_pages((*DOCUMENTS, "megatron_g2rl/report/*.jinja"))
    assert not found, "\n".join(["", *found])


def test_every_checked_room_and_page_and_every_exception_exists():
    folders = {file.relative_to(REPOSITORY).parts[0] for file in python_files()}
    assert folders == set(ROOMS) and all(map(page_files, [(d,) for d in DOCUMENTS]))
    for file, words in ALLOWED:
        assert words in " ".join((REPOSITORY / file).read_text().split()), f"{file} lacks {words!r}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the run goes\non from step 3", ["goes on"]),
        ("the newest checkpoint is damaged", ["damaged", "newest"]),
        ("a rank's share, and the share of tokens", ["rank's share", "the share"]),
        ("ranks that share a folder; a_damage, sampler_topk, x_share, damaged_step_3", []),
        ("the batch as a whole, `*` stands for text, a stand-in", []),
        ("the whole batch stands below", ["whole", "stands"]),
    ],
)
def test_words_are_found_across_lines_and_not_inside_others(text, words):
    assert sorted(" ".join(match[0].split()) for match, _ in banned_words(text)) == sorted(words)


def test_a_violation_names_file_and_line_and_what_to_use():
    found = violations("page.md", "one\ntwo\nthe run goes\non from step 3\n")
    assert found == ["page.md:3: 'goes on' (use resume): one two the run goes on from step 3"]


def test_literals_are_found_in_code_and_docstrings_are_not_messages():
    code = (
        'def f(x):\n    """The whole of it here."""\n    raise E(\n        f"{x} goes "\n        f"on from {x}"\n    )'
    )
    assert list(messages(ast.parse(code))) == [(4, "{} goes on from {}")]
    assert list(messages(ast.parse("""g(f"{'it goes on' if x else ''}", "two words")"""))) == [(1, "it goes on")]


def test_comments_and_names_are_found():
    code = "class Sampler:\n    def goes_on(self):  # the whole of it\n        return '# no comment'\n"
    assert list(comments(code)) == [(2, "# the whole of it")]
    assert sorted(names(ast.parse(code))) == [(1, "Sampler"), (2, "goes on")]
