"""Who may import whom: run → trainer → components → batch, as the design's table says.

Run: uv run pytest tests/system/test_architecture.py      (seconds)
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE / "agent").with_suffix("").parts): path
    for path in sorted((SOURCE / "agent").rglob("*.py"))
    if path.name != "__init__.py"
}
DOORS = ["run", "command_line", "describe_config", "requeue", "sync_wandb", "prepare", "export", "report", "serve"]
DOORS += ["evaluate_sim", "data.prepare", "data.from_rlds", "data.from_v20"]
# Import nothing above them; anyone may import them.
GROUND = [
    "batch",
    "reproducibility",
    "hub",
    "safe_files",
    "spelling",
    "lifecycle.run_folder",
    "lifecycle.records",
]
# Only `models/<family>/` and the registry import `models/<family>/`.
FAMILIES = ["models.pi.*"]
ALL_BUT_DOORS_AND_FAMILIES = [
    name for name in MODULES if name not in DOORS and not any(fnmatch(name, family) for family in FAMILIES)
]
# What the rooms know of a policy: its family, and the keys that every policy's config has.
POLICIES = ["models.family", "models.lerobot_config", "models.policy", "models.registry"]

# Module → what else of agent it may import, beside the ground. The first matching row counts.
MAY_IMPORT = {
    "run": [
        "command_line",
        "lifecycle.*",
        "parallel.launch",
        "preflight.check",
        "tracking.console",
        "training.attempt",
    ],
    "data.from_*": ["data.*"],
    "data.prepare": ["command_line", "data.frames.*"],
    **{door: ["*"] for door in DOORS if door != "run" and "." not in door},
    "preflight.*": ALL_BUT_DOORS_AND_FAMILIES,
    "training.replicas": ["optim.*", "parallel.processes"],
    "training.config_changes": ["checkpoints.*", "configuration_pipeline", "data.frames.store"],
    "training.memory_advice": ["configuration_pipeline"],
    "training.*": ALL_BUT_DOORS_AND_FAMILIES,
    "configuration_pipeline": [
        "data.configuration",
        "models.base",
        *POLICIES,
        "settings.*",
        "simulation.configuration",
        "tracking.wandb_sink",
    ],
    "settings.*": ["models.base", "models.other_models", "settings.*"],
    "parallel.*": ["parallel.*"],
    "checkpoints.*": ["checkpoints.*", "parallel.*"],
    "optim.*": ["optim.*", "parallel.sharding"],
    "tracking.*": ["lifecycle.history", "tracking.*", "validation.record"],
    "validation.*": ["parallel.processes", "validation.*"],
    "deployment.publishing": [],
    "deployment.model_card": [],
    "deployment.*": [
        "checkpoints.*",
        "data.normalization.*",
        "data.recorded.*",
        "data.samples.task_tokens",
        "deployment.*",
        "models.base",
        "models.lerobot_folder",
        "models.other_models",
        *POLICIES,
    ],
    "inference": [
        "checkpoints.weights",
        "data.resizing",
        "data.samples.*",
        "deployment.*",
        "models.common.attention_kernels",
        *POLICIES,
    ],
    "serving.*": ["deployment.*", "inference", "serving.*", "tracking.console"],
    "reporting.*": ["lifecycle.history", "reporting.*", "validation.record"],
    "data.configuration": [],
    "data.samples.mixture": [],
    "data.normalization.normalizer": [],
    "data.resizing": [],
    "data.samples.transforms": [],
    "data.*": ["checkpoints.manifest", "data.*"],
    "models.base": [],
    "models.flow_matching": [],
    "models.policy": [],
    "models.lerobot_config": ["models.base"],
    "models.other_models": ["models.base", "models.lerobot_config"],
    "models.lerobot_folder": ["checkpoints.manifest", "models.lerobot_config"],
    "models.family": ["models.lerobot_config"],
    "models.registry": [
        "models.base",
        "models.family",
        "models.lerobot_config",
        *(f"{f[:-2]}.family" for f in FAMILIES),
    ],
    "models.common.*": ["models.common.*"],
    "models.pi.*": [
        "checkpoints.*",
        "models.base",
        "models.common.*",
        "models.family",
        "models.flow_matching",
        "models.lerobot_*",
        "models.pi.*",
        "models.policy",
    ],
    "lifecycle.*": ["lifecycle.*"],
    **{name: [] for name in GROUND},
    **{f"simulation.{name}": [] for name in ("configuration", "rendering", "video", "results")},
    "simulation.starting": ["simulation.configuration"],
    "simulation.metaworld": ["simulation.rendering"],
    "simulation.rollout": ["simulation.results"],
    "simulation.evaluation": ["checkpoints.manifest", "inference", "simulation.*"],
    "simulation.watching": ["simulation.*"],
    "simulation.session": ["checkpoints.finding", "simulation.*"],
}


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of what is imported, in functions too; what only the type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imported(child)


def imported_here(module: str) -> Iterator[str]:
    """The modules of agent that one of them imports."""
    for name in imported(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if name.split(".")[0] == "agent":
            inside = name.removeprefix("agent.")
            target = inside if inside in MODULES else inside.rpartition(".")[0]
            assert target in MODULES, f"{module} imports {name}, which is no module"
            yield target


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    row = next((row for row in MAY_IMPORT if fnmatch(module, row)), None)
    assert row is not None, f"{module} is in no row of the table: add it"
    allowed = [*MAY_IMPORT[row], *([] if module in GROUND and not module.startswith("lifecycle.") else GROUND)]
    for target in imported_here(module):
        assert any(fnmatch(target, pattern) for pattern in allowed), f"{module} must not import {target}"


def test_no_imports_in_a_circle() -> None:
    """Not even in functions: of two modules that need each other, neither can be understood or changed alone."""
    left = {module: set(imported_here(module)) for module in MODULES}
    while outside := {
        one for one in left if not left[one] & left.keys() or not any(one in some for some in left.values())
    }:
        left = {module: targets for module, targets in left.items() if module not in outside}
    assert left == {}, f"these import each other: {sorted(left)}"


def words(tree: ast.AST) -> Iterator[str]:
    """The names that code uses, and the texts that are names: of a config's key, a type or a step. No prose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.-]+", node.value):
            yield node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("models.")])
