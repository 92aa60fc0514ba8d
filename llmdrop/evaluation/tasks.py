"""lm-eval's own task definitions, read offline from a mirror or the packaged data.

Prompts, targets, metrics, shots and versions stay lm-eval's; only where the rows come from changes. A task is a dict
of lm-eval tasks, of one entry but for groups. The tasks in `YAML` are read without lm-eval's index of all of them, and
MMLU, whose 57 subjects are averaged weighted by their size (see `pool`), is one of these; all others are its own.
"""

import difflib
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, lru_cache
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints.extras import import_extra
from ..data.mirror import split_file
from ..data.rows import jsonl_file, read_rows
from ..prune import put

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

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
SPLITS = ("fewshot_split", "training_split", "validation_split", "test_split")  # examples come from the first there is

Data = str | os.PathLike | None  # None, "hub" or a mirror: see `llmdrop.data`
Shots = int | Mapping[str, int] | None  # one number for all tasks, a number by task, or lm-eval's default
Definition = tuple[dict, dict[str, Path | None]]  # lm-eval's settings; each split that is read: its file, None: the hub


class Parts(dict[str, "ConfigurableTask"]):
    """lm-eval's tasks by its own names. groups: those of its groups that they are in, by name."""

    groups: Mapping[str, "Group"] = {}


def load_tasks(names: Iterable[str], data_dir: Data = None, num_fewshot: Shots = None) -> dict[str, Parts]:
    """Build lm-eval tasks: {name: its parts}.

    names: of tasks, groups and tags of the installed lm-eval, or paths of YAML files that define some. data_dir: None
    (packaged data where there is some, else the hub), "hub" (lm-eval's own loading) or a mirror; rows that a definition
    names by file are read there. mmlu is the group of 57 subjects where the mirror has them (and from the hub), else
    one zero-shot task on the packaged file, which names no subjects. num_fewshot: as with lm-eval, a task whose
    definition insists on none gets none. Raises ValueError for an unknown task, for a YAML that is no task and for
    shots without examples, FileNotFoundError for data that is not there, ImportError for a package that a task needs.
    """
    import_extra("lm_eval", "eval")
    from lm_eval.api.task import ConfigurableTask

    _compile_templates_once()
    tasks: dict[str, Parts] = {}
    with quiet():
        for name in names:
            if name not in YAML:
                tasks[name] = _of_lm_eval(name, data_dir, num_fewshot)
                continue
            tasks[name] = Parts()
            for config, files in _definitions(name, data_dir, num_fewshot):
                if None in files.values():
                    with _reading(config["dataset_path"], config.get("dataset_name")):
                        task = ConfigurableTask(config=config)
                else:
                    task = ConfigurableTask(config=_with_rows(config, files))
                task.set_fewshot_seed(FEWSHOT_SEED)
                tasks[name][config["task"]] = task
    return tasks


@cache
def _compile_templates_once() -> None:
    """Have lm-eval keep its compiled templates: it compiles them anew for every question, most of its time with one."""
    from lm_eval.utils import env

    env.from_string = lru_cache(maxsize=256)(env.from_string)


def _of_lm_eval(name: str, data_dir: Data, num_fewshot: Shots) -> Parts:
    """What lm-eval's own index of tasks finds under a name, or in a YAML file, with the rows of `data_dir`."""
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(name).expanduser()
    is_file = file.suffix in (".yaml", ".yml") and file.is_file()
    if not is_file and name not in _index().task_index:
        near = difflib.get_close_matches(name, _index().all_tasks) or ["none"]
        raise ValueError(
            f"unknown task {name!r}; with data_dir={data_dir!r} these run offline: "
            f"{', '.join(available_tasks(data_dir))}. With data_dir='hub' or a mirror that has them: {', '.join(YAML)} "
            f"and all that lm-eval has (names like this one: {', '.join(near)}); or the path of a YAML file"
        )
    shots = _shots(name, num_fewshot)
    download = ConfigurableTask.download

    def read(task: ConfigurableTask, dataset_kwargs: dict | None = None, **kwargs) -> None:
        names_files = "data_files" in (dataset_kwargs or {}) and "/" not in task.DATASET_PATH
        rows = None
        if data_dir != "hub" and not names_files and not task.config.custom_dataset:
            rows = _mirrored(task, data_dir, shots)
        if rows is not None:
            task.dataset = rows
            return
        with _reading(task.DATASET_PATH, task.DATASET_NAME):
            download(task, dataset_kwargs, **kwargs)

    with ExitStack() as undo:
        put(undo, ConfigurableTask, "download", read)
        try:
            definition = load_yaml(file, resolve_func=False) if is_file else {}
            if not is_file:
                found = _index().load(name)
            elif "group" in definition:  # of tasks beside it, or of lm-eval's; by its path lm-eval reads tasks alone
                found = TaskManager(include_path=str(file.parent)).load(definition["group"])
            else:
                found = TaskManager(include_defaults=False).load(str(file))
        except (yaml.YAMLError, TypeError) as error:
            what = " ".join(str(error).split())[:200]
            raise ValueError(f"lm-eval cannot read a task out of {name}: {what}") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no data for task {name!r}: {error}") from error
        except ImportError as error:
            raise ImportError(
                f"the task {name} needs a package that is not here ({error}): pip install it, or lm-eval's extra for "
                "the task, as 'lm_eval[ifeval]'"
            ) from error
    parts = Parts(found["tasks"])
    parts.groups = found.get("groups", {})
    for task in parts.values():
        task.set_config("num_fewshot", _shots_of(task, shots))
        task.set_fewshot_seed(FEWSHOT_SEED)
    return parts


