"""Which small Llama learns most on this machine in equal time: the search behind the profile pretrain.

    .venv/bin/python benchmarks/training_shapes.py [--shapes 16x128x32x8 ...] [--minutes 8] [--jobs 2] [--out FOLDER]

A shape is layers x width x head size x windows a step. Each is timed for some steps on one thread, then trained for as
many steps as take --minutes of one core, with the text and all else of the profile. The table, fig07_shapes in --out,
says what each reached on held-out text. Finished shapes are in the store.
"""

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
import yaml

from llmdrop import Store
from llmdrop.repro import training
from llmdrop.repro.provenance import provenance
from llmdrop.repro.tables import save_table
from llmdrop.repro.training import Recipe, model_to_train, new_model, new_optimizer, pretrain, train_step
from llmdrop.repro.training_text import TrainingText, load_training_text

PROFILE = Path(__file__).parents[1] / "notebooks" / "profiles" / "pretrain.yaml"
TIMED_STEPS = 8
SHAPES = ["16x128x32x8", "16x192x64x8", "16x256x64x8", "24x96x32x8", "16x128x32x4"]
NAMES = {
    "n_layers": "Layers",
    "width": "Width",
    "head_size": "Head",
    "batch_size": "Windows a step",
    "parameters": "Parameters (M)",
    "tokens": "Tokens (M)",
    "loss": "Loss (nats)",
}


def seconds_per_step(text: TrainingText, recipe: Recipe) -> float:
    """CPU seconds of one thread, median of some steps: other processes do not count."""
    model = model_to_train(text, recipe, 0, "cpu")
    optimizer = new_optimizer(model)
    seconds = []
    for step in range(TIMED_STEPS):
        ids = torch.from_numpy(training.training_batch(text.train, step, recipe.batch_size, 0))
        start = time.process_time()
        train_step(model, optimizer, ids, recipe, 1e-4)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[2:])


def learned(shape: str, minutes: float, settings: dict, text: TrainingText) -> dict:
    """What a shape reaches in so many minutes of one core: a row of the table, from the store if it is there."""
    torch.set_num_threads(1)
    n_layers, width, head_size, batch_size = map(int, shape.split("x"))
    row = {"n_layers": n_layers, "width": width, "head_size": head_size, "batch_size": batch_size}
    recipe = replace(Recipe(**settings), **row, n_checkpoints=2, n_late_checkpoints=0)

    def compute() -> dict:
        steps = max(1, round(60 * minutes / seconds_per_step(text, recipe)))
        last = pretrain(text, replace(recipe, steps=steps)).curve.iloc[-1]
        n_parameters = sum(weight.numel() for weight in new_model(text, recipe, 0).parameters())
        half_width = 1.96 * last["valid_stderr"]
        return row | {
            "parameters": n_parameters / 1e6,
            "tokens": last["tokens"] / 1e6,
            "loss": last["valid_loss"],
            "loss_low": last["valid_loss"] - half_width,
            "loss_high": last["valid_loss"] + half_width,
        }

    key = asdict(recipe) | {"version": training.VERSION, "text": text.digest, "minutes": minutes}
    del key["steps"]  # as many as there is time for
    return Store().get("training-shapes", key, compute, f"{shape}-{minutes:g}-minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="shapes at a time, a thread each")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="whose text and recipe")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    profile = yaml.safe_load(args.profile.read_text())["fig07_checkpoints"]
    text = load_training_text(**profile["TEXT"])
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), training.die_with_parent) as pool:
        rows = pool.map(partial(learned, minutes=args.minutes, settings=profile["RECIPE"], text=text), args.shapes)
        table = pd.DataFrame(rows).sort_values("loss")
    print(table.round(3).to_string(index=False))
    if args.out:
        facts = provenance(None, minutes=args.minutes, profile=args.profile.stem)
        caption = f"""What Llamas of several shapes learn in {args.minutes:g} minutes of one core, with the text and the
        recipe of the profile {args.profile.stem}: loss on {profile["TEXT"]["n_valid"]} held-out windows of
        {profile["TEXT"]["seq_len"]} tokens, with 95 % intervals over windows (normal)."""
        options = {"names": NAMES, "digits": {"parameters": 2, "tokens": 2, "loss": 2}}
        save_table(table, "fig07_shapes", caption, args.out, facts, **options)


if __name__ == "__main__":
    main()
