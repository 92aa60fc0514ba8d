"""The Makefile and notebooks/run.py on a copy of the project with tiny notebooks: what runs, when, and what not."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import typer
from processes import all_end

import llmdrop_cli

papermill = pytest.importorskip("papermill")
ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = ROOT / "notebooks"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make (Debian: apt install make)")
spec = importlib.util.spec_from_file_location("run", ROOT / "notebooks" / "run.py")
spec.loader.exec_module(run := importlib.util.module_from_spec(spec))

PARAMETERS = 'PROFILE = "embedded"  # which profile\nOUT = "../figures/embedded"  # where the figures go\n'
WRITE = "from pathlib import Path\nPath(OUT).mkdir(parents=True, exist_ok=True)\n"
CELLS = {  # parameters, measure
    "one": ('MODEL = "tiny"  # a model\n', "print('measuring', MODEL)\n(Path(OUT) / 'one.csv').write_text(MODEL)"),
    "two": ("DATA_DIR = None  # a mirror\n", "(Path(OUT) / 'two.csv').write_text(f'{DATA_DIR}')"),
    "three": ("N = 3  # a number\n", "if N > 10:\n    raise ValueError('N too large')\nprint(N)"),
}
COMMAND_LINE = "import sys; print('llmdrop', *sys.argv[1:])"
REPORT = "import sys, pathlib as p; (p.Path(sys.argv[3]) / 'index.html').touch()"
# not ours: FRESH=1 would put the measurements of another build folder aside
FOREIGN = set("LLMDROP_BUILD MAKEFLAGS MFLAGS MAKELEVEL MODEL DEVICE DATA_DIR TASKS".split())
FOREIGN |= set("LIMIT ONLY FRESH PROFILE JOBS".split())


def test_settings_of_a_profile_and_of_a_notebook_are_put_together():
    common = {"SETTINGS": {"n_samples": 2, "seq_len": 64}, "DTYPE": "float32"}
    both = {"SETTINGS": {"n_samples": 2, "seq_len": 32}}
    assert run.together(common, {"SETTINGS": {"seq_len": 32}}, {"SETTINGS", "MODEL"}) == both
    assert run.together(common, {}, {"SETTINGS"}) == {"SETTINGS": common["SETTINGS"]}
    assert run.together(common, {"N": 3}, {"DTYPE", "N"}) == {"DTYPE": "float32", "N": 3}


def write_notebook(path: Path, parameters: str, code: str) -> None:
    cells = [nbformat.v4.new_code_cell(s) for s in (PARAMETERS + parameters, WRITE, code)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A project of three tiny notebooks, reproduced once: (its folder, what make said)."""
    root = tmp_path_factory.mktemp("first")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "notebooks/run.py"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "notebooks/report.py").write_text(REPORT)  # the real ones have their own tests
    (root / "llmdrop_cli.py").write_text(COMMAND_LINE)
    for name, (parameters, code) in CELLS.items():
        write_notebook(root / "notebooks" / f"{name}.ipynb", parameters, code)
    (root / "notebooks/profiles").mkdir()
    for name in ("embedded", "smoke"):
        (root / f"notebooks/profiles/{name}.yaml").write_text(
            f"about: three tiny notebooks\ncommon: {{PROFILE: {name}, OUT: ../figures/{name}}}\n"
            "needs:\n  one: {minutes: 7, disk_gb: 1.5, download_gb: 0, gpu_gb: 0}\n"
            "one: {}\ntwo:\nthree: {N: 4}\n"
        )
    (root / "llmdrop").mkdir()
    (root / "llmdrop/library.py").write_text("")
    (root / "stamp").write_text("")
    (root / "build/results").mkdir(parents=True)
    (root / "build/results/measured.json").write_text("{}")
    return root, make(root, "reproduce")


@pytest.fixture
def project(first_run, tmp_path):
    """A copy of the reproduced project, file times included."""
    return shutil.copytree(first_run[0], tmp_path / "project")


def own_environment() -> dict[str, str]:
    """Without what the make around the tests hands down."""
    return {k: v for k, v in os.environ.items() if k not in FOREIGN and not k.startswith(("OMP_", "HF_HUB"))}