@contextmanager
def _reading(path: str, config: str | None) -> Iterator[None]:
    """One kind of error, and one sentence, for all that reading a dataset may raise."""
    try:
        yield
    except Exception as error:  # offline, unknown, gated, damaged: datasets raises a dozen kinds
        source = f"{path}/{config or 'default'}"
        raise FileNotFoundError(
            f"cannot read {source}: {' '.join(str(error).split())[:300]} | Fix: a network where it is on the hub, or "
            f"data_dir=<mirror> with <mirror>/{source}/<split>.jsonl[.gz]"
        ) from error


@cache
def _index() -> "TaskManager":
    """lm-eval's index of all its tasks, which takes 10 seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _shots_of(task: "ConfigurableTask", shots: int | None) -> int:
    own = task.config.num_fewshot
    return own or 0 if shots is None or own == 0 else shots


def _mirrored(task: "ConfigurableTask", data_dir: Data, shots: int | None):
    """The rows of the splits that a task reads, where the mirror or the packaged data has them; None: on the hub."""
    from datasets import Dataset, DatasetDict

    config = task.config
    evaluated = config.test_split or config.validation_split
    file = split_file(task.DATASET_PATH, task.DATASET_NAME, evaluated, data_dir) if evaluated else None
    if file is None:
        return None
    named = [task.fewshot_cfg.split, *(getattr(config, key) for key in SPLITS)]
    files = {split: jsonl_file(file.with_name(split)) for split in named if split}
    if _shots_of(task, shots) and not task.fewshot_cfg.samples:
        examples = next(split for split in named if split)
        if files[examples] is None:
            raise _no_examples(config.task, _shots_of(task, shots), file.with_name(examples))
    for key in SPLITS:
        if files.get(getattr(config, key)) is None:
            setattr(config, key, None)
    if files.get(task.fewshot_cfg.split) is None:
        task.fewshot_cfg.split = None
    return DatasetDict({split: Dataset.from_list(read_rows(file)) for split, file in files.items() if file})


def _no_examples(name: str, shots: int, file: Path) -> ValueError:
    return ValueError(
        f"{name} takes its {shots} shots from {file}.jsonl[.gz], which does not exist; use num_fewshot=0 for {name}, a "
        "mirror with that split, or data_dir='hub'"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of datasets and lm-eval's warnings, which are about its own definitions' defaults."""
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

    Of a task in `YAML`, builds nothing, and rows from the hub enter by name only; of others, the rows do.
    """
    state = hashlib.sha256(f"lm_eval {importlib.metadata.version('lm_eval')} seed {FEWSHOT_SEED}".encode())
    if name not in YAML:
        for task in load_tasks([name], data_dir, num_fewshot)[name].values():
            _add_definition(state, task.config.to_dict(keep_callable=True))
            for doc in [*task.eval_docs, *task.sampler.df]:
                state.update(json.dumps(doc, sort_keys=True, default=str).encode())
        return state.hexdigest()
    for config, files in _definitions(name, data_dir, num_fewshot):
        _add_definition(state, config)
        for split, file in files.items():
            state.update(split.encode() + (b"hub" if file is None else hashlib.sha256(file.read_bytes()).digest()))
    return state.hexdigest()


def _add_definition(state, config: dict) -> None:

    def named(function) -> str:
        return f"!function {function.__module__}.{function.__name__}"

    state.update(json.dumps(config, sort_keys=True, default=named).encode())
    modules = {value.__module__: inspect.getfile(value) for value in config.values() if callable(value)}
    for module in sorted(modules):
        state.update(Path(modules[module]).read_bytes())


def available_tasks(data_dir: Data = None) -> list[str]:
    """Names of the tasks that run with this data_dir; with None, those that need no hub."""
    names = []
    for name in YAML:
        with suppress(FileNotFoundError):
            files = [file for _, files in _parts(name, data_dir, 0) for file in files.values()]
            if data_dir == "hub" or None not in files:
                names.append(name)
    return names


def right_choice(task: "ConfigurableTask", doc: dict) -> int | None:
    """Index of a question's right choice among `task.doc_to_choice(doc)`; None where there are none, or several right.

    lm-eval's tasks give it as an index or as the choice itself; WinoGrande as the index of a context.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(answer, str):
        return choices.index(answer) if answer in choices else None
    return answer if isinstance(answer, int) and 0 <= answer < len(choices) else None


