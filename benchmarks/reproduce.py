"""What `make reproduce` costs: this tree beside another revision, by notebook and by kind of work, with equal numbers.

    .venv/bin/python benchmarks/reproduce.py HEAD~20 [--profile smoke] [--only quickstart] [--jobs 2]

Both run in clones of their own (this one with what is changed but not committed; files that git does not know are left
out), one after the other, in the Python that runs this, with empty stores; the converted model and data are those of
this tree, as hard links. Seconds of CPU count all processes and threads of a notebook; other programs on the machine
hardly change them, and change the wall clock as they like. Kinds are exclusive: what is read or digested within a
measurement counts once. Measurements with the same key in both stores must have the same value.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("timing", "serving", "hardware")  # kinds in the store that the clock decides: no two runs give the same
# what an IPython of ours runs before its first cell
STARTUP = """
import sys
sys.path.insert(0, {benchmarks!r})
import reproduce
sys.path.remove({benchmarks!r})
reproduce.watch(get_ipython(), {folder!r})
del sys, reproduce
"""


def cpu_seconds() -> float:
    """CPU seconds of this process, and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# ---- in the kernels


class Clock:
    """CPU seconds by kind of work, each second counted for the innermost kind that is at work."""

    def __init__(self, kind: str):
        self.seconds: Counter[str] = Counter()
        self.kinds = [kind]  # at work, the innermost last
        self.charged = 0.0  # seconds of this process that are counted

    def charge(self) -> None:
        now = cpu_seconds()
        self.seconds[self.kinds[-1]] += now - self.charged
        self.charged = now

    @contextmanager
    def working(self, kind: str) -> Iterator[None]:
        self.charge()
        self.kinds.append(kind)
        try:
            yield
        finally:
            self.charge()
            self.kinds.pop()


def watch(shell, folder: str) -> None:
    """Have an IPython shell write what it spends by kind to <folder>/<process id>.json, after every cell."""
    clock = Clock("start, imports")
    file = Path(folder) / f"{os.getpid()}.json"

    def after_cell(result) -> None:
        clock.charge()
        if clock.kinds == ["start, imports"]:  # the first cell imports
            clock.kinds = ["drawing, all else"]
            try:
                count_calls(clock)
            except ImportError:  # a revision with other names; an error here would count as its notebook's
                clock.kinds = ["all but start, imports"]
        file.write_text(json.dumps(clock.seconds))

    shell.events.register("post_run_cell", after_cell)


def count_calls(clock: Clock) -> None:
    """Count what loads, digests and measures apart, wherever its name was imported to."""
    import llmdrop
    from llmdrop.repro.experiment import load_experiment

    get_many = llmdrop.Store.get_many

    def measured(store, kind, *arguments, **settings):
        with clock.working(f"store: {kind}"):
            return get_many(store, kind, *arguments, **settings)

    llmdrop.Store.get_many = measured
    kinds = {llmdrop.weights_digest: "digest", llmdrop.load_model: "load", load_experiment: "load"}
    apart = {function: counted(clock, kind, function) for function, kind in kinds.items()}
    for module_name, module in list(sys.modules.items()):
        if module_name == "__main__" or module_name.partition(".")[0] == "llmdrop":
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in apart:
                    setattr(module, name, apart[value])


def counted(clock: Clock, kind: str, function: Callable) -> Callable:
    def call(*arguments, **settings):
        with clock.working(kind):
            return function(*arguments, **settings)

    return call


# ---- around the programs that make starts


def timed(log: Path, command: list[str]) -> int:
    """Run a command, append what it took to the log, and return its exit status."""
    start = time.monotonic()
    status = subprocess.run(command).returncode
    of_command = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = {
        "command": command[1:],
        "cpu": of_command.ru_utime + of_command.ru_stime,
        "wall": time.monotonic() - start,
        "peak_gb": of_command.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,  # of its largest process
    }
    with log.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    return status


# ---- the two runs


