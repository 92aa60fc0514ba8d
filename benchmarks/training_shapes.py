"""Which small Llama learns most on this machine in equal time: the search behind the profile pretrain.

    .venv/bin/python benchmarks/training_shapes.py [--shapes 16x128x32x8 ...] [--minutes 8] [--out FILE.csv]

A shape is layers x width x head size x windows a step. Each is timed for some steps on one thread, then trained for as
many steps as take --minutes of one core, with the text and all else of the profile. The table says what
each reached on held-out text. Finished shapes are in the store.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import yaml

from llmdrop.files import write_atomic
from llmdrop.repro.training import (
    Recipe,
    model_to_train,
    new_model,
    new_optimizer,
    pretrain,
    train_step,
    training_batch,
)
from llmdrop.repro.training_text import TrainingText, load_training_text

PROFILE = Path(__file__).parents[1] / "notebooks" / "profiles" / "pretrain.yaml"
TIMED_STEPS = 8
SHAPES = ["16x128x32x8", "16x192x64x8", "16x256x64x8", "24x96x32x8", "16x128x32x4"]


def seconds_per_step(text: TrainingText, recipe: Recipe) -> float:
    """CPU seconds of one thread, median of some steps: other processes do not count."""
    model = model_to_train(text, recipe, 0, "cpu")
    optimizer = new_optimizer(model)
    seconds = []
    for step in range(TIMED_STEPS):
        ids = torch.from_numpy(training_batch(text.train, step, recipe.batch_size, 0))
        start = time.process_time()
        train_step(model, optimizer, ids, recipe, 1e-4)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    profile = yaml.safe_load(PROFILE.read_text())["fig07_checkpoints"]
    n_threads = torch.get_num_threads()
    rows = []
    text = load_training_text(**profile["TEXT"])
    for shape in args.shapes:
        n_layers, width, head_size, batch_size = map(int, shape.split("x"))
        row = {"n_layers": n_layers, "width": width, "head_size": head_size, "batch_size": batch_size}
        recipe = replace(Recipe(**profile["RECIPE"]), **row, n_checkpoints=2, n_late_checkpoints=0)
        torch.set_num_threads(1)
        steps = round(60 * args.minutes / seconds_per_step(text, recipe))
        torch.set_num_threads(n_threads)
        last = pretrain(text, replace(recipe, steps=steps)).curve.iloc[-1]
        row["million parameters"] = sum(weight.numel() for weight in new_model(text, recipe, 0).parameters()) / 1e6
        row |= {"million tokens": last["tokens"] / 1e6, "loss": last["valid_loss"], "stderr": last["valid_stderr"]}
        rows.append(row)
        print(row, flush=True)
    table = pd.DataFrame(rows).sort_values("loss").round(3)
    print(table.to_string(index=False))
    if args.out:
        write_atomic({args.out: table.to_csv(index=False)})


if __name__ == "__main__":
    main()
