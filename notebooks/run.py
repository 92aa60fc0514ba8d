"""What the Makefile calls: `plan` checks a profile and says what it will need, `all` executes its notebooks, `run` one.

A profile (profiles/<name>.yaml) has `about` (one line), `needs` (minutes, disk_gb, download_gb, gpu_gb by notebook),
`common` (parameters for every notebook that has them), and under a notebook's name the parameters of that notebook;
SETTINGS of both are put together, what the notebook says itself on top.
It runs the notebooks it names, in its order (several at a time: the longest first), where they, the library or their
parameters changed since the last run.

To import PyTorch and what else a notebook needs takes longer than most notebooks do without measuring. So `all` imports
it once, and each notebook runs in a copy of that process (a fork), as does its kernel: they share the modules, and
nothing that they change. Where a copy is not safe (PyTorch with CUDA, macOS), every notebook starts from nothing.
"""

import argparse
import ast
import asyncio
import atexit
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import yaml
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import LocalProvisioner

sys.modules["rfc3987_syntax"] = None  # jsonschema's grammar of IRIs: a second to import, and notebooks have none
import papermill  # noqa: E402

SECTIONS = ("about", "common", "needs")  # of a profile; every other name in it is a notebook
NEEDS = ["minutes", "disk_gb", "download_gb", "gpu_gb"]
KEPT = "what has been measured is kept"
IMPORTED_LATER = ("lm_eval.tasks", "scipy.stats", "seaborn")  # by the library, where most notebooks get to


class OwnKernel(AsyncKernelManager):
    """The interpreter that runs this file, whatever is called python3 on JUPYTER_PATH."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


class Copy(multiprocessing.get_context("fork").Process):
    """A copy of this process that becomes a kernel when it is told how: what jupyter_client needs of a Popen."""

    stdin = stdout = stderr = None

    def __init__(self):
        waits, self.tells = multiprocessing.Pipe(duplex=False)
        super().__init__(target=become_kernel, args=(waits, self.tells))

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def become_kernel(waits: Connection, tells: Connection) -> None:
    """Wait for a kernel's command line, environment and folder, then be that kernel."""
    tells.close()  # the other end of a pipe that the copy has, too
    try:
        command, environment, folder = waits.recv()
    except EOFError:  # no kernel is needed
        return
    os.setsid()  # what interrupts the notebook is for the kernel's manager to pass on
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from ipykernel.kernelapp import IPKernelApp

    asyncio.set_event_loop(asyncio.new_event_loop())
    arguments = [*command[command.index("-f") :], f"--IPKernelApp.parent_handle={os.getppid()}"]
    IPKernelApp.launch_instance(argv=arguments)
    atexit._run_exitfuncs()  # which processes of multiprocessing leave out


class CopyingProvisioner(LocalProvisioner):
    """Has a copy of this process be the kernel."""

    waiting: Copy  # made before there were threads and sockets to copy

    async def launch_kernel(self, cmd: list[str], **kwargs) -> dict:
        self.process = self.waiting
        self.process.tells.send((cmd, kwargs["env"], kwargs.get("cwd") or os.getcwd()))
        self.pid = self.process.pid
        return self.connection_info


