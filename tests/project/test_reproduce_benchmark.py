"""`benchmarks/reproduce.py` counts CPU seconds by notebook and by kind, and sees numbers that are no longer equal."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("papermill")
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make (Debian: apt install make)")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reproduce  # noqa: E402

# a library with the names that the benchmark counts apart; each burns so many seconds of CPU
LIBRARY = """
import json
import os
import time
from pathlib import Path


def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def weights_digest(model):
    burn(0.1)


def load_model(name):
    burn(0.2)
    weights_digest(name)


class Store:
    def get_many(self, kind, value):
        weights_digest(kind)
        burn(0.3)
        folder = Path(os.environ["LLMDROP_BUILD"]) / "results" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "measured.json").write_text(json.dumps({"value": value}))
"""
CELLS = [
    "import llmdrop\nfrom llmdrop.repro.experiment import load_experiment",
    "VALUE = 1  # what is measured",
    "load_experiment('tiny')\nllmdrop.Store().get_many('losses', VALUE)\nllmdrop.Store().get_many('timing', VALUE)",
    "llmdrop.burn(0.2)",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository of one tiny notebook, whose measured value is another one since its last commit."""
    root = tmp_path_factory.mktemp("project")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "notebooks/run.py"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "notebooks/report.py").write_text("")
    (root / "notebooks/profiles").mkdir()
    (root / "notebooks/profiles/smoke.yaml").write_text("about: one tiny notebook\none: {VALUE: 1}\n")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / "notebooks/one.ipynb")
    (root / "llmdrop/repro").mkdir(parents=True)
    (root / "llmdrop/__init__.py").write_text(LIBRARY)
    (root / "llmdrop/repro/experiment.py").write_text("from .. import load_model\n\nload_experiment = load_model\n")
    (root / ".gitignore").write_text("build/\n")
    for name in ("models", "data"):
        (root / "build" / name).mkdir(parents=True)
    author = ("-c", "user.name=test", "-c", "user.email=test")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    (root / "notebooks/profiles/smoke.yaml").write_text("about: one tiny notebook\none: {VALUE: 2}\n")
    return root


def test_both_trees_are_measured_by_notebook_and_kind(project, monkeypatch, capfd):
    monkeypatch.setattr(reproduce, "ROOT", project)
    monkeypatch.delenv("LLMDROP_BUILD", raising=False)
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "HEAD", "--jobs", "1"])
    assert reproduce.main() == 0
    printed = capfd.readouterr().out.split("\nbefore: ")[1]
    rows = {
        line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:-1] for line in printed.splitlines() if line.split()[3:]
    }
    least = {"store: losses": 0.3, "store: timing": 0.3, "load": 0.2, "digest": 0.3, "drawing, all else": 0.2}
    for kind, seconds in least.items():  # burned by CPU seconds, so however slow the machine is
        assert all(float(value) >= seconds for value in rows[kind]), kind
    assert float(rows["start, imports"][0]) > 0 and {"one", "plan", "all", "report", "in all"} <= rows.keys()
    assert "1 measurements under equal keys, 1 of them with other values; 0 only before, 0 only now" in printed
    assert "differs: losses/measured.json" in printed
    assert not (project / "build/results").exists() and not (project / "figures").exists()


def test_a_second_is_counted_once_for_the_innermost_kind(monkeypatch):
    now = 0.0
    monkeypatch.setattr(reproduce, "cpu_seconds", lambda: now)
    clock = reproduce.Clock("start")
    now = 1.0
    with clock.working("load"):
        now = 3.0
        with clock.working("digest"):
            now = 7.0
        now = 15.0
    with pytest.raises(ValueError), clock.working("digest"):
        now = 31.0
        raise ValueError
    now = 63.0
    clock.charge()
    assert clock.seconds == {"start": 1 + 32, "load": 2 + 8, "digest": 4 + 16}


def test_a_command_is_logged_and_its_status_handed_on(tmp_path):
    burn = "import sys, time\nwhile time.process_time() < 0.2: pass\nsys.exit(7)"
    program = [sys.executable, reproduce.__file__, "--timed", str(tmp_path / "log"), sys.executable, "-c", burn]
    assert subprocess.run(program).returncode == 7
    (record,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert record["cpu"] >= 0.2 and record["command"] == ["-c", burn] and record["peak_gb"] > 0
