"""A step of `make gpu` on a pretended GPU, small, in a process that has only what docs/gpu.md says the step wants.

python tests/gpu_step.py STEP MODULES MODEL DATA_DIR
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
BARE = {"torch", "transformers", "pandas", "yaml"}  # yaml comes with transformers
SIZES = {
    "speedups": {"TIMED": {"prompt_len": 8, "new_tokens": 2, "timed_steps": 2, "rounds": 2}, "DTYPE": "float32"},
    "fig07_checkpoints": {
        "TEXT": {"sources": ["xsum"], "vocabulary": 300, "seq_len": 32, "n_valid": 4},
        "RECIPE": {"n_layers": 2, "width": 32, "steps": 3, "batch_size": 4, "n_checkpoints": 2},
    },
    "quickstart": {"SETTINGS": {"n_samples": 2, "seq_len": 32, "held_out_samples": 2, "held_out_len": 16}},
}
SIZES["speedups"]["TIMED"] |= {"cache": "static", "decoding": "graph"}
SIZES["quickstart"] |= {"TIMED": {"batch_size": 1, "prompt_len": 8, "new_tokens": 2, "rounds": 2}, "ANSWER_LEN": 2}
OPTIONS = {
    "evaluation.py": ["--limit", "2", "--plans", "2", "--rounds", "1", "--batch-sizes", "2"],
    "scoring.py": ["--rounds", "1", "--seq-len", "32"],
}


@contextmanager
def small() -> Iterator[None]:
    """The models by shape and the settings of notebooks, made small."""
    import gpu

    from llmdrop.repro import speedups
    from llmdrop.speed.geometry import GEOMETRIES, Shape

    read = gpu.notebook_parameters

    def parameters(notebook: str, profile: str) -> dict:
        values = read(notebook, profile) | SIZES.get(notebook, {})
        if notebook == "speedups":
            values["BATCH_SIZES"] = dict.fromkeys(values["BATCH_SIZES"], 2)
        return values

    shapes = {name: Shape(shape.layers, 32, 4, 2, 8, 48, 97) for name, shape in GEOMETRIES.items()}
    with ExitStack() as undo:
        undo.enter_context(mock.patch.object(gpu, "notebook_parameters", parameters))
        undo.enter_context(mock.patch.object(speedups, "measure_hardware", lambda device, dtype: (2e10, 3e11)))
        undo.enter_context(mock.patch.dict(GEOMETRIES, shapes))
        yield


def run_here(command: list, **options) -> subprocess.CompletedProcess:
    """subprocess.run of a Python program, in this process: another would have other packages and no pretended GPU."""
    paths = options.get("env", os.environ).get("PYTHONPATH", "").split(os.pathsep)
    assert command[0] != sys.executable or str(ROOT) in paths, "the program could not import llmdrop"
    out = io.StringIO()
    arguments = [*command[1:], *OPTIONS.get(Path(command[1]).name, [])]
    its_own = mock.patch.dict(os.environ, options.get("env", {}))
    with its_own, mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(out):
        runpy.run_path(command[1], run_name="__main__")
    return subprocess.CompletedProcess(command, 0, out.getvalue(), "")


@contextmanager
def made_up_gradients() -> Iterator[None]:
    """The pretended GPU has none: every parameter of the newest model gets the same small one."""
    import torch

    from llmdrop.repro import training

    made = []
    new_model = training.new_model

    def remembered(*arguments):
        made.append(new_model(*arguments))
        return made[-1]

    def backward(loss) -> None:
        for parameter in made[-1].parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)

    with mock.patch.object(training, "new_model", remembered), mock.patch.object(torch.Tensor, "backward", backward):
        yield


def run_one_import_all(execute: Callable, notebook: str, parameters: dict) -> None:
    """The quickstart whole; of the other notebooks the first cell, with its imports, and those of questions."""
    import gpu

    import_module("llmdrop.evaluation.lm_eval_models")
    if notebook == "quickstart":
        execute(notebook, parameters)
        return
    cells = json.loads((gpu.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    source = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    exec(compile(source, notebook, "exec"), {})


def main(name: str, modules: str, model: str, data_dir: str) -> None:
    import bare

    bare.hide_all_but(BARE | set(filter(None, modules.split(","))))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu
    from device import pretended_gpus

    step = next(step for step in gpu.all_steps() if step.name == name)
    args = Namespace(device="cuda", model=model, data_dir=data_dir)
    with ExitStack() as undo:
        for change in (pretended_gpus(), small(), made_up_gradients()):
            undo.enter_context(change)
        undo.enter_context(mock.patch.object(subprocess, "run", run_here))
        undo.enter_context(mock.patch.object(gpu, "execute", partial(run_one_import_all, gpu.execute)))
        gpu.in_this_process(step, args)


if __name__ == "__main__":
    main(*sys.argv[1:])
