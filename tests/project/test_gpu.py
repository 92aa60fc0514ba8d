"""The program of `make gpu` with a pretended GPU and small models: what it would do, writes, and draws."""

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import gpu_step
import pandas as pd
import pytest
from device import pretended_gpus, reason_not_to
from exports import TOKENIZER
from tiny import tiny
from transformers import AutoConfig

from llmdrop.data.packaged import packaged_data_dir

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu = pytest.importorskip("gpu", reason="the program's imports")

from llmdrop.repro import paper, speedups  # noqa: E402

ARGS = Namespace(device="cuda", model="", data_dir="", minutes=1.0, fresh=False)
pretended = pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to()))


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    return tmp_path / "build"


@pytest.fixture
def small():
    with gpu_step.small():
        yield


def in_a_bare_process(build, name, model="", data_dir=""):
    """Run a step on the pretended GPU with no other packages than it says it wants; what it wrote."""
    (step,) = (step for step in gpu.all_steps() if step.name == name)
    command = [sys.executable, ROOT / "tests" / "gpu_step.py", name, ",".join(step.modules), model, data_dir]
    environment = os.environ | {"PYTHONPATH": "", "LLMDROP_BUILD": str(build), "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return gpu.read(step)


def test_dry_names_every_step_its_inputs_and_its_time(build):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for step in gpu.all_steps():
        assert f"{step.name}: " in text and step.minutes > 0
    assert len(re.findall(r"minutes on an H100 \(limit", text)) == len(gpu.all_steps())
    assert text.count("inputs: ") == len(gpu.all_steps())
    assert max(step.gpu_gb for step in gpu.all_steps()) < 80, "one GPU of 80 GB is enough"
    assert not build.exists(), "nothing was done"


def finish(path, args):
    path.write_text("ran" if not path.exists() else "ran again")
    return {"summary": "fine"}


def step(name, run, **settings):
    return gpu.Step(name, "a step", 0.001, run, **settings)


def test_steps_are_resumed_skipped_and_stopped(build, tmp_path, monkeypatch, capfd):
    """Whatever happens in one, the next one runs; what is done is not done again."""
    ran = []

    def in_its_own_process(one, args, limit_seconds):
        ran.append(one.name)
        gpu.in_this_process(one, args)
        return "done"

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "in_its_own_process", in_its_own_process)
        steps = [
            step("first", partial(finish, tmp_path / "first")),
            step("lacking", None, modules=("no_such_module",)),
            gpu.Step("long", "takes hours", 500, None),
            step("last", partial(finish, tmp_path / "last")),
        ]
        for _ in range(2):
            assert gpu.run_steps(steps, ARGS) == 0
    assert ran == ["first", "last"] and (tmp_path / "first").read_text() == "ran"
    said = capfd.readouterr().out
    assert "first: done before" in said and "it needs no_such_module" in said and "long: left for another call" in said
    record = json.loads((build / "gpu" / "first.json").read_text())
    assert (record["status"], record["summary"]) == ("done", "fine") and "torch" in record["machine"]