class CopiedKernel(OwnKernel):
    """`OwnKernel` in a copy of this process."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.provisioner = CopyingProvisioner(kernel_spec=self.kernel_spec, parent=self)


def refuse_unknown(names, allowed, where: str) -> None:
    """papermill only warns about a misspelled parameter; here it ends the run."""
    for name in names:
        if name not in allowed:
            sys.exit(f"{where}: no parameter {name!r}; there are: {', '.join(sorted(allowed))}")


def read_overrides(pairs: list[str]) -> dict:
    """["MODEL=x", "LIMIT=8", "DEVICE="] -> {"MODEL": "x", "LIMIT": 8}: empty means not given, paths become absolute."""
    given = {name: value for name, value in (pair.split("=", 1) for pair in pairs) if value}
    for name, value in given.items():  # a notebook runs in notebooks/, the path was typed somewhere else
        is_path = name == "OUT" or (name == "DATA_DIR" and value != "hub")
        if is_path or (name in ("MODEL", "CALIBRATION") and Path(value).expanduser().exists()):
            given[name] = str(Path(value).expanduser().resolve())
        if name == "DATA_DIR" and value != "hub" and not Path(given[name]).is_dir():
            sys.exit(f"DATA_DIR={value} is not a directory; it holds <dataset>/<config>/<split>.jsonl, or is 'hub'")
    return {name: read_value(name, value) for name, value in given.items()}


def read_value(name: str, value: str) -> int | float | str | list:
    """A number where it is one, a list for TASKS=piqa,boolq."""
    if name == "TASKS":
        return value.split(",")
    if value.isdigit():
        return int(value)
    return float(value) if re.fullmatch(r"\d*\.\d+", value) else value


def read_profile(path: Path) -> tuple[dict, dict, dict]:
    """(the profile, {notebook: its parameters here}, {notebook: names of all its parameters}), every name checked."""
    if not path.is_file():
        allowed = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        sys.exit(f"no profile {path.stem!r}; PROFILE is one of: {allowed}")
    profile = {name: value or {} for name, value in yaml.safe_load(path.read_text()).items()}
    known = {}
    for name in (name for name in profile if name not in SECTIONS):
        if (notebook := path.parent.parent / f"{name}.ipynb").is_file():
            known[name] = set(papermill.inspect_notebook(str(notebook)))
    if absent := [name for name in profile if name not in (*SECTIONS, *known)]:
        print(f"{path}: skipped, for there is no such notebook: {', '.join(absent)}", file=sys.stderr)
    common = profile.get("common", {})
    refuse_unknown(common, set().union(*known.values()), f"{path}, common")
    for name in known:
        refuse_unknown(profile[name], known[name], f"{path}, {name}")
    return profile, {name: together(common, profile[name], known[name]) for name in known}, known


def together(common: dict, own: dict, known: set[str]) -> dict:
    """The parameters of one notebook: its own, and the common ones that it has; SETTINGS are put together by name."""
    values = {name: value for name, value in common.items() if name in known} | own
    if "SETTINGS" in values:
        values["SETTINGS"] = common.get("SETTINGS", {}) | own.get("SETTINGS", {})
    return values


def announce(profile: dict, name: str, chosen: list[str]) -> None:
    """Print the time, disk, downloads and GPU memory that the chosen notebooks need at most."""
    import pandas as pd  # which running a notebook does not need

    needs = pd.DataFrame({n: profile.get("needs", {}).get(n, {}) for n in chosen}, index=NEEDS).T.astype(float)
    needs.loc["in all"] = needs.agg({column: "max" if column == "gpu_gb" else "sum" for column in NEEDS})
    text = needs.to_string(na_rep="?", float_format="{:.3g}".format)
    free = shutil.disk_usage(".").free / 1e9
    enough = "" if free > needs.loc["in all", "disk_gb"] else ", NOT ENOUGH"
    print(f"\nprofile {name}: {profile.get('about', '')}\n\n{text}\n\nfree disk: {free:.0f} GB{enough}; "
          "what the results store already holds is not measured again\n", flush=True)  # fmt: skip


def plan(path: Path, done: Path, only: str, overrides: dict) -> None:
    """Choose and check the notebooks; write <done>/selected and, where changed, <done>/<notebook>.params.json."""
    profile, parameters, known = read_profile(path)
    prefixes = only.replace(",", " ").split() or [""]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in known):
            sys.exit(f"ONLY={prefix}: no such notebook in profile {path.stem}; it has: {', '.join(known)}")
    chosen = [name for name in known if name.startswith(tuple(prefixes))]
    refuse_unknown(overrides, set().union(*(known[name] for name in chosen)), "override")
    done.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        values = parameters[name] | {k: v for k, v in overrides.items() if k in known[name]}
        file, text = done / f"{name}.params.json", json.dumps(values, indent=1) + "\n"
        if not file.is_file() or file.read_text() != text:  # an unchanged file keeps its time: nothing to make again
            file.write_text(text)
        if not (path.parent.parent / values.get("OUT", ".")).is_dir():  # its figures are gone, so it must run again
            (done / f"{name}.ipynb").unlink(missing_ok=True)
    (done / "selected").write_text("\n".join(chosen) + "\n")
    announce(profile, path.stem, chosen)


def run(source: Path, target: Path, values: dict, label: str, kernel: type[OwnKernel] = OwnKernel) -> int:
    """Execute `source` in its own folder into `target`, by a temporary name; a failed copy is <name>.failed.ipynb."""
    refuse_unknown(values, papermill.inspect_notebook(str(source)), str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, failed = target.with_name(f".{target.name}"), target.with_suffix(".failed.ipynb")
    print(f"{label} …", flush=True)
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            source, temporary, values, kernel_name="python3", kernel_manager_class=kernel, cwd=source.parent,
            progress_bar=False,
            stdout_file=sys.stdout, stderr_file=sys.stderr, extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )  # fmt: skip
    except Exception as error:  # whatever went wrong: name the notebook and the cell, and let make go on with the rest
        message = f"  {type(error).__name__}: {error}"
        if isinstance(error, papermill.PapermillExecutionError):
            cells = papermill.iorw.load_notebook_node(str(source)).cells
            index = next((i for i, cell in enumerate(cells) if cell.source == error.source), error.cell_index)
            code = "".join(f"    {line}\n" for line in error.source.splitlines())
            if error.ename == "FileNotFoundError":  # a model or data that cannot be had: the code is not to blame
                code = ""
            message = f"  cell {index} of {source}:\n{code}  {error.ename}: {error.evalue}"
        if temporary.exists():
            os.replace(temporary, failed)
            message += f"\n  the whole traceback: {failed}"
        print(f"\n{label} FAILED after {time.monotonic() - start:.0f} s\n{message}", file=sys.stderr)
        return 1
    os.replace(temporary, target)
    failed.unlink(missing_ok=True)
    print(f"{label}  {time.monotonic() - start:.0f} s", flush=True)
    return 0


# ---- all notebooks of a profile


def changed(names: list[str], profile: Path, folder: Path, stamp: Path) -> list[str]:
    """The notebooks that do not stand executed in `folder`, newer than all that they are made from."""
    library = [
        path for path in Path("llmdrop").rglob("*") if path.suffix in (".py", ".mplstyle", ".csv", ".json", ".yaml")
    ]
    of_all = [profile, Path(__file__), stamp, *library]
    since = max(path.stat().st_mtime for path in of_all)
    out = []
    for name in names:
        target = folder / f"{name}.ipynb"
        sources = (profile.parent.parent / f"{name}.ipynb", folder / f"{name}.params.json")
        newest = max(since, *(path.stat().st_mtime for path in sources))
        if not target.is_file() or target.stat().st_mtime < newest:
            out.append(name)
    return out


def import_for(sources: list[Path]) -> bool:
    """Import what the notebooks do; whether this process may now be copied."""
    if sys.platform != "linux":
        return False
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # a kernel's, which is asked for but once
    imported = {}
    for source in sources:
        for cell in papermill.iorw.load_notebook_node(str(source)).cells:
            with suppress(SyntaxError):  # text, or a cell with commands of IPython
                found = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Import | ast.ImportFrom)]
                imported |= {ast.unparse(node): None for node in found}
    is_ours = any("llmdrop.repro" in statement for statement in imported)
    if is_ours:
        with suppress(ImportError):
            importlib.import_module("torch")  # first: where it has CUDA, the rest would be imported for nothing
    if has_gpu_build():
        return False
    for statement in imported:
        with suppress(Exception):  # which is the notebook's to say
            exec(statement, {})
    if is_ours:
        for name in IMPORTED_LATER:
            with suppress(ImportError):
                importlib.import_module(name)
    return not has_gpu_build()


def has_gpu_build() -> bool:
    """Whether a PyTorch is imported that can hold a GPU, which a copy of the process could not use."""
    torch = sys.modules.get("torch")
    return torch is not None and not (torch.version.cuda is None and torch.version.hip is None)


def run_all(path: Path, folder: Path, stamp: Path, jobs: int) -> int:
    """Execute the notebooks chosen by `plan` that have changed, so many at a time; costs go to <folder>/costs.jsonl.

    Returns 0 where all ended well. One that fails stops no other.
    """
    parent = os.getppid()
    chosen = (folder / "selected").read_text().split()
    share_cores(min(jobs, len(chosen)))
    waiting = changed(chosen, path, folder, stamp)
    if jobs > 1:  # the longest first, or the last one would run alone
        needs = yaml.safe_load(path.read_text()).get("needs") or {}
        waiting.sort(key=lambda name: needs.get(name, {}).get("minutes", 0), reverse=True)
    notebooks = path.parent.parent
    is_copied = bool(waiting) and import_for([notebooks / f"{name}.ipynb" for name in waiting])
    running: dict[int, tuple[str, float]] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                files = (notebooks / f"{name}.ipynb", folder / f"{name}.ipynb", folder / f"{name}.params.json")
                label = f"[{chosen.index(name) + 1}/{len(chosen)}] {name}"
                running[start(*files, label, is_copied)] = name, time.monotonic()
            process, status, used = wait_for_any(parent)
            name, since = running.pop(process)
            cost = {"notebook": name, "cpu": used.ru_utime + used.ru_stime, "wall": time.monotonic() - since}
            cost["peak_gb"] = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
            with (folder / "costs.jsonl").open("a") as lines:
                lines.write(json.dumps(cost) + "\n")
            if status:
                failed.append(name)
    finally:
        for process in running:
            os.kill(process, signal.SIGTERM)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return bool(failed)


def wait_for_any(parent: int) -> tuple:
    """(Id, status, resources used) of a notebook's process, once one has ended; ends this one where its parent has."""
    while os.getppid() == parent:  # make's shell dies without a word to what it runs
        process, status, used = os.wait4(-1, os.WNOHANG)
        if process:
            return process, status, used
        time.sleep(0.1)
    sys.exit(f"terminated; {KEPT}")


