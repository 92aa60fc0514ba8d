"""What the Makefile calls: `plan` checks a profile and says what it will need, `run` executes one notebook.

A profile (profiles/<name>.yaml) has `about` (one line), `needs` (minutes, disk_gb, download_gb, gpu_gb by notebook),
`common` (parameters for every notebook that has them), and under a notebook's name the parameters of that notebook;
SETTINGS of both are put together, what the notebook says itself on top.
It runs the notebooks it names, in its order.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import yaml
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

sys.modules["rfc3987_syntax"] = None  # jsonschema's grammar of IRIs: a second to import, and notebooks have none
import papermill  # noqa: E402

SECTIONS = ("about", "common", "needs")  # of a profile; every other name in it is a notebook
NEEDS = ["minutes", "disk_gb", "download_gb", "gpu_gb"]


class OwnKernel(AsyncKernelManager):
    """The interpreter that runs this file, whatever is called python3 on JUPYTER_PATH."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


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


def run(source: Path, target: Path, values: dict, label: str) -> int:
    """Execute `source` in its own folder into `target`, by a temporary name; a failed copy is <name>.failed.ipynb."""
    refuse_unknown(values, papermill.inspect_notebook(str(source)), str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, failed = target.with_name(f".{target.name}"), target.with_suffix(".failed.ipynb")
    print(f"{label} …", flush=True)
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            source, temporary, values, kernel_name="python3", kernel_manager_class=OwnKernel, cwd=source.parent,
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


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["plan", "run"])
    parser.add_argument("source", type=Path, help="plan: a profile; run: a notebook")
    parser.add_argument("target", type=Path, help="plan: the folder of executed notebooks; run: the executed notebook")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override a parameter")
    parser.add_argument("--only", default="", help="plan: the notebooks whose names start so, by comma")
    parser.add_argument("--params", type=Path, help="run: parameters from this JSON file")
    parser.add_argument("--among", default="", help="run: all the notebooks of this run, to count them")
    parser.add_argument("--jobs", type=int, default=1, help="run: notebooks at a time, to share the cores")
    args = parser.parse_args()
    overrides = read_overrides(args.set)
    if args.command == "plan":
        return plan(args.source, args.target, args.only, overrides)  # None: success
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // args.jobs)))
    os.environ.pop("MPLBACKEND", None)  # where it names a backend without a screen, a kernel shows no figures
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() and args.jobs == 1 else "15")
    among, name = args.among.split(), args.source.stem
    label = f"[{among.index(name) + 1}/{len(among)}] {name}" if name in among else name
    values = json.loads(args.params.read_text()) if args.params else {}
    return run(args.source, args.target, values | overrides, label)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; what has been measured is kept")