def test_a_step_beyond_its_limit_is_stopped_with_all_it_started(build, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(program))
    endless = step("endless", None)
    assert gpu.in_its_own_process(endless, ARGS, 3.0) == "stopped"
    assert gpu.read(endless)["status"] == "stopped"
    child = Path("/proc", (tmp_path / "pid").read_text())
    for _ in range(50):
        if not child.exists() or "Z" in (child / "stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("its child goes on")


@pretended
@pytest.mark.slow
def test_speed_is_measured_recorded_and_drawn(build, small, tmp_path):
    """Measured on the pretended GPU, drawn later where there is none."""
    record = in_a_bare_process(build, "geometry: Llama-3-8B, graph")
    steps = [one for one in gpu.all_steps() if one.name in ("geometry: Llama-3-8B, graph", "batches: Llama-3-8B")]
    rows = pd.DataFrame(record["rows"])
    assert set(rows["decoding"]) == {"graph", "eager"} and (rows["status"] == "ok").all()
    assert "measured ÷ predicted at least" in record["summary"] and "published 1.52x" in record["summary"]
    assert record["facts"]["device"] == "a pretended GPU"
    gpu.draw(steps, tmp_path / "figures")
    made = {file.name for file in (tmp_path / "figures" / "geometry").iterdir()}
    assert {"speedups.pdf", "speedups_measured.md", "claims.csv", "index.html", "gpu.json"} <= made
    page = (tmp_path / "figures" / "geometry" / "index.html").read_text()
    assert "On a GPU" in page and record["summary"].split(";")[0] in page and "a pretended GPU" in page


PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu

def fine(args):
    return {{"summary": "fine"}}

def broken(args):
    raise ValueError("broken")

runs = {{"first": fine, "broken": broken, "last": fine}}
gpu.all_steps = lambda: [gpu.Step(name, "a step", 0.1, run, profile="") for name, run in runs.items()]
gpu.__file__ = __file__
sys.exit(gpu.main())
"""


@pytest.mark.slow
def test_a_step_that_fails_stops_no_other_and_is_in_the_exit_code(build, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    # an earlier call did the first and failed in the second, which is tried again
    for name, status in (("first", "done"), ("broken", "failed")):
        gpu.write(step(name, None), {"status": status, "summary": status})
    command = [sys.executable, program, "--device", "cpu", "--figures", tmp_path / "figures"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "ValueError: broken" in run.stderr
    for name, said in (("first", "done before"), ("broken", "failed"), ("last", "done")):
        assert f"-- {name}: {said}" in run.stdout.splitlines()


def test_the_page_says_what_steps_take():
    table = (ROOT / "docs" / "gpu.md").read_text().split("| steps, in order of worth | minutes |")[1]
    printed = [int(minutes) for minutes in re.findall(r"\| (\d+) \|$", table, flags=re.MULTILINE)]
    kinds = ("check", "geometry.*graph", "batches", "geometry.*compiled", "scoring|evaluation", "pretrain", "embedded")
    sums = [sum(step.minutes for step in gpu.all_steps() if re.match(kind, step.name)) for kind in kinds]
    assert printed == [round(minutes) for minutes in sums]


@pytest.fixture(scope="module")
def data_dir():
    return str(packaged_data_dir())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of more layers than any plan of these steps drops, whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"num_hidden_layers": 13, "vocab_size": len(TOKENIZER), "max_position_embeddings": 512}
    tiny("llama", **shape).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pretended
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, summary",
    [
        ("scoring", r"ratio median \d.*; memory .* ratio 1.000"),
        ("evaluation", r"ours / limit \d.*stock / ours \d"),
        ("pretrain", r"0M tokens, held-out loss \d"),
        ("embedded", r"(\d+) of \1 notebooks"),
    ],
)
def test_steps_run_with_what_they_say_they_want(name, summary, build, model, data_dir):
    record = in_a_bare_process(build, name, model, data_dir)
    assert record["status"] == "done" and re.match(summary, record["summary"]), record


def test_what_failed_in_a_step_is_in_the_exit_code(build, monkeypatch):
    """Also where it is found again: the step itself came to its end, and is not run again."""
    half = step("half", lambda args: {"summary": "1 of 2 hold", "failed": ["graph"]})

    def in_its_own_process(one, args, limit_seconds):
        gpu.in_this_process(one, args)
        return "done"

    monkeypatch.setattr(gpu, "in_its_own_process", in_its_own_process)
    assert [gpu.run_steps([half], ARGS) for _ in range(2)] == [1, 1]


@pretended
@pytest.mark.slow
def test_what_is_found_on_the_pretended_gpu_holds(monkeypatch):
    """But for what it cannot show, which is reported and does not end the rest."""
    import device_cases
    import gpu_checks

    monkeypatch.setattr(device_cases, "cases", lambda acts: [("llama", act) for act in acts[:4]])
    monkeypatch.setattr(device_cases, "FAMILIES", ["llama"])  # test_device has them all
    monkeypatch.setattr(gpu_checks, "NEW_TOKENS", 4)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with pretended_gpus():
        rows = {row["check"]: row for row in gpu_checks.run_all("cuda")}
    cannot = {"gradients", "compiled", "int4 kernel", "cuDNN attention"}
    assert {name for name, row in rows.items() if not row["holds"]} <= cannot
    assert {"llama, forward", "streaming", "padding in bfloat16", "graph", "balanced", *cannot} <= set(rows)


def test_the_page_says_how_to_run_it_until_it_was(tmp_path):
    sys.path.insert(0, str(ROOT / "notebooks"))
    report = pytest.importorskip("report")
    for profile in ("geometry", "smoke"):
        report.build(ROOT / "notebooks" / "profiles" / f"{profile}.yaml", tmp_path / "done", tmp_path / profile)
    assert "<code>make gpu</code>" in (tmp_path / "geometry" / "index.html").read_text()
    assert "make gpu" not in (tmp_path / "smoke" / "index.html").read_text()


def test_another_transformers_is_named_beside_the_speed(monkeypatch):
    """That of 5.17 decodes on a static cache by copying it once per query head."""
    assert gpu._pinned() == ""
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "5.17.0")
    assert "with transformers 5.17.0, not the pinned" in gpu._pinned()


@pretended
def test_the_streaming_benchmark_times_the_plain_forward_on_the_gpu(monkeypatch):
    import streaming
    import synthetic

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **shape, vocab_size=128256)
    monkeypatch.setattr(synthetic, "config", lambda layers: config)
    with pretended_gpus() as gpus:
        assert streaming.forward(Namespace(layers=4, samples=2, dtype="float32"))["seconds"] > 0
    assert gpus.waits > 2, "it waited for the GPU before and after"


def test_rows_of_table_4_one_by_one_are_the_whole(small):
    whole = speedups.largest_batches(paper.table("table04"))
    parts = [speedups.largest_batches(paper.table("table04").iloc[[k]]) for k in range(len(whole))]
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole)
