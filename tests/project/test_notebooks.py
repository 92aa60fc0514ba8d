"""The notebooks are readable, stripped and parameterized as agreed, and the profiles name parameters that exist."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))
SECTIONS = {"about", "common", "needs"}
MOST_PARAMETERS = 10
OWN_NAMES = ("fig07_checkpoints", "my_model")  # what they take is theirs alone

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_profile = pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def parameter_cells(path: Path) -> list:
    return [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]


@each_notebook
def test_stripped(path):
    how = f"strip it: python -m nbconvert --clear-output --inplace notebooks/{path.name}"
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path)), how
    assert all(set(cell.metadata) <= {"tags"} for cell in read(path).cells), how
    metadata = read(path).metadata
    assert set(metadata) <= {"kernelspec", "language_info"}
    assert metadata.kernelspec.name == "python3" and metadata.kernelspec.language == "python"
    assert "version" not in metadata.get("language_info", {}), "the Python version of one machine"


@each_notebook
def test_reads_like_prose(path):
    """A cell does one thing: no functions, no two statements on a line, no tuples on both sides of an assignment."""
    for cell in code_cells(path):
        tree = ast.parse(re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE))
        nodes = list(ast.walk(tree))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert not functions, "functions belong in llmdrop/"
        starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
        assert len(starts) == len(set(starts)), "one statement a line"
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                assert not isinstance(node.targets[0], ast.Tuple), f"tuple trick: {ast.unparse(node)}"


@each_notebook
def test_opens_with_a_title_and_the_place_in_the_paper(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    if path.stem.startswith(("fig", "tab")):
        assert re.search(r"Figure|Table", first.source)


@each_notebook
def test_one_parameters_cell_of_commented_literals(path):
    (cell,) = parameter_cells(path)
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), f"not an assignment: {ast.unparse(statement)}"
        ast.literal_eval(statement.value)
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", statement.targets[0].id)
    uncommented = [line for line in cell.source.splitlines() if "=" in line and "#" not in line]
    assert not uncommented, "say what each is and what else it may be"


def parameters(path: Path) -> dict[str, tuple[object, str]]:
    """{name: (value, what the comment says up to the first semicolon)}"""
    (cell,) = parameter_cells(path)
    lines = cell.source.splitlines()
    found = {}
    for statement in ast.parse(cell.source).body:
        comment = lines[statement.lineno - 1].partition("  # ")[2]
        found[statement.targets[0].id] = ast.literal_eval(statement.value), comment.partition(";")[0].strip()
    return found


@each_notebook
def test_few_parameters(path):
    if path.stem not in OWN_NAMES:
        assert len(parameters(path)) <= MOST_PARAMETERS, "what nobody changes has a default in the library: Settings"


def test_one_name_has_one_type_and_one_meaning():
    types = defaultdict(dict)
    meanings = defaultdict(dict)
    for path in NOTEBOOKS:
        for name, (value, meaning) in parameters(path).items():
            if value is not None:
                types[name][type(value).__name__] = path.stem
            if path.stem not in OWN_NAMES:
                meanings[name][meaning] = path.stem
    assert not {name: by_type for name, by_type in types.items() if len(by_type) > 1}
    assert not {name: by_meaning for name, by_meaning in meanings.items() if len(by_meaning) > 1}


@each_notebook
def test_no_absolute_path(path):
    source = "\n".join(cell.source for cell in read(path).cells)
    assert not re.findall(r"""["'`(](?:/[A-Za-z]\w*|~/|[A-Z]:\\)[^\s"'`]*""", source)


@each_profile
def test_profile(path):
    """Every name is a parameter; papermill itself would only warn."""
    inspect_notebook = pytest.importorskip("papermill").inspect_notebook
    profile = yaml.safe_load(path.read_text())
    names = [name for name in profile if name not in SECTIONS]
    assert set(names) <= {p.stem for p in NOTEBOOKS}, "names a notebook that is not there"
    known = {name: set(inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))) for name in names}
    for name in names:
        assert set(profile[name] or {}) <= known[name], name
        assert not set(profile[name] or {}) & {"PROFILE", "OUT"}, "the same for every notebook: in common"
    assert set(profile["common"]) <= set().union(*known.values())
    experiment = pytest.importorskip("llmdrop.repro.experiment")
    allowed = {setting.name for setting in dataclasses.fields(experiment.Settings)}
    for section in ("common", *names):
        assert set((profile[section] or {}).get("SETTINGS", {})) <= allowed, section
    assert profile["common"]["PROFILE"] == path.stem
    assert profile["common"]["OUT"] == f"../figures/{path.stem}"
    assert profile["about"]
    assert list(profile["needs"]) == names
    for need in profile["needs"].values():
        assert set(need) == {"minutes", "disk_gb", "download_gb", "gpu_gb"} and min(need.values()) >= 0


