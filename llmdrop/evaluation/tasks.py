"""lm-eval's own task definitions, read offline from a mirror or the packaged data.

Prompts, targets, metrics, shots and versions stay lm-eval's; only where the rows come from changes. A task is a dict
of lm-eval tasks, of one entry but for MMLU, whose 57 subjects are averaged weighted by their size (see `pool`).
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..data.mirror import split_file
from ..data.rows import read_rows

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

# task name: lm-eval's definition
YAML = {
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "mmlu": "mmlu/default/mmlu_*.yaml",
    "logiqa": "logiqa/logiqa.yaml",
    "asdiv": "asdiv/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "rte": "glue/rte/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
FEWSHOT_SEED = 1234  # lm-eval's default
FUNCTION = "!function "  # how lm-eval's files name a Python function

Data = str | os.PathLike | None  # None, "hub" or a mirror: see `llmdrop.data`
Shots = int | Mapping[str, int] | None  # one number for all tasks, a number by task, or lm-eval's default


def load_tasks(
    names: Iterable[str], data_dir: Data = None, num_fewshot: Shots = None
) -> dict[str, dict[str, "ConfigurableTask"]]:
    """Build lm-eval tasks: {name: {lm-eval's task name: task}}; the inner dicts go into `lm_eval.evaluate`.

    data_dir: None (packaged data where there is some, else the hub), "hub" (lm-eval's own loading) or a mirror.
    num_fewshot: one number for all, or a dict by task name; None is lm-eval's default. Examples come from the split
    from which lm-eval takes them. mmlu is the group of 57 subjects where the mirror has them (and from the hub), else
    one zero-shot task on the packaged file, which names no subjects.

    Raises ValueError for an unknown task or for shots without examples, FileNotFoundError for data that is not there.
    """
    from lm_eval.api.task import ConfigurableTask

    tasks: dict[str, dict[str, ConfigurableTask]] = {}
    with quiet():
        for name in names:
            tasks[name] = {}
            for config, files in _definitions(name, data_dir, num_fewshot):
                task = ConfigurableTask(config=_resolved(config, files))
                task.set_fewshot_seed(FEWSHOT_SEED)
                tasks[name][config["task"]] = task
    return tasks


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's log lines and the progress bars of datasets.

    lm-eval warns about defaults that its own definitions rely on, and about being given a model instead of a name.
    """
    import datasets

    logger = logging.getLogger("lm_eval")
    with ExitStack() as undo:
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


def task_digest(name: str, data_dir: Data = None, num_fewshot: Shots = None) -> str:
    """sha256 of all that defines a task: its definition, the bytes of its data files, shots, lm-eval's version.

    Builds nothing. Rows from the hub enter by name only.
    """
    state = hashlib.sha256(f"lm_eval {importlib.metadata.version('lm_eval')} seed {FEWSHOT_SEED}".encode())
    for config, files in _definitions(name, data_dir, num_fewshot):
        state.update(json.dumps(config, sort_keys=True).encode())
        for module in sorted({_function(value)[0] for value in config.values() if _is_function(value)}):
            file = _tasks_dir().parent.parent / (module.replace(".", "/") + ".py")
            state.update(file.read_bytes())
        for split, file in files.items():
            state.update(split.encode() + (b"hub" if file is None else _file_digest(file, file.stat().st_mtime_ns)))
    return state.hexdigest()


def available_tasks(data_dir: Data = None) -> list[str]:
    """Names of the tasks that run with this data_dir; with None, those that need no hub."""
    names = []
    for name in YAML:
        try:
            definitions = _parts(name, data_dir, 0)
        except FileNotFoundError:
            continue
        if data_dir == "hub" or all(file for _, files in definitions for file in files.values()):
            names.append(name)
    return names


def right_choice(task: "ConfigurableTask", doc: dict) -> int | None:
    """Index of a question's right choice among `task.doc_to_choice(doc)`; None where there are none, or several right.

    lm-eval's tasks give it as an index or as the choice itself; WinoGrande, whose choices stand in the context, as its
    context.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(answer, str):
        return choices.index(answer) if answer in choices else None
    return answer if isinstance(answer, int) and 0 <= answer < len(choices) else None


def unread(name: str, data_dir: Data = None) -> float:
    """Share of a task's questions that are right without reading them: by the most common answer, or by a guess.

    Whichever is more. Answers are told apart by their text: of BoolQ's 0.62 are "yes", of the packaged MMLU's 0.26 one
    letter; where questions have choices of their own, a guess is all there is. A model whose interval reaches this
    share may know nothing. Raises as `load_tasks`.
    """
    answers: Counter[str] = Counter()
    guesses = []
    for task in load_tasks([name], data_dir, num_fewshot=0)[name].values():
        for doc in task.eval_docs:
            right = right_choice(task, doc)
            choices = task.doc_to_choice(doc) if right is not None else []
            answers[task.doc_to_target(doc) if right is None else choices[right]] += 1
            guesses.append(1 / len(choices) if choices else 0)
    return max(answers.most_common(1)[0][1], sum(guesses)) / len(guesses)


def pool(values: list[float], stderrs: list[float], sizes: list[int]) -> tuple[float, float]:
    """Mean and standard error over the parts of a task, weighted by size: lm-eval's rule for MMLU.

    The standard error is NaN where that of a part is.
    """
    if len(values) == 1:
        return values[0], stderrs[0]
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    mean = float(aggregate_subtask_metrics(values, sizes))
    return mean, nan if any(map(isnan, stderrs)) else float(pooled_sample_stderr(stderrs, sizes))


# ---- definitions, each with its files


def _definitions(name: str, data_dir: Data, num_fewshot: Shots) -> list[tuple[dict, dict[str, Path | None]]]:
    if name not in YAML:
        raise ValueError(
            f"unknown task {name!r}; with data_dir={data_dir!r} these run offline: "
            f"{', '.join(available_tasks(data_dir))}. With data_dir='hub' or a mirror that has them: {', '.join(YAML)}"
        )
    try:
        return _parts(name, data_dir, num_fewshot)
    except FileNotFoundError as error:
        ready = ", ".join(available_tasks(data_dir)) if data_dir == "hub" or Path(data_dir or ".").is_dir() else "none"
        raise FileNotFoundError(
            f"no data for task {name!r}: {error} Tasks that run with data_dir={data_dir!r}: {ready}"
        ) from error


def _parts(name: str, data_dir: Data, num_fewshot: Shots) -> list[tuple[dict, dict[str, Path | None]]]:
    """(definition, {split: its file, or None on the hub}) of each part of a task, with its shots and splits settled."""
    shots = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 0):
        raise ValueError(f"num_fewshot={shots!r} for {name}; give a number of examples, 0 or more")
    configs = [_load_yaml(file) for file in sorted(_tasks_dir().glob(YAML[name]))]
    if name == "mmlu" and data_dir != "hub" and not (data_dir and Path(data_dir, "cais/mmlu/anatomy").is_dir()):
        template = _load_yaml(_tasks_dir() / "mmlu/default/_default_template_yaml")
        description = "The following are multiple choice questions (with answers).\n\n"
        configs = [template | {"task": "mmlu", "dataset_name": "packaged", "description": description}]
    return [_definition(config, name, data_dir, shots) for config in configs]


def _definition(config: dict, name: str, data_dir: Data, shots: int | None) -> tuple[dict, dict[str, Path | None]]:
    if shots is None:
        shots = config.get("num_fewshot") or 0
    config["num_fewshot"] = shots
    evaluated = config.get("test_split") or config["validation_split"]
    from_where = [config.get(key) for key in ("fewshot_split", "training_split", "validation_split", "test_split")]
    examples = next(split for split in from_where if split)  # lm-eval's order
    files = {evaluated: split_file(config["dataset_path"], config.get("dataset_name"), evaluated, data_dir)}
    if files[evaluated] is None:
        return config, files  # from the hub: the definition as it is
    if shots:
        folder = files[evaluated].parent
        found = [file for file in (folder / f"{examples}.jsonl", folder / f"{examples}.jsonl.gz") if file.is_file()]
        if not found:
            raise ValueError(
                f"{name} takes its {shots} shots from {folder / examples}.jsonl[.gz], which does not exist; use "
                f"num_fewshot=0 for {name}, a mirror with that split, or data_dir='hub'"
            )
        files[examples] = found[0]
    else:
        config |= {"fewshot_split": None, "fewshot_config": {"samples": []}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in files:
            config[key] = None  # lm-eval reads every split that is named
    return config, files


def _resolved(config: dict, files: dict[str, Path | None]) -> dict:
    """The definition with its functions imported and, unless they come from the hub, its rows read and processed."""
    config = {
        key: getattr(import_module(_function(value)[0]), _function(value)[1]) if _is_function(value) else value
        for key, value in config.items()
    }
    if None in files.values():
        return config
    from datasets import Dataset, DatasetDict

    process = config.pop("process_docs", None)  # here, once: lm-eval repeats it whenever it looks at the rows
    rows = DatasetDict({split: Dataset.from_list(read_rows(file)) for split, file in files.items()})
    rows = DatasetDict({split: process(data) for split, data in rows.items()}) if process else rows
    return config | {"custom_dataset": lambda **_: rows}


# ---- lm-eval's files


def _tasks_dir() -> Path:
    return Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"


class _Loader(yaml.SafeLoader):
    """Leaves `!function module.name` as text: most callers only need the rest."""


_Loader.add_constructor("!function", lambda loader, node: FUNCTION + loader.construct_scalar(node))


@cache
def _read_yaml(file: Path) -> str:
    config = yaml.load(file.read_bytes(), Loader=_Loader)
    base = _load_yaml(file.parent / config.pop("include")) if "include" in config else {}
    package = ".".join(("lm_eval.tasks", *file.parent.relative_to(_tasks_dir()).parts))
    for key, value in config.items():
        if _is_function(value):
            config[key] = f"{FUNCTION}{package}.{value.removeprefix(FUNCTION)}"
    return json.dumps(base | config)


def _load_yaml(file: Path) -> dict:
    """A definition with what it includes; a fresh dict each time, since lm-eval changes what it is given."""
    return json.loads(_read_yaml(file))


def _is_function(value) -> bool:
    return isinstance(value, str) and value.startswith(FUNCTION)


def _function(value: str) -> tuple[str, str]:
    module, _, name = value.removeprefix(FUNCTION).rpartition(".")
    return module, name


@cache
def _file_digest(file: Path, mtime_ns: int) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()
