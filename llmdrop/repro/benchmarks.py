"""How the paper's benchmarks are asked: how many questions of each, by which metric, with how many examples."""

from collections.abc import Sequence

import pandas as pd

from ..evaluation.tasks import Data, Shots, load_tasks, unread
from .statistics import above_unread, headline


def limit_per_part(task: str, limit: int | None, data_dir: Data = None) -> int | None:
    """The limit of each part of a task with which about `limit` questions are asked in all, at least 2 of each part.

    MMLU is 57 subjects where a mirror or the hub has them, and lm-eval limits each of them.
    """
    if limit is None or task != "mmlu":
        return limit
    n_parts = len(load_tasks([task], data_dir, num_fewshot=0)[task])
    return max(2, limit // n_parts)


def above_guessing(rows: pd.DataFrame, baseline: str, tasks: Sequence[str], data_dir: Data = None) -> list[str]:
    """The tasks that the whole model answers better than could be done without reading the questions.

    That is, where the 95 % interval of its chance-corrected accuracy is above 0. The others are shown, never judged.
    """
    return [task for task in tasks if above_unread(rows, baseline, task, unread(task, data_dir)).low > 0]


def settings(
    rows: pd.DataFrame, tasks: Sequence[str], data_dir: Data = None, num_fewshot: Shots = None
) -> pd.DataFrame:
    """What was asked, a row a task, read back from lm-eval's own tasks: num_fewshot, metric, n (questions), version.

    rows: from `quality`, with these settings. metric: the one that tables show, without the name of a filter.
    """
    shown = headline(rows)
    table = {}
    for task, parts in load_tasks(tasks, data_dir, num_fewshot).items():
        answers = shown[shown["where"] == task]
        first = next(iter(parts.values()))
        table[task] = {
            "num_fewshot": first.config.num_fewshot or 0,
            "metric": answers["metric"].iloc[0].split(",")[0],
            "n": answers["item"].nunique(),
            "version": str(first.VERSION),
        }
    return pd.DataFrame(table).T
