"""Drop on Monday, fine-tune on Tuesday, ship on Wednesday: SmolLM2 by transformers' Trainer, and what comes after."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llmdrop import DropPlan, apply_plan, find_anatomy, load_calibration, load_model, save_model
from llmdrop.serving.llama_cpp import installed, serve

PLAN = DropPlan([20, 21, 23, 24, 25, 26], [22])
PROMPT = "The capital of France is"
NEW_TOKENS = 8

WITHOUT_LLMDROP = f"""
import json, sys
sys.modules["llmdrop"] = None
import transformers
out = {{}}
for path in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    ids = tokenizer({PROMPT!r}, return_tensors="pt")
    out[path] = model.generate(**ids, max_new_tokens={NEW_TOKENS}, do_sample=False)[0, len(ids.input_ids[0]):].tolist()
json.dump(out, open("stations.json", "w"))
"""


def greedy(model, tokenizer) -> list[int]:
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.eval().generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, len(ids.input_ids[0]) :].tolist()


def trainer(model, tokenizer, folder) -> Trainer:
    text = load_calibration("xsum", tokenizer, n_samples=4, seq_len=32)
    samples = [{"input_ids": ids, "labels": ids} for ids in text.input_ids]
    settings = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    settings |= {"optim": "adafactor", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **settings)
    return Trainer(model, arguments, train_dataset=samples, processing_class=tokenizer)


@pytest.mark.slow
def test_the_same_text_at_every_station(smollm2, tmp_path):
    model, tokenizer = load_model("smollm2-135m", device="cpu")
    apply_plan(model, PLAN)
    before = greedy(model, tokenizer)
    trainer(model, tokenizer, tmp_path / "run").train()
    expected = greedy(model, tokenizer)
    assert expected != before, "training must matter, or this test shows nothing"

    halfway, tokenizer = load_model(tmp_path / "run" / "checkpoint-1", dtype="float32", device="cpu")
    assert find_anatomy(halfway).plan == PLAN
    resumed = trainer(halfway, tokenizer, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for parameter, twin in zip(model.parameters(), halfway.parameters(), strict=True):
        torch.testing.assert_close(twin, parameter, atol=1e-6, rtol=0)
    shipped = save_model(halfway, tokenizer, tmp_path / "shipped")
    stations = {
        "resumed": greedy(halfway, tokenizer),
        "last checkpoint": greedy(*load_model(tmp_path / "run" / "checkpoint-2", dtype="float32", device="cpu")),
        "saved": greedy(*load_model(shipped, dtype="float32", device="cpu")),
    }
    paths = [str(tmp_path / "resumed" / "checkpoint-2"), str(shipped)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LLMDROP, *paths],
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stations |= json.loads((tmp_path / "stations.json").read_text())
    if installed() is not None:
        file = save_model(halfway, tokenizer, tmp_path / "m.gguf", format="gguf", weights="f32")
        with serve(file, exact=True) as engine:
            stations["llama.cpp"] = engine.complete([tokenizer(PROMPT).input_ids], NEW_TOKENS)[0]["tokens"]
    assert stations == dict.fromkeys(stations, expected)
