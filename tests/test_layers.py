"""The rooms of the house: who may import whom, what the core needs, and that it runs without anything else."""

import ast
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from bare import CORE_REQUIREMENTS, distributions, normalized
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmdrop"
CORE = {"plan", "proof", "anatomy", "calibration", "hooks", "scoring", "sublayers", "prune", "files"}
MAY_IMPORT = {
    "core": {"core"},
    "data": {"core", "data"},
    "checkpoints": {"core", "data", "checkpoints"},
    "evaluation": {"core", "data", "checkpoints", "evaluation", "speed", "streaming", "serving"},
    "speed": {"core", "data", "checkpoints", "evaluation", "speed", "streaming", "serving"},
    "streaming": {"core", "data", "checkpoints", "evaluation", "speed", "streaming", "serving"},
    "serving": {"core", "data", "checkpoints", "evaluation", "speed", "streaming", "serving"},
    "compress": {"core", "data", "checkpoints", "evaluation", "speed", "streaming", "serving", "compress"},
}
MAY_IMPORT["repro"] = MAY_IMPORT["compress"] | {"repro"}
# these pin another transformers than ours, so they live in environments of their own and no extra can name them
OWN_ENVIRONMENT = {
    "llmdrop.compress.awq": {"llmcompressor", "compressed_tensors"},
    "llmdrop.serving.vllm_worker": {"vllm"},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if list(folder.glob("*.py")))


def room(module: str) -> str:
    """ "core", or the folder; "llmdrop" for the package itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return "llmdrop"
    return "core" if parts[1] in CORE else parts[1]


@dataclass
class Imports:
    """What one file imports, wherever in it the import stands."""

    modules: set[str] = field(default_factory=set)  # of ours
    outside: set[str] = field(default_factory=set)  # top-level packages that are neither ours nor Python's
    private: set[str] = field(default_factory=set)  # "module._name" of ours, imported or reached


def read_imports(module: str, source: str, is_package: bool = False, known: set[str] | None = None) -> Imports:
    """Parse a file of this name. known: the modules there are (default: those of the package)."""
    known = known or set(FILES)
    package = module if is_package else module.rpartition(".")[0]
    found = Imports()
    modules_by_alias: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top == "llmdrop":
                    found.modules.add(alias.name)
                    modules_by_alias[alias.asname or top] = alias.name if alias.asname else top
                else:
                    found.outside.add(top)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, package)
            if origin.split(".")[0] != "llmdrop":
                found.outside.add(origin.split(".")[0])
                continue
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                if full in known:
                    found.modules.add(full)
                    modules_by_alias[alias.asname or alias.name] = full
                else:
                    found.modules.add(origin)
                if _is_private(alias.name):
                    found.private.add(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and _is_private(node.attr):
            owner = modules_by_alias.get(node.value.id)
            if owner is not None:
                found.private.add(f"{owner}.{node.attr}")
    found.outside -= set(sys.stdlib_module_names)
    found.modules.discard(module)
    return found


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module
    parts = package.split(".")
    base = parts[: len(parts) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def imports_of(module: str) -> Imports:
    file = FILES[module]
    return read_imports(module, file.read_text(), is_package=file.name == "__init__.py")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every import circle found by walking the graph depth first."""
    found = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for neighbor in sorted(graph.get(module, ())):
            walk(neighbor, [*path, module])
        done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


every_module = pytest.mark.parametrize("module", sorted(FILES))


# -- the rules ------------------------------------------------------------------------------------------------------


def test_every_folder_is_a_room_that_the_rules_know():
    assert set(ROOMS) == set(MAY_IMPORT) - {"core"}
    assert {file.stem for file in PACKAGE.glob("*.py")} == CORE | {"__init__"}


@every_module
def test_imports_only_the_rooms_it_may(module):
    if module == "llmdrop":
        return
    allowed = MAY_IMPORT[room(module)]
    wrong = sorted(other for other in imports_of(module).modules if room(other) not in allowed)
    assert not wrong, f"{module} is in {room(module)}, which may import {', '.join(sorted(allowed))}"


def test_no_circles():
    graph = {module: imports_of(module).modules - {"llmdrop"} for module in FILES if module != "llmdrop"}
    assert not circles(graph), "\n".join(" -> ".join(circle) for circle in circles(graph))


@every_module
def test_no_private_name_of_another_module(module):
    assert not imports_of(module).private, "give it a public name"