def test_profiles_agree_with_the_notebooks():
    assert {"smoke", "embedded", "full", "paper", "geometry", "pretrain", "pretrain_gpu", "beyond"} <= {
        p.stem for p in PROFILES
    }
    listed = {p.stem: set(yaml.safe_load(p.read_text())) - SECTIONS for p in PROFILES}
    everything = listed["embedded"] | listed["beyond"]
    assert not listed["embedded"] & listed["beyond"]
    assert everything == listed["smoke"], "smoke runs what embedded and beyond run, with less"
    assert {p.stem for p in NOTEBOOKS} - {"my_model"} == everything


@each_notebook
def test_common_parameters(path):
    names = {statement.targets[0].id for statement in ast.parse(parameter_cells(path)[0].source).body}
    if path.stem != "my_model":
        assert {"PROFILE", "OUT"} <= names
        defaults = {s.targets[0].id: s.value for s in ast.parse(parameter_cells(path)[0].source).body}
        assert ast.literal_eval(defaults["OUT"]) == "../build/figures/mine", "by hand, nothing published is touched"


# -- what the first cells cost ----------------------------------------------------------------------------------------

# modules of ours that may bring a package that takes long to import, since all that is in them needs it
MAY_BRING = {
    "llmdrop.repro.comparison_figures": {"matplotlib"},
    "llmdrop.repro.figures": {"matplotlib"},
    "llmdrop.repro.speedup_figures": {"matplotlib"},
    "llmdrop.repro.training_claims": {"scipy.stats"},
}
IMPORT_IN_TURN = """
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # what these bring is theirs

order = json.loads(sys.argv[1])
slow = ("bitsandbytes", "datasets", "gguf", "lm_eval", "matplotlib", "peft", "scipy.stats", "seaborn", "sklearn")
known = {package for package in slow if package in sys.modules}
brought = {}
for statement in order:
    exec(statement)
    new = {package for package in slow if package in sys.modules} - known
    brought[statement] = sorted(new)
    known |= new
print(json.dumps(brought))
"""


def brought(statements: list[str]) -> dict[str, list[str]]:
    """The slow packages that each of these imports brings, one after the other, beside torch and transformers."""
    command = [sys.executable, "-c", IMPORT_IN_TURN, json.dumps(statements)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def imports_of_first_cells() -> list[ast.stmt]:
    cells = [code_cells(path)[0].source for path in NOTEBOOKS]
    trees = [ast.parse(re.sub(r"^%.*$", "", cell, flags=re.MULTILINE)) for cell in cells]
    return [node for tree in trees for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_nothing_slow_is_imported_before_it_is_used():
    """A notebook that only reads the store, or draws a table, should not wait for lm-eval, datasets or seaborn."""
    statements = imports_of_first_cells()
    names = {node.module for node in statements if isinstance(node, ast.ImportFrom)}
    names |= {f"{node.module}.{alias.name}" for node in statements for alias in node.names if hasattr(node, "module")}
    modules = sorted(name for name in names if (ROOT / f"{name.replace('.', '/')}.py").is_file())
    assert set(MAY_BRING) < set(modules)
    ours = [f"import {name}" for name in sorted(modules, key=lambda name: name in MAY_BRING)]
    all_of_them = "\n".join(ast.unparse(node) for node in statements)
    found = brought(["import llmdrop", *ours, all_of_them, "import datasets", "import seaborn"])
    for name in ["llmdrop", *modules]:
        assert set(found[f"import {name}"]) <= MAY_BRING.get(name, set()), f"{name}: import it where it is used"
    assert not {"lm_eval", "datasets", "seaborn", "sklearn"} & set(found[all_of_them])
    assert "datasets" in found["import datasets"] and "seaborn" in found["import seaborn"], "they would be seen"