def start(source: Path, target: Path, params: Path, label: str, is_copied: bool) -> int:
    """Begin to execute a notebook in a process of its own; returns its id."""
    if not is_copied:
        command = [sys.executable, __file__, "run", source, target, "--params", params, "--label", label]
        return os.spawnv(os.P_NOWAIT, sys.executable, [str(part) for part in command])
    sys.stdout.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        CopyingProvisioner.waiting = Copy()
        CopyingProvisioner.waiting.start()
        status = run(source, target, json.loads(params.read_text()), label, CopiedKernel)
    except SystemExit as refused:
        print(refused, file=sys.stderr)
    except Exception:
        traceback.print_exc()
    finally:  # on an interruption, too: what called this is not for the copy to go back to
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def share_cores(jobs: int) -> None:
    """Give each of so many notebooks its share of the cores, unless the environment says how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    os.environ.pop("MPLBACKEND", None)  # where it names a backend without a screen, a kernel shows no figures
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() and jobs == 1 else "15")


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["plan", "all", "run"])
    parser.add_argument("source", type=Path, help="plan, all: a profile; run: a notebook")
    parser.add_argument(
        "target", type=Path, help="plan, all: the folder of executed notebooks; run: the executed notebook"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override a parameter")
    parser.add_argument("--only", default="", help="plan: the notebooks whose names start so, by comma")
    parser.add_argument("--stamp", type=Path, help="all: a file as old as the environment")
    parser.add_argument("--jobs", type=int, default=1, help="all: notebooks at a time, to share the cores")
    parser.add_argument("--params", type=Path, help="run: parameters from this JSON file")
    parser.add_argument("--label", help="run: what to call the notebook")
    args = parser.parse_args()
    overrides = read_overrides(args.set)
    if args.command == "plan":
        return plan(args.source, args.target, args.only, overrides)  # None: success
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"terminated; {KEPT}"))
    if args.command == "all":
        return run_all(args.source, args.target, args.stamp, args.jobs)
    share_cores(1)
    values = json.loads(args.params.read_text()) if args.params else {}
    return run(args.source, args.target, values | overrides, args.label or args.source.stem)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {KEPT}")
