"""Imports go one way: cli -> training -> {rollout, rewards, policy, exploration, algorithm, data} -> records, config.

Read from the source by `ast`, imports inside functions included; what is not imported before a configuration has been
checked is tested in a fresh process.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from import_graph import PACKAGE, REPOSITORY, SOURCES, imports, module_name
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LAUNCHER = "g2rl_launch"
LAUNCH_SOURCES = sorted((REPOSITORY / "launch" / LAUNCHER).rglob("*.py"))
USE_NEMO_RUN = ("api", "nemo", "__init__", "__main__")
"""Modules of the launcher that cannot be imported here."""
STANDARD = sys.stdlib_module_names
PARTS = ["rollout", "rewards", "policy", "exploration", "algorithm", "data", "evaluation", "tracking"]
LOOP = ("training", "cli", "distributed.ranks", "distributed.torchrun")
"""The training loop, and what starts its processes."""


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def files_under(*parts: str) -> list[Path]:
    files = [file for file in SOURCES if is_under(module_name(file), tuple(f"{PACKAGE}.{part}" for part in parts))]
    assert files, f"there is no {parts} any more: change this test with the house plan"
    return files


def arrows(parts: tuple[str, ...], forbidden: tuple[str, ...]) -> list[str]:
    names = tuple(f"{PACKAGE}.{part}" for part in forbidden)
    return [
        f"{file.relative_to(REPOSITORY)} imports {name}"
        for file in files_under(*parts)
        for name in imports(file)
        if is_under(name, names)
    ]


@pytest.mark.parametrize("part", ["exploration", "algorithm"])
def test_algorithm_and_exploration_import_only_torch_themselves_and_the_registry(part):
    allowed = ("torch", "jaxtyping", f"{PACKAGE}.{part}", f"{PACKAGE}.registry", *STANDARD)
    wrong = [
        f"{file.relative_to(REPOSITORY)} imports {name}"
        for file in files_under(part)
        for name in imports(file)
        if not is_under(name, allowed)
    ]
    assert not wrong


def test_the_policy_imports_no_rollout_no_rewards_and_no_loop():
    assert not arrows(("policy",), ("rollout", "rewards", *LOOP))


@pytest.mark.parametrize("part", PARTS)
def test_no_component_of_the_loop_imports_the_loop(part):
    assert not arrows((part,), LOOP)


def test_distributed_does_not_import_what_runs_on_its_ranks():
    assert not arrows(("distributed",), (*PARTS, "training", "cli", "report"))


def test_the_report_imports_the_configuration_and_the_table_of_metrics_and_not_the_loop():
    allowed = tuple(
        f"{PACKAGE}.{part}"
        for part in ("report", "config", "tracking.table", "tracking.health", "errors", "__version__")
    )
    known = [name for file in files_under("report") for name in imports(file) if is_under(name, (PACKAGE,))]
    assert not [name for name in known if name != PACKAGE and not is_under(name, allowed)]
    code = f"import {PACKAGE}.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


def test_the_launcher_imports_only_configuration_and_errors_and_only_the_cli_imports_it():
    allowed = tuple(f"{PACKAGE}.{part}" for part in ("config", "errors", "__version__"))
    wrong = [
        f"{file.name} imports {name}"
        for file in LAUNCH_SOURCES
        for name in imports(file)
        if is_under(name, (PACKAGE,)) and name != PACKAGE and not is_under(name, allowed)
    ]
    assert LAUNCH_SOURCES and not wrong
    importers = {file.name for file in SOURCES for name in imports(file) if is_under(name, (LAUNCHER,))}
    assert importers == {"cli.py"}


def test_the_launcher_imports_nothing_heavy():
    modules = ", ".join(f"{LAUNCHER}.{file.stem}" for file in LAUNCH_SOURCES if file.stem not in USE_NEMO_RUN)
    code = f"import {modules}, sys; sys.exit(bool({{'torch', 'transformers', 'megatron', 'vllm'}} & {{*sys.modules}}))"
    path = os.pathsep.join([str(REPOSITORY / "launch"), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_collectives_of_python_objects_are_in_one_module():
    users = [module_name(file) for file in SOURCES if re.search(r"\bdist\.\w+_object\w*\(", file.read_text())]
    assert users == [f"{PACKAGE}.distributed.collectives"]


def test_nothing_imports_the_command_line():
    others = tuple(sorted({module_name(file).split(".")[1] for file in SOURCES if "." in module_name(file)} - {"cli"}))
    assert not arrows(others, ("cli",))


@pytest.mark.parametrize("part", ["records", "config", "registry", "errors"])
def test_records_and_configuration_import_nothing_above_them(part):
    allowed = (f"{PACKAGE}.{part}", f"{PACKAGE}.errors", *[f"{PACKAGE}.registry"] * (part == "config"))
    wrong = [
        f"{file.relative_to(REPOSITORY)} imports {name}"
        for file in files_under(part)
        for name in imports(file)
        if is_under(name, (PACKAGE,)) and name != PACKAGE and not is_under(name, allowed)
    ]
    assert not wrong


LIGHT = ["cli", "distributed.ranks", "rewards"]
LIGHT += [module_name(file).partition(".")[2] for file in files_under("config")]


def test_the_table_of_metrics_and_the_display_do_not_import_torch():
    code = "import megatron_g2rl.tracking.table, megatron_g2rl.tracking.progress, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


@pytest.mark.parametrize("heavy", ["torch", "transformers", "megatron", "vllm"])
def test_nothing_heavy_is_imported_before_a_configuration_is_checked(heavy):
    modules = ", ".join(f"{PACKAGE}.{name}" for name in LIGHT)
    code = f"import {modules}, sys; sys.exit({heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, f"importing {modules} imports {heavy}"


def test_every_folder_of_modules_is_a_package():
    folders = {file.parent for file in SOURCES}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def declared_packages() -> set[str]:
    """Names of all requirements of setup.py, extras included."""
    assigned = {
        node.targets[0].id: node.value
        for node in ast.parse((REPOSITORY / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    extras = ast.literal_eval(assigned["EXTRAS"])
    requirements = [*ast.literal_eval(assigned["REQUIRED"]), *(text for extra in extras.values() for text in extra)]
    launch = (REPOSITORY / "launch" / LAUNCHER / "requirements.txt").read_text().splitlines()
    requirements += [line for line in launch if not line.startswith("#")]
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_every_package_that_is_imported_is_declared():
    declared, known = declared_packages(), packages_distributions()
    missing = set()
    for file in [*SOURCES, *LAUNCH_SOURCES]:
        for top in {name.split(".")[0] for name in imports(file)} - STANDARD - {PACKAGE, LAUNCHER, "__future__"}:
            if not {canonicalize_name(name) for name in [top, *known.get(top, [])]} & declared:
                missing.add(f"{file.relative_to(REPOSITORY)} imports {top}")
    assert not missing


def test_no_module_has_a_meaningless_name():
    assert not [
        file
        for file in [*SOURCES, *LAUNCH_SOURCES]
        if {"utils", "helpers", "common", "misc"} & {file.stem, *file.parts}
    ]