def make(project: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make with this Python as its environment, stdout and stderr together."""
    runs_notebooks = not args or args[0] in ("reproduce", "smoke")
    one = [] if not runs_notebooks or any(arg.startswith(("-j", "JOBS")) for arg in args) else ["JOBS=1"]  # in order
    command = ["make", f"PY={sys.executable}", "STAMP=stamp", *one, *args]
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.run(command, cwd=project, env=own_environment() | environment, text=True, timeout=300, **streams)


def executed(output: str) -> list[str]:
    """Names of the notebooks that this run started, in its order."""
    return re.findall(r"\[\d+/\d+\] (\w+) …", output)


def made(project: Path, *args: str, **environment: str) -> list[str]:
    """The notebooks that `make reproduce` started; it must have ended well."""
    run = make(project, "reproduce", *args, **environment)
    assert run.returncode == 0, run.stdout
    return executed(run.stdout)


def done(project: Path, name: str, profile: str = "embedded") -> Path:
    return project / f"build/notebooks/{profile}/{name}.ipynb"


def test_notebooks_at_a_time(project, tmp_path):
    """By default as many as fill the cores of a CPU; never several for profiles that time by the paper's protocol."""
    (nproc := tmp_path / "nproc").touch(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    expected = {"embedded": (1, 2, 2), "smoke": (1, 2, 2), "beyond": (1, 2, 2), "full": (1,) * 3, "paper": (1,) * 3}
    for cores in (1, 2, 3):
        nproc.write_text(f"#!/bin/sh\necho {cores}\n")
        for profile, jobs in expected.items():
            command = ["make", "-n", "STAMP=stamp", f"PROFILE={profile}", "reproduce"]
            options = dict(cwd=project, env=own_environment() | {"PATH": path}, capture_output=True, text=True)
            assert f"--jobs {jobs[cores - 1]} " in subprocess.run(command, **options).stdout, (profile, cores)
    run = make(project, "reproduce", "FRESH=1", "JOBS=2")
    assert run.returncode == 0 and sorted(executed(run.stdout)) == ["one", "three", "two"]


def test_several_at_a_time_begin_with_the_longest(project):
    profile = project / "notebooks/profiles/embedded.yaml"
    profile.write_text(profile.read_text().replace("needs:", "needs:\n  three: {minutes: 9}\n  two: {minutes: 8}"))
    run = make(project, "reproduce", "JOBS=2")
    assert run.returncode == 0 and executed(run.stdout)[-1] == "one"


def test_help(project):
    output = make(project, "help").stdout
    for target in ("setup", "reproduce", "smoke", "test", "drop", "lab", "report", "docs", "clean"):
        assert f"make {target} " in output
    assert make(project).stdout == output


def variables_of(project: Path) -> dict[str, set[str]]:
    """{target: the variables that `make help` lists under it}"""
    listed: dict[str, set[str]] = {}
    for line in make(project, "help").stdout.split("\n\n")[0].splitlines():
        if found := re.match(r"  make (\w+) ", line):
            target = found[1]
            listed[target] = set()
        else:
            listed[target] |= set(re.findall(r"(\w+)=", line))
    return listed


def test_what_a_target_takes_is_in_help_and_anything_else_is_refused(project):
    listed = variables_of(project)
    assert listed["study"] == set(papermill.inspect_notebook(ROOT / "notebooks/my_model.ipynb"))
    everything = set().union(*listed.values())
    recipes = (ROOT / "Makefile").read_text()
    used = set(re.findall(r"\$\((?:if |or |filter-out 0,\$\()?([A-Z][A-Z_]*[A-Z])\b", recipes))
    of_its_own = set(re.findall(r"^([A-Z][A-Z_]*) *[:?]?=", recipes, re.MULTILINE))
    assert used - of_its_own <= everything | {
        "CURDIR",
        "MAKE",
        "MAKEFLAGS",
        "MAKECMDGOALS",
        "MAKEFILE_LIST",
    }
    for target, taken in listed.items():
        for name in ({"DTYP", "BATCH", "KEEP", "TASKS", "PORT"} | everything) - taken:
            run = make(project, "-n", target, f"{name}=a b=c")
            allowed = sorted(taken)[0] if taken else "no variables"
            assert run.returncode == 2, run.stdout
            assert re.search(f"make {target} does not take {name}; it takes: .*\\b{allowed}\\b", run.stdout)
        assert "does not take" not in make(project, "-n", target, *(f"{name}=" for name in taken), "HF_HOME=/x").stdout


def test_drop_evaluate_and_serve_hand_on_what_was_given(project):
    """To the commands of llmdrop, under the names that these have for it."""

    def handed(*arguments: str) -> str:
        return make(project, *arguments).stdout.strip()

    shares = ("MODEL=some/model", "ATTN=40%", "MLP=.25", "N_SAMPLES=2", "KEEP=0,29", "OUT=here/it is")
    given = "--attn 40% --mlp .25 --keep 0,29 --n-samples 2"
    assert handed("drop", *shares) == f"llmdrop drop some/model here/it is --overwrite {given}"
    assert handed("drop", "BLOCK=1", "RECONSTRUCT=1") == (
        "llmdrop drop smollm2-135m build/dropped/smollm2-135m-block1 --overwrite --reconstruct --block 1"
    )
    assert handed("serve", "ATTN=8", "PORT=81") == "llmdrop serve smollm2-135m --attn 8 --port 81"
    asked = ("evaluate", "MODEL=here", "TASKS=piqa,rte", "LIMIT=5", "BATCH=2")
    assert handed(*asked) == "llmdrop evaluate here piqa,rte --limit 5 --batch-size 2"
    program = typer.main.get_command(llmdrop_cli.app)
    for target, renamed in (
        ("drop", {}),
        ("serve", {}),
        ("evaluate", {"BATCH": "batch_size"}),
    ):
        options = {parameter.name for parameter in program.commands[target].params}
        of_make = variables_of(project)[target] - {"GPUS"}
        assert {renamed.get(name, name.lower()) for name in of_make} <= options


def test_every_command_in_the_documentation_is_taken(project):
    listed = variables_of(project)
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *NOTEBOOKS.glob("*.ipynb")]
    commands = [
        command for file in files for command in re.findall(r"make [a-z]+(?: +[A-Z_]+=[^ `\n]*)+", file.read_text())
    ]
    assert len(commands) > 10
    for command in commands:
        target = command.split()[1]
        assert set(re.findall(r"([A-Z_]+)=", command)) <= listed[target], command


def test_notebooks_run_in_this_environment_whatever_is_called_python3(project):
    """A cluster's JUPYTER_PATH names another interpreter."""
    foreign = project / "cluster/kernels/python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "The cluster's", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    write_notebook(project / "notebooks/one.ipynb", 'MODEL = ""\n', "import sys\nprint('ran in', sys.executable)")
    run = make(project, "reproduce", "ONLY=one", JUPYTER_PATH=str(project / "cluster"))
    assert run.returncode == 0 and f"ran in {sys.executable}\n" in run.stdout
    python = project / "python3"  # instead of a server, what it would take for python3
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexec {sys.executable} -m jupyter kernelspec list'
    )
    python.chmod(0o755)
    run = make(project, "lab", f"PY={python}", JUPYTER_PATH=str(project / "cluster"))
    assert f"{sys.prefix}/share/jupyter/kernels/python3" in run.stdout and "cluster" not in run.stdout