@every_module
def test_has_a_docstring(module):
    tree = ast.parse(FILES[module].read_text())
    assert ast.get_docstring(tree), "say in one to three sentences what is in here"
    if FILES[module].name == "__init__.py" and module != "llmdrop":
        assert len(tree.body) == 1, "a room's __init__ is its docstring and nothing else"


# -- what is required -----------------------------------------------------------------------------------------------


def declared() -> tuple[set[str], set[str]]:
    """Names of the distributions that pyproject.toml requires: always, and by any extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    always = {normalized(Requirement(line).name) for line in project["dependencies"]}
    return always, {normalized(Requirement(line).name) for line in extras} - {"llmdrop"}


@every_module
def test_everything_imported_is_declared(module):
    always, by_extra = declared()
    allowed = always & CORE_REQUIREMENTS if room(module) == "core" else always | by_extra
    for package in sorted(imports_of(module).outside - OWN_ENVIRONMENT.get(module, set())):
        assert distributions().get(package, {normalized(package)}) & allowed, (
            f"{module} imports {package}; declared for it: {', '.join(sorted(allowed))}"
        )


def test_the_command_line_imports_what_is_declared_and_nothing_private():
    """Beside the package, which does not know it."""
    found = read_imports("llmdrop_cli", (ROOT / "llmdrop_cli.py").read_text())
    assert found.outside == {"typer", "numpy", "pandas", "torch"} and found.outside <= declared()[0]
    assert not found.private
    assert not [module for module in FILES if "llmdrop_cli" in imports_of(module).outside]


# -- the core alone -------------------------------------------------------------------------------------------------


BLOCKED_RUN = """
import sys

import bare

hidden = bare.hide_all_but(bare.CORE_REQUIREMENTS)
assert {"lm_eval", "datasets", "scipy", "matplotlib", "papermill"} <= hidden, "else nothing is shown"
assert not {"torch", "transformers", "tokenizers"} & hidden

import llmdrop
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tiny import random_ids, tiny

model = tiny("llama")
calibration = llmdrop.Calibration(random_ids(4, 16))
scores = llmdrop.score(model, calibration, progress=False)
plan = llmdrop.plan_drop(scores, "attn", 2)
with llmdrop.dropped(model, plan):
    expected = model(calibration.input_ids).logits
llmdrop.apply_plan(model, plan)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
llmdrop.save_model(model, tokenizer, sys.argv[1])
again, _ = llmdrop.load_model(sys.argv[1], device="cpu", attn_implementation="eager")
assert torch.equal(again(calibration.input_ids).logits, expected)
print("losses", llmdrop.perplexity(model, calibration, progress=False)["n_tokens"])
loaded = sorted(set(name.partition(".")[0] for name in sys.modules) & hidden)
assert not loaded, loaded
"""


@pytest.mark.slow
def test_the_core_runs_without_the_extras(tmp_path):
    """Import, score, drop, save and load where only the core's requirements are installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment["LLMDROP_BUILD"] = str(tmp_path / "build")
    command = [sys.executable, "-c", BLOCKED_RUN, str(tmp_path / "saved")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["losses", "60"]


# -- that these tests can fail --------------------------------------------------------------------------------------


def test_imports_are_seen_wherever_they_stand():
    source = """
import torch
import scipy.stats as stats
from .. import scoring
from ..plan import DropPlan, _indices
from . import store as results
import llmdrop.repro.paper as paper

def later():
    from ..compress.variant import Variant
    return results._json(paper.__doc__), scoring._norm, DropPlan._made_up, stats._private
"""
    found = read_imports("llmdrop.repro.example", source)
    assert found.outside == {"torch", "scipy"}
    ours = {"scoring", "plan", "repro.store", "repro.paper", "compress.variant"}
    assert found.modules == {f"llmdrop.{name}" for name in ours}
    assert found.private == {"llmdrop.plan._indices", "llmdrop.repro.store._json", "llmdrop.scoring._norm"}


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]


def test_rooms_by_name():
    names = ("llmdrop", "llmdrop.plan", "llmdrop.repro", "llmdrop.repro.store", "llmdrop.data.texts")
    assert [room(name) for name in names] == ["llmdrop", "core", "repro", "repro", "data"]
    assert "repro" not in MAY_IMPORT["compress"] and MAY_IMPORT["core"] == {"core"}
