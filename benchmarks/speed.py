"""Measured over predicted speedup of every row, in one run, with the settings of the `speedups` notebook.

    .venv/bin/python benchmarks/speed.py [--profile embedded|geometry] [--model NAME,NAME] [--fresh]

Both come out of the results store, so that the numbers are the notebook's; --fresh measures again, in a store of its
own that is thrown away. The prediction takes this machine's bandwidth and FLOP rate, measured in the same run. Goal on
CUDA: every ratio of compiled decoding at least 0.95, every spread below 0.03.
"""

import argparse
import ast
import json
import tempfile
from pathlib import Path

import yaml

import llmdrop
from llmdrop.repro import speedups

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def parameters(profile: str) -> dict:
    """The notebook's parameters under a profile."""
    cells = json.loads((NOTEBOOKS / "speedups.ipynb").read_text())["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    values = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}
    settings = yaml.safe_load((NOTEBOOKS / "profiles" / f"{profile}.yaml").read_text())
    given = settings["common"] | (settings.get("speedups") or {})
    return values | {name: value for name, value in given.items() if name in values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--model", help="instead of the profile's, by comma")
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    p = parameters(args.profile)
    names = ("prompt_len", "new_tokens", "timed_steps", "rounds", "cache", "decoding", "batch_sizes")
    settings = {name: p[name.upper()] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        store = llmdrop.Store(folder if args.fresh else None)
        models = (args.model or p["MODEL"]).split(",")
        rows, _, facts = speedups.measure_models(store, models, p["DTYPE"], p["DEVICE"], **settings)
    print(f"{facts['device']}, {p['DTYPE']}, torch {facts['torch']}, threads {facts['threads']}")
    print(f"{rows['bandwidth'].max() / 1e9:.3g} GB/s, {rows['rate'].max() / 1e12:.3g} TFLOP/s measured\n")
    columns = ["model", "decoding", "batch", "method", "status", "speedup", "limit", "ratio", "spread"]
    print(rows[columns].to_string(index=False, float_format="{:.3f}".format), end="\n\n")
    for (model, decoding), group in rows[rows["n_dropped"] > 0].groupby(["model", "decoding"], sort=False):
        low = group["ratio"].min()
        spread = group["spread"].max()
        print(f"{model}, {decoding}: measured / predicted at least {low:.3f}, spread at most {spread:.3f}")


if __name__ == "__main__":
    main()