def test_first_run(first_run):
    root, run = first_run
    assert run.returncode == 0, run.stdout
    assert executed(run.stdout) == ["one", "two", "three"]
    assert "[2/3] two" in run.stdout and "measuring tiny" in run.stdout
    needs = run.stdout[: run.stdout.index("[1/3]")]  # said beforehand
    assert "three tiny notebooks" in needs and "minutes" in needs and "1.5" in needs and "free disk: " in needs
    assert (root / "figures/embedded/index.html").is_file() and (root / "figures/embedded/one.csv").is_file()
    assert not list((root / "build/notebooks/embedded").glob(".*.ipynb"))


def test_only_what_changed_runs_again(project):
    assert made(project) == []
    (project / "notebooks/two.ipynb").touch()
    assert made(project) == ["two"]
    (project / "llmdrop/library.py").touch()
    assert sorted(made(project, "-j2", "ONLY=t")) == ["three", "two"]
    (project / "notebooks/profiles/embedded.yaml").touch()
    assert made(project, "ONLY=one") == ["one"]
    shutil.rmtree(project / "figures")  # then the executed notebook no longer stands for what it drew
    assert made(project, "ONLY=one") == ["one"]
    assert (project / "figures/embedded/one.csv").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every notebook starts from nothing")
def test_notebooks_share_what_they_import_and_nothing_else(project):
    """One import for all, in processes of their own; numbers are computed there as ever, by several threads, too."""
    (project / "llmdrop/library.py").write_text("import os\nprint('imported in', os.getpid(), flush=True)\nSEEN = []\n")
    product = "print('sum', round(float((np.ones((300, 300)) @ np.ones((300, 300))).sum())))"
    code = f"import llmdrop.library, os\nimport numpy as np\n{{}}llmdrop.library.SEEN.append(NAME)\n{product}\n"
    code += "print(NAME, llmdrop.library.SEEN, llmdrop.library.__name__, __name__, 'in', os.getpid())\n"
    write_notebook(project / "notebooks/one.ipynb", "NAME = 'first'\n", code.format(""))
    write_notebook(project / "notebooks/two.ipynb", "NAME = 'second'\n", code.format("os.environ['OWN'] = '1'\n"))
    write_notebook(
        project / "notebooks/three.ipynb", "NAME = 'third'\nN = 3\n", code.format("print(os.getenv('OWN'))\n")
    )
    run = make(project, "reproduce", OMP_NUM_THREADS="2")
    assert run.returncode == 0, run.stdout
    (imported,) = re.findall(r"imported in (\d+)", run.stdout)
    said = re.findall(r"(\w+) (\[.*\]) llmdrop.library __main__ in (\d+)", run.stdout)
    assert [line[:2] for line in said] == [(name, f"['{name}']") for name in ("first", "second", "third")]
    assert len({imported, *(line[2] for line in said)}) == 4
    assert run.stdout.count("sum 27000000") == 3 and "\nNone\n" in run.stdout
    costs = [json.loads(line) for line in (project / "build/notebooks/embedded/costs.jsonl").read_text().splitlines()]
    assert [cost["notebook"] for cost in costs[-3:]] == ["one", "two", "three"]
    assert all(cost["cpu"] > 0 and cost["wall"] > 0 and 0.01 < cost["peak_gb"] < 10 for cost in costs)


