"""A mirror of benchmarks with made-up rows."""

import gzip
import json
from pathlib import Path

from llmdrop.evaluation import tasks

SUBJECTS = [file.stem.removeprefix("mmlu_") for file in sorted(tasks.tasks_dir().glob(tasks.YAML["mmlu"]))]


def write(root: Path, name: str, rows: list[dict]) -> None:
    file = root / f"{name}.jsonl.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def made_up_mirror(root: Path) -> Path:
    """A mirror with HellaSwag, WinoGrande, GSM8K and all of MMLU, a few made-up rows each."""

    def hellaswag(i):
        ctx = {"ctx_a": f"A person lifts {i} [title] bars.", "ctx_b": "they", "activity_label": "Lifting"}
        return {"ind": i, "label": str(i % 4), "endings": [f"stop [x]  at {i + k}." for k in range(4)]} | ctx

    def mmlu(i):
        return {"question": f" What is {i}? ", "choices": [str(i + k) for k in range(4)], "answer": i % 4}

    def gsm8k(i):
        return {"question": f"{i} + 1?", "answer": f"It is {i} + 1. #### {i + 1}"}

    def winogrande(i):
        return {"sentence": f"The _ is {i}.", "option1": "cat", "option2": "dog", "answer": str(1 + i % 2)}

    write(root, "Rowan/hellaswag/default/validation", [hellaswag(i) for i in range(12)])
    write(root, "Rowan/hellaswag/default/train", [hellaswag(i) for i in range(5, 15)])
    write(root, "openai/gsm8k/main/test", [gsm8k(i) for i in range(6)])
    write(root, "openai/gsm8k/main/train", [gsm8k(i) for i in range(50, 70)])
    write(root, "allenai/winogrande/winogrande_xl/validation", [winogrande(i) for i in range(6)])
    for k, subject in enumerate(SUBJECTS):
        write(root, f"cais/mmlu/{subject}/test", [mmlu(i) for i in range(2 + k % 3)])
        write(root, f"cais/mmlu/{subject}/dev", [mmlu(i) for i in range(20, 25)])
    return root