def test_nothing_outside_models_names_a_family(module: str) -> None:
    named = {word for word in words(ast.parse(MODULES[module].read_text(encoding="utf-8"))) if names_a_family(word)}
    assert named == set()


def names_a_family(word: str) -> bool:
    return re.search(r"pi_?0|paligemma|siglip|gemma", word.lower()) is not None


def test_the_table_names_modules_that_exist() -> None:
    assert [row for row in MAY_IMPORT if not any(fnmatch(module, row) for module in MODULES)] == []


def test_no_module_shadows_another() -> None:
    # `python src/agent/run.py` puts src/agent first on sys.path.
    names = {name.split(".")[0] for name in MODULES}
    assert names & (set(sys.stdlib_module_names) | set(packages_distributions()) - {"agent"}) == set()


def test_what_is_imported_is_named_in_pyproject() -> None:
    """What comes along with a dependency today may not come with its next release."""
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert all("==" in requirement for requirement in project["dependencies"])
    distributions = packages_distributions()
    missing = {}
    for module, path in MODULES.items():
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            package = name.split(".")[0]
            # What an extra brings may not be here; those packages are named as their distributions.
            possible = {normal(one) for one in distributions.get(package, [package])}
            if package not in sys.stdlib_module_names | {"agent"} and not possible & set(map(normal, named)):
                missing[package] = module
    assert missing == {}


def normal(requirement: str) -> str:
    """The name in a requirement, in the form that PyPI compares."""
    return re.split(r"[^\w.-]", requirement)[0].replace("_", "-").lower()


def test_the_way_to_a_config_imports_nothing_heavy() -> None:
    heavy = ["torch", "lerobot", "transformers", "wandb", "datasets", "pandas"]
    modules = "agent.configuration_pipeline, agent.run, agent.command_line, agent.describe_config, agent.requeue"
    program = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


SCRIPTS = [path for folder in ("benchmarks", "scripts") for path in sorted((SOURCE.parent / folder).glob("*.py"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_benchmarks_and_scripts_import_exists(script: Path) -> None:
    """They are not run whole by the tests, nor are their types checked."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "agent":
            continue
        module = (node.module or "").removeprefix("agent").removeprefix(".")
        known = {name.removeprefix(f"{module}.") for name in MODULES if name.startswith(f"{module}.") or not module}
        if module in MODULES:
            known |= names_in(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        known |= {name.split(".")[0] for name in known}
        assert {alias.name for alias in node.names} <= known, f"{script.name}, line {node.lineno}: {node.module}"


def names_in(tree: ast.Module) -> set[str]:
    """What a module defines or imports at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


TESTS = SOURCE.parent / "tests"
TEST_MODULES = {path.stem for path in TESTS.rglob("*.py")} - {path.stem for path in TESTS.glob("support/*.py")}


@pytest.mark.parametrize("file", [str(path.relative_to(TESTS)) for path in sorted(TESTS.rglob("*.py"))])
def test_no_test_module_is_imported(file: str) -> None:
    """What several tests use is in tests/support, so that a test file can be moved, split or run alone."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    named = {part for name in imported(tree) for part in name.split(".")}
    # The programs that tests give to a Python of their own are strings.
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named |= {name for text in texts for name in re.findall(r"\b(?:import|from) (?:[\w.]+, )*(test_\w+)", text)}
    assert named & TEST_MODULES == set()