def test_a_parameter_that_a_notebook_lost_is_named(project):
    params = done(project, "three").with_suffix(".params.json")
    params.write_text(json.dumps({"M": 4}))
    command = [sys.executable, "notebooks/run.py", "all", "notebooks/profiles/embedded.yaml", params.parent]
    options = dict(cwd=project, env=own_environment(), capture_output=True, text=True)
    ended = subprocess.run([*command, "--stamp", "stamp"], **options)
    assert ended.returncode == 1 and "no parameter 'M'; there are: N, OUT, PROFILE" in ended.stderr


def test_a_kernel_that_dies_is_its_notebooks_failure(project):
    write_notebook(project / "notebooks/two.ipynb", "", "import os\nos._exit(3)")
    run = make(project, "reproduce", "ONLY=two,three", "FRESH=1")
    assert run.returncode != 0 and "two FAILED" in run.stdout and "Kernel died" in run.stdout
    assert "failed: two" in run.stdout and "[3/3]" not in run.stdout and "[2/2] three  " in run.stdout


@pytest.mark.parametrize(("cuda", "hip", "safe"), [("13.0", None, False), (None, "7.0", False), (None, None, True)])
def test_a_process_that_may_hold_a_gpu_is_not_copied(monkeypatch, cuda, hip, safe):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=cuda, hip=hip)))
    assert run.import_for([]) == (safe and sys.platform == "linux")