def subset(name: str, n: int, limit: int | None, seed: int = 0) -> list[int]:
    """Numbers of the questions that a limit takes of the n of a task's part, in order: a random choice, fixed by seed.

    Those of a smaller limit are among those of a larger one; another part draws its own. None: all.
    """
    state = hashlib.sha256(f"{name} {seed}".encode()).digest()
    order = np.random.default_rng(list(state)).permutation(n)
    return sorted(order[:limit].tolist())


def unread(name: str, data_dir: Data = None) -> float:
    """Share of a task's questions that are right without reading them: by the most common answer or a guess.

    Whichever is more. Answers are told apart by their text (0.62 of BoolQ's are "yes"): where questions have choices of
    their own, a guess is all there is. Raises as `load_tasks`.
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
    """Mean and standard error (NaN where a part's is) over a task's parts, weighted by size as lm-eval does."""
    if len(values) == 1:
        return values[0], stderrs[0]
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    mean = float(aggregate_subtask_metrics(values, sizes))
    return mean, nan if any(map(isnan, stderrs)) else float(pooled_sample_stderr(stderrs, sizes))


def _definitions(name: str, data_dir: Data, num_fewshot: Shots) -> list[Definition]:
    """`_parts`, or an error that lists the tasks there are."""
    try:
        return _parts(name, data_dir, num_fewshot)
    except FileNotFoundError as error:
        ready = ", ".join(available_tasks(data_dir)) or "none"
        raise FileNotFoundError(
            f"no data for task {name!r}: {error} Tasks that run with data_dir={data_dir!r}: {ready}"
        ) from error


def _parts(name: str, data_dir: Data, num_fewshot: Shots) -> list[Definition]:
    """The definition of each part of a task, with its shots and splits settled."""
    from lm_eval.tasks._yaml_loader import load_yaml  # a fresh dict each time: lm-eval changes what it is given

    shots = _shots(name, num_fewshot)
    if name == "mmlu" and data_dir != "hub" and not (data_dir and Path(data_dir, "cais/mmlu/anatomy").is_dir()):
        template = load_yaml(tasks_dir() / "mmlu/default/_default_template_yaml")
        description = "The following are multiple choice questions (with answers).\n\n"
        configs = [template | {"task": "mmlu", "dataset_name": "packaged", "description": description}]
    else:
        configs = [load_yaml(file) for file in sorted(tasks_dir().glob(YAML[name]))]
    return [_definition(config, name, data_dir, shots) for config in configs]


def _shots(name: str, num_fewshot: Shots) -> int | None:
    shots = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 0):
        raise ValueError(f"num_fewshot={shots!r} for {name}; give a number of examples, 0 or more")
    return shots


def tasks_dir() -> Path:
    """Where lm-eval keeps its definitions."""
    lm_eval = import_extra("lm_eval", "eval")

    return Path(lm_eval.__file__).parent / "tasks"


def _definition(config: dict, name: str, data_dir: Data, shots: int | None) -> Definition:
    if shots is None:
        shots = config.get("num_fewshot") or 0
    config["num_fewshot"] = shots
    evaluated = config.get("test_split") or config["validation_split"]
    file = split_file(config["dataset_path"], config.get("dataset_name"), evaluated, data_dir)
    files = {evaluated: file}
    if file is None:
        return config, files  # from the hub: the definition as it is
    if shots:
        examples = next(config[key] for key in SPLITS if config.get(key))
        files[examples] = jsonl_file(file.with_name(examples))
        if files[examples] is None:
            raise _no_examples(name, shots, file.with_name(examples))
    else:
        config |= {"fewshot_split": None, "fewshot_config": {"samples": []}}
    for key in SPLITS:
        if config.get(key) not in files:
            config[key] = None  # lm-eval reads every split that is named
    return config, files


def _with_rows(config: dict, files: Mapping[str, Path]) -> dict:
    """The definition with its rows, read and processed once: lm-eval repeats that whenever it looks at them."""
    from datasets import Dataset, DatasetDict

    process = config.pop("process_docs", None)
    rows = DatasetDict({split: Dataset.from_list(read_rows(file)) for split, file in files.items()})
    if process is not None:
        rows = DatasetDict({split: process(data) for split, data in rows.items()})
    return config | {"custom_dataset": lambda **_: rows}