def git(*arguments: str, folder: Path | None = None) -> str:
    command = ["git", "-C", folder or ROOT, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def prepare(revision: str, folder: Path) -> None:
    """A clone of this repository at a revision, with the model and data that this tree has converted."""
    git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(folder))
    git("checkout", "--quiet", "--detach", revision, folder=folder)
    build = Path(os.environ.get("LLMDROP_BUILD") or ROOT / "build").resolve()
    for name in ("models", "data"):
        if not (build / name).exists():
            sys.exit(
                f"{build / name} is not there; run `make reproduce PROFILE=smoke ONLY=quickstart` once, then again"
            )
        shutil.copytree(build / name, folder / "build" / name, copy_function=link)


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def reproduce(folder: Path, arguments: list[str]) -> dict:
    """What make took in a clone: cpu, wall and status; of each notebook under "notebooks", by kind under "kinds"."""
    log = folder / "log.jsonl"
    startup = folder / "ipython/profile_default/startup"
    kernels = folder / "kernels"
    startup.mkdir(parents=True)
    kernels.mkdir()
    log.touch()
    (startup / "watch.py").write_text(STARTUP.format(benchmarks=str(Path(__file__).parent), folder=str(kernels)))
    (folder / "stamp").touch()  # the environment is made: newer than pyproject.toml
    python = f"{sys.executable} {__file__} --timed {log} {sys.executable}"
    command = ["make", "reproduce", f"PY={python}", "STAMP=stamp", *arguments]
    environment = os.environ | {"LLMDROP_BUILD": str(folder / "build"), "IPYTHONDIR": str(folder / "ipython")}
    start = time.monotonic()
    before = cpu_seconds()
    status = subprocess.run(command, cwd=folder, env=environment).returncode
    took = {"cpu": cpu_seconds() - before, "wall": time.monotonic() - start, "status": status, "notebooks": {}}
    costs = [json.loads(line) for file in folder.glob("build/notebooks/*/costs.jsonl") for line in file.open()]
    of_notebooks = {cost.pop("notebook"): cost for cost in costs}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        script, what, *others = record["command"]
        if what == "all":  # starts the notebooks
            record["cpu"] -= sum(cost["cpu"] for cost in of_notebooks.values())
            took["notebooks"] |= of_notebooks
        name = Path(others[0]).stem if what == "run" else what if what in ("plan", "all") else Path(script).stem
        took["notebooks"][name] = record
    kinds: Counter[str] = Counter()
    for file in kernels.glob("*.json"):
        kinds.update(json.loads(file.read_text()))
    kinds["papermill, make, report"] = took["cpu"] - kinds.total()
    return took | {"kinds": kinds}


def compare(before: Path, now: Path) -> str:
    """How many measurements two stores share, and which of these differ."""
    stores = []
    for folder in (before, now):
        files = [file for file in (folder / "build/results").glob("*/*.json") if file.parent.name not in TIMED]
        stores.append({f"{file.parent.name}/{file.name}": json.loads(file.read_text())["value"] for file in files})
    both = stores[0].keys() & stores[1].keys()
    differing = sorted(name for name in both if stores[0][name] != stores[1][name])
    alone = [len(store) - len(both) for store in stores]
    summary = f"{len(both)} measurements under equal keys, {len(differing)} of them with other values; "
    return (
        summary + f"{alone[0]} only before, {alone[1]} only now" + "".join(f"\n  differs: {name}" for name in differing)
    )


def table(title: str, before: dict[str, float], now: dict[str, float]) -> str:
    """Lines of both, with their ratio; in the order of `before`."""
    lines = [f"{title:32} {'before':>9} {'now':>9} {'now / before':>13}"]
    for name in dict.fromkeys([*before, *now]):
        values = [side.get(name) for side in (before, now)]
        shown = ["–" if value is None else f"{value:.1f}" for value in values]
        ratio = f"{values[1] / values[0]:.2f}" if all(values) else "–"
        lines.append(f"{name:32} {shown[0]:>9} {shown[1]:>9} {ratio:>13}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", help="the other revision: a commit, branch or tag")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--only", default="", help="notebooks whose names start so, by comma")
    parser.add_argument("--jobs", help="notebooks at a time")
    args = parser.parse_args()
    arguments = [f"PROFILE={args.profile}", f"ONLY={args.only}", *([f"JOBS={args.jobs}"] if args.jobs else [])]
    changed = git("-c", "user.name=benchmark", "-c", "user.email=benchmark", "stash", "create")  # "" without changes
    revisions = {"before": git("rev-parse", args.against), "now": changed or git("rev-parse", "HEAD")}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in revisions}
        for name, revision in revisions.items():
            prepare(revision, folders[name])
        took = {name: reproduce(folder, arguments) for name, folder in folders.items()}
        before, now = took.values()
        print(f"\nbefore: {revisions['before'][:12]}; now: {revisions['now'][:12]}; {' '.join(arguments)}")
        for column, title in (
            ("cpu", "CPU seconds"),
            ("wall", "seconds of wall clock"),
            ("peak_gb", "largest process, GB"),
        ):
            sides = [{name: record[column] for name, record in side["notebooks"].items()} for side in (before, now)]
            if column in before:
                for side, of_notebooks in zip((before, now), sides, strict=True):
                    of_notebooks["in all"] = side[column]
            print("\n" + table(title, *sides))
        print("\n" + table("CPU seconds by kind", before["kinds"], now["kinds"]))
        print("\n" + compare(*folders.values()))
    return max(before["status"], now["status"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        sys.exit(timed(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