def test_where_copies_are_not_safe_notebooks_start_from_nothing(project):
    (project / "notebooks/one.ipynb").touch()
    write_notebook(project / "notebooks/two.ipynb", "", "raise ValueError('as ever')")
    code = "import run, sys, pathlib as p\nrun.import_for = lambda sources: False\n"
    code += "sys.exit(run.run_all(p.Path(sys.argv[1]), p.Path(sys.argv[2]), p.Path('stamp'), 1))"
    command = [sys.executable, "-c", code, "notebooks/profiles/embedded.yaml", "build/notebooks/embedded"]
    environment = own_environment() | {"PYTHONPATH": "notebooks"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and executed(done.stdout) == ["one", "two"]
    assert "ValueError: as ever" in done.stderr and "failed: two" in done.stderr and "measuring tiny" in done.stdout


def test_overrides_reach_the_notebooks_that_have_them_and_make_them_again(project):
    (project / "mirror").mkdir()
    assert made(project, "MODEL=other", DATA_DIR="mirror") == ["one", "two"]
    assert (project / "figures/embedded/one.csv").read_text() == "other"
    assert (project / "figures/embedded/two.csv").read_text() == str(project / "mirror")
    file = done(project, "one").with_suffix(".params.json")
    assert json.loads(file.read_text()) == {"PROFILE": "embedded", "OUT": "../figures/embedded", "MODEL": "other"}
    assert made(project, "MODEL=other", "DATA_DIR=mirror") == []
    assert made(project, "DATA_DIR=mirror") == ["one"]
    assert (project / "figures/embedded/one.csv").read_text() == "tiny"


def test_a_failing_notebook_names_its_cell_and_the_others_go_on(project):
    profile = project / "notebooks/profiles/embedded.yaml"
    good = profile.read_text()
    profile.write_text(good.replace("one: {}\ntwo:\nthree: {N: 4}", "three: {N: 40}\none: {}\ntwo:"))
    (project / "figures/embedded/index.html").unlink()
    run = make(project, "reproduce", "ONLY=three,one")
    assert run.returncode != 0
    assert executed(run.stdout) == ["three", "one"]
    assert "three FAILED" in run.stdout and "cell 2 of notebooks/three.ipynb" in run.stdout
    assert "ValueError: N too large" in run.stdout and "raise ValueError('N too large')" in run.stdout
    assert "failed: three" in run.stdout and "failed: one" not in run.stdout
    assert done(project, "three.failed").is_file() and (project / "figures/embedded/index.html").is_file()
    profile.write_text(good)
    run = make(project, "reproduce", "ONLY=three")
    assert run.returncode == 0 and executed(run.stdout) == ["three"] and not done(project, "three.failed").exists()


def test_fresh_keeps_the_old_measurements(project):
    run = make(project, "reproduce", "FRESH=1", "ONLY=one")
    assert run.returncode == 0 and executed(run.stdout) == ["one"]
    (aside,) = (project / "build").glob("results.*")
    assert (aside / "measured.json").is_file() and not (project / "build/results").exists()


def test_killed_and_started_again(project):
    write_notebook(project / "notebooks/two.ipynb", "", "import time\n(Path(OUT) / 'begun').touch()\ntime.sleep(60)")
    before = done(project, "two").read_bytes()
    command = ["make", f"PY={sys.executable}", "STAMP=stamp", "reproduce"]
    running = subprocess.Popen(command, cwd=project, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (project / "figures/embedded/begun").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert (project / "figures/embedded/begun").exists()
    assert done(project, "two").read_bytes() == before  # nothing half-made stands for it
    write_notebook(project / "notebooks/two.ipynb", *CELLS["two"])
    run = make(project, "reproduce")
    assert run.returncode == 0 and executed(run.stdout) == ["two"]
    assert not list((project / "build/notebooks/embedded").glob(".*.ipynb"))


def test_a_terminated_make_takes_its_notebooks_with_it(project):
    """A kernel that goes on would hold the clock, and measure what nobody waits for."""
    code = "import os, time\npart = Path(OUT) / 'part'\npart.write_text(str(os.getpid()))\n"
    code += "part.rename(Path(OUT) / 'kernel')\ntime.sleep(120)"
    write_notebook(project / "notebooks/two.ipynb", "", code)
    command = ["make", f"PY={sys.executable}", "STAMP=stamp", "reproduce", "ONLY=two"]
    running = subprocess.Popen(command, cwd=project, start_new_session=True, stdout=subprocess.DEVNULL)
    kernel = project / "figures/embedded/kernel"
    deadline = time.monotonic() + 60
    while not kernel.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.terminate()
    assert running.wait(timeout=60) != 0
    assert all_end([int(kernel.read_text())])


def refusal(project: Path, only: str = "", profile: str = "embedded", pairs=()) -> str:
    with pytest.raises(SystemExit) as stopped:
        path = project / f"notebooks/profiles/{profile}.yaml"
        run.plan(path, project / "build/refused", only, run.read_overrides(pairs))
    assert not (project / "build/refused").exists()
    return str(stopped.value)


def test_unknown_names_say_what_is_allowed(project):
    assert refusal(project, profile="papre") == "no profile 'papre'; PROFILE is one of: embedded, smoke"
    assert refusal(project, "fig99").endswith("it has: one, two, three")
    assert "nowhere is not a directory" in refusal(project, pairs=["DATA_DIR=nowhere"])
    assert "no parameter 'MODEL'; there are: N, OUT, PROFILE" in refusal(project, "three", pairs=["MODEL=x"])
    failed = make(project, "reproduce", "PROFILE=papre")
    assert failed.returncode != 0 and "PROFILE is one of" in failed.stdout and "Traceback" not in failed.stdout


@pytest.mark.parametrize(("old", "new"), [("three: {N: 4}", "three: {M: 4}"), ("OUT:", "OUTT:")])
def test_misspelled_parameters_in_a_profile_are_refused(project, old, new):
    profile = project / "notebooks/profiles/embedded.yaml"
    profile.write_text(profile.read_text().replace(old, new))
    assert "no parameter" in refusal(project) and "embedded.yaml" in refusal(project)


def test_threads_and_offline(project):
    code = "import os\nfor k in ('OMP_WAIT_POLICY', 'OMP_NUM_THREADS', 'HF_HUB_OFFLINE'):\n    print(k, os.getenv(k))"
    write_notebook(project / "notebooks/one.ipynb", 'MODEL = "tiny"\n', code)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    output = make(project, "reproduce", "ONLY=one").stdout
    assert "OMP_WAIT_POLICY PASSIVE" in output and "HF_HUB_OFFLINE 1" in output
    assert f"OMP_NUM_THREADS {cores}" in output
    output = make(project, f"-j{2 * cores}", "reproduce", "ONLY=one,two", "MODEL=some/model").stdout
    assert f"OMP_NUM_THREADS {max(1, cores // 2)}\n" in output and "HF_HUB_OFFLINE None" in output


def test_smoke_and_clean(project):
    assert executed(make(project, "smoke", "ONLY=one").stdout) == ["one"]
    assert (project / "figures/smoke/one.csv").is_file()

    assert make(project, "clean").returncode == 0
    assert [p.name for p in (project / "build").iterdir()] == ["results"]
    make(project, "clean", "CLEAN_RESULTS=1")
    assert not list((project / "build").iterdir())


def test_study_takes_paths_from_where_it_is_typed_and_limits_as_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("text")
    given = run.read_overrides(
        ["CALIBRATION=own.txt", "OUT=here", "SPEEDUP=1.2", "KV=.7", "BATCH=8", "TASKS=piqa,boolq"]
    )
    assert given == {
        "CALIBRATION": str(tmp_path / "own.txt"),
        "OUT": str(tmp_path / "here"),
        "SPEEDUP": 1.2,
        "KV": 0.7,
        "BATCH": 8,
        "TASKS": ["piqa", "boolq"],
    }
    assert run.read_overrides(["CALIBRATION=xsum", "MODEL=some/model"]) == {
        "CALIBRATION": "xsum",
        "MODEL": "some/model",
    }
    command = ["make", "-n", "STAMP=notebooks/run.py", "study", "MODEL=some/model/", "KV=0.7", "MAX_LOSS=.1"]
    recipe = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True).stdout
    assert "llmdrop_cli study 'some/model/' --max-loss '.1' --kv '0.7'" in " ".join(recipe.split())


def test_setup_says_what_is_missing(project):
    (project / "stamp").unlink()
    python = project / "python3"
    for body, says in (
        ('[ "$1" = -V ] && echo Python 3.8.1; exit 1', "needs Python 3.10 or later, found: Python 3.8.1"),
        ('case "$*" in *ensurepip*) exit 1;; *-V*) echo Python 3.11.2;; esac', "apt install python3-venv"),
    ):
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        run = make(project, "setup", f"PYTHON3={python}", f"VENV={project / 'venv'}", f"PY={project}/venv/bin/python")
        assert run.returncode != 0 and says in run.stdout
