"""How the benchmarks are asked, read back from lm-eval's own tasks on real packaged data."""

import json

import pandas as pd
import pytest

from llmdrop import Store
from llmdrop.compress.variant import Variant
from llmdrop.data.mirror import read_split
from llmdrop.repro.benchmarks import above_guessing, limit_per_part, settings
from llmdrop.repro.quality import quality


def test_limit_per_part_of_the_packaged_mmlu_is_the_limit():
    assert [limit_per_part(task, 100) for task in ("piqa", "mmlu")] == [100, 100]
    assert limit_per_part("mmlu", None) is None


@pytest.mark.parametrize("limit, of_each", [(100, 2), (1000, 17)])
def test_limit_per_part_of_a_mirror_with_subjects_is_divided(limit, of_each, monkeypatch):
    subjects = {"mmlu": dict.fromkeys(range(57))}
    monkeypatch.setattr("llmdrop.repro.benchmarks.load_tasks", lambda *_, **__: subjects)
    assert limit_per_part("mmlu", limit, "a mirror") == of_each
    assert limit_per_part("piqa", limit, "a mirror") == limit


def test_tasks_above_guessing(monkeypatch):
    monkeypatch.setattr("llmdrop.repro.benchmarks.unread", lambda task, _: {"piqa": 0.5, "boolq": 0.62}[task])
    parts = []
    for task, right in {"piqa": [1, 1, 1, 0], "boolq": [1, 1, 0]}.items():  # 75 % are more than 50; 67 may be 62
        values = right * 30
        parts.append(pd.DataFrame({"where": task, "item": range(len(values)), "value": values}))
    rows = pd.concat(parts).assign(variant="Baseline", metric="acc", n=1)
    assert above_guessing(rows, "Baseline", ["piqa", "boolq"]) == ["piqa"]


def test_settings_are_what_lm_eval_says(smollm2, tmp_path):
    model, tokenizer = smollm2
    rows = quality(model, tokenizer, {"Baseline": Variant()}, tasks=["piqa", "boolq"], limit=2, store=Store(tmp_path))
    table = settings(rows, ["piqa", "boolq"])
    assert table.loc["piqa"].to_dict() == {"num_fewshot": 0, "metric": "acc_norm", "n": 2, "version": "1.0"}
    assert table.loc["boolq", ["metric", "n"]].tolist() == ["acc", 2]


def test_settings_of_shots_and_filters(tmp_path):
    """GSM8K's metric is exact match, whatever lm-eval's filter of answers is called; its shots are those asked for."""
    for split in ("train", "test"):
        folder = tmp_path / "openai/gsm8k/main"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"What is {k} + 1?", "answer": f"{k} + 1 = {k + 1}\n#### {k + 1}"} for k in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_split("openai/gsm8k", "main", "test", tmp_path)) == 8
    metrics = ["exact_match,flexible-extract", "exact_match,strict-match"]
    rows = pd.DataFrame([("Baseline", "gsm8k", metric, item, 1.0, 1) for metric in metrics for item in range(8)])
    rows.columns = ["variant", "where", "metric", "item", "value", "n"]
    row = settings(rows, ["gsm8k"], str(tmp_path), {"gsm8k": 3}).loc["gsm8k"]
    assert row[["num_fewshot", "metric", "n"]].tolist() == [3, "exact_match", 8]
