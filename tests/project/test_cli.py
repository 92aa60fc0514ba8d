"""The command line `llmdrop`: what each command answers, to people and programs, and what it says when it cannot."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from exports import TOKENIZER, wide
from tiny import byte_tokenizer, tiny

import llmdrop
import llmdrop_cli
from llmdrop import DropPlan
from llmdrop.serving import launch

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = ["score", "plan", "drop", "evaluate", "speed", "serve", "study"]
SMALL = ["--n-samples", "2", "--seq-len", "32", "--device", "cpu"]
PROGRAM = [sys.executable, "-m", "llmdrop_cli"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own with a tiny model in whole/ and a text in text.txt; measurements go there, too."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "data").symlink_to(llmdrop.build_dir().resolve() / "data")  # packaged text
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    monkeypatch.chdir(tmp_path)
    model = tiny("llama", "sdpa", vocab_size=257).to(torch.bfloat16)
    llmdrop.save_model(model, byte_tokenizer(), "whole")
    Path("text.txt").write_text((ROOT / "README.md").read_text())
    return tmp_path


@pytest.fixture
def run(capsys):
    """A command line, run in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = llmdrop_cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answer(run):
    """What a command that ends well prints with --json."""

    def answer(*arguments: str):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)  # and nothing else

    return answer


def refused(outcome: tuple[int, str, str], code: int) -> str:
    """The one sentence on standard error."""
    assert outcome[:2] == (code, ""), outcome[2]
    assert "Traceback" not in outcome[2]
    (sentence,) = [line for line in outcome[2].splitlines() if line.startswith("llmdrop: ")]
    assert outcome[2].endswith(f"{sentence}\n")
    return sentence


def own_scores():
    """As the command line has to score whole/ on text.txt with SMALL."""
    model, tokenizer = llmdrop.load_model("whole", device="cpu")
    return llmdrop.score(model, llmdrop.load_calibration("text.txt", tokenizer, 2, 32), progress=False)


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_answers_without_importing_the_library():
    heavy = {"torch", "transformers", "pandas", "numpy", "llmdrop"}
    for arguments in ([], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
        code = (
            f"import sys, llmdrop_cli\nassert llmdrop_cli.main({arguments}) == 0\nassert not {heavy} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown = " ".join(done.stdout.split())
        if len(arguments) == 2:
            assert f"Example: llmdrop {arguments[0]} " in shown
        elif arguments != ["--version"]:
            assert all(f" {name} " in shown for name in COMMANDS)
    assert f'__version__ = "{shown}"' not in shown


def test_every_argument_is_explained_and_every_example_is_taken():
    program = typer.main.get_command(llmdrop_cli.app)
    assert list(program.commands) == COMMANDS
    for name, command in program.commands.items():
        assert command.help and command.epilog.count("llmdrop") == 1
        unexplained = [parameter.name for parameter in command.params if not parameter.help]
        assert not unexplained, f"{name}: {unexplained}"
        example = command.epilog.removeprefix("Example: llmdrop ").partition(" > ")[0].split()
        assert example[0] == name
        command.make_context(name, example[1:])  # raises what it does not take
        assert any(parameter.name == "as_json" for parameter in command.params)


def test_every_command_in_the_documentation_is_taken():
    program = typer.main.get_command(llmdrop_cli.app)
    lines = []
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines += re.findall(r"^llmdrop (\w+) +([^#>\n]*)", block, re.MULTILINE)
    assert {name for name, _ in lines} == set(COMMANDS)
    for name, arguments in lines:
        program.commands[name].make_context(name, arguments.split())  # raises what it does not take


# -- score, plan, drop ------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_library(here, answer, run):
    scores = own_scores()
    told = answer("score", "whole", "--calibration", "text.txt", *SMALL)
    assert llmdrop.ImportanceScores.from_json(json.dumps(told)) == scores
    assert told["model"] == "whole" and told["calibration"].startswith("text.txt")
    code, table, _ = run("score", "whole", "--calibration", "text.txt", *SMALL)
    assert code == 0 and table.splitlines()[0].split() == ["attention", "±", "MLP", "±", "block", "±"]
    assert f"{scores.attn[3]:.4f}" in table and f"{scores.stderr['block'][4]:.4f}" in table


def test_a_plan_is_the_union_of_what_was_asked_for(here, answer, run):
    scores = own_scores()
    asked = ["--attn", "40%", "--mlp", "1", "--keep", "0,4"]
    expected = llmdrop.plan_drop(scores, "attn", "40%", keep=[0, 4]) | llmdrop.plan_drop(scores, "mlp", 1, keep=[0, 4])
    told = answer("plan", "whole", *asked, "--calibration", "text.txt", *SMALL)
    assert DropPlan.from_json(json.dumps(told)) == expected and told["n_layers"] == 5
    Path("scores.json").write_text(json.dumps(answer("score", "whole", "--calibration", "text.txt", *SMALL)))
    assert answer("plan", "scores.json", *asked) == told
    joint = answer("plan", "scores.json", "--joint", "3")
    assert DropPlan.from_json(json.dumps(joint)) == llmdrop.plan_drop(scores, "joint", 3)
    _, text, _ = run("plan", "scores.json", *asked)
    assert text.startswith(expected.label) and ", ".join(map(str, expected.attn)) in text


def test_drop_saves_what_is_left_and_says_what_it_costs(here, answer, run):
    asked = ["--attn", "1", "--mlp", "2", "--block", "1", "--calibration", "text.txt", *SMALL]
    told = answer("drop", "whole", "rest", *asked)
    rest, _ = llmdrop.load_model("rest", device="cpu")
    plan = llmdrop.find_anatomy(rest).plan
    scores = own_scores()
    expected = [llmdrop.plan_drop(scores, kind, n) for kind, n in (("attn", 1), ("mlp", 2), ("block", 1))]
    assert plan == expected[0] | expected[1] | expected[2] == DropPlan.from_json(json.dumps(told["plan"]))
    assert rest.dtype == torch.bfloat16, "as it was"
    assert told["path"] == str(here / "rest") and told["after"]["parameters"] == rest.num_parameters()
    assert told["after"]["kv_bytes"] / told["before"]["kv_bytes"] == (5 - len(plan.attn)) / 5
    assert told["before"]["loss"] != told["after"]["loss"]
    card = Path("rest/README.md").read_text()
    assert "text.txt" in card and f"{told['after']['loss']:.3f} after" in card

    sentence = refused(run("drop", "whole", "rest", *asked), 1)
    assert "is not empty; choose another path, or" in sentence
    code, text, _ = run("drop", "whole", "rest", *asked, "--overwrite")
    assert code == 0 and "loads with equal logits" in text and "KV cache of 2048 tokens" in text
    Path("rest/mine.txt").write_text("mine")
    assert "mine.txt, which save_model does not write" in refused(
        run("drop", "whole", "rest", *asked, "--overwrite"), 1
    )
    assert Path("rest/mine.txt").read_text() == "mine"


def test_drop_by_a_plan_reconstructed(here, answer):
    Path("plan.json").write_text('{"attn": [2], "mlp": [], "n_layers": 5}')
    plain = answer("drop", "whole", "plain", "--plan", "plan.json", "--device", "cpu")
    better = answer(
        "drop", "whole", "better", "--plan", "plan.json", "--reconstruct", "--seq-len", "32", "--device", "cpu"
    )
    assert plain["plan"] == better["plan"] == {"attn": [2], "mlp": [], "n_layers": 5}
    assert better["before"] == plain["before"] and better["after"]["loss"] != plain["after"]["loss"]
    assert "reconstructed by least squares" in Path("better/README.md").read_text()
    before, after = (llmdrop.load_model(name, device="cpu")[0] for name in ("plain", "better"))
    changed = [name for name, weight in before.state_dict().items() if not weight.equal(after.state_dict()[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"], "the matrix before the gap"


def test_drop_for_other_programs_and_without_text_to_measure_on(here, answer, run, monkeypatch):
    llmdrop.save_model(wide(), TOKENIZER, "known")  # of a tokenizer that llama.cpp has a form for
    told = answer("drop", "known", "small.gguf", "--attn", "1", "--calibration", "text.txt", *SMALL)
    assert llmdrop.find_anatomy(llmdrop.load_model("small.gguf", device="cpu")[0]).plan.attn == tuple(
        told["plan"]["attn"]
    )

    def none(*args, **kwargs):
        raise FileNotFoundError("the wheel is not installed")

    monkeypatch.setattr("llmdrop.data.texts.held_out_texts", none)
    asked = ["--format", "nemotron-nas", "--attn", "1", "--keep", "0", "--calibration", "text.txt", *SMALL]
    code, out, err = run("drop", "known", "nas", *asked)
    assert code == 0 and "parameters" in out and "loss" not in out
    assert "for want of text: the wheel is not installed" in err and Path("nas/config.json").is_file()


# -- evaluate, speed, serve, study ------------------------------------------------------------------------------------


def test_evaluate_is_the_librarys(here, answer, run, monkeypatch):
    pytest.importorskip("lm_eval")
    Path("plan.json").write_text('{"attn": [2]}')
    rows = answer("evaluate", "whole", "piqa,openbookqa", "--plan", "plan.json", "--limit", "2", "--device", "cpu")
    assert {row["plan"] for row in rows} == {"Baseline", "Attn-1"}
    assert {row["task"] for row in rows} == {"piqa", "openbookqa"} and {row["n"] for row in rows} == {2}
    model, tokenizer = llmdrop.load_model("whole", device="cpu")
    expected = llmdrop.evaluate(model, tokenizer, ["piqa"], limit=2, progress=False)
    told = [row["value"] for row in rows if row["plan"] == "Baseline" and row["task"] == "piqa"]
    assert told == expected["value"].tolist()
    code, text, _ = run("evaluate", "whole", "piqa", "--limit", "2", "--device", "cpu")
    assert code == 0 and "acc_norm" in text and "Attn" not in text
    assert "unknown task" in refused(run("evaluate", "whole", "piqqa", "--device", "cpu"), 1)


def test_speed_is_measured_beside_the_whole_model(here, answer, run):
    Path("plan.json").write_text('{"attn": [2]}')
    asked = ["speed", "whole", "--plan", "plan.json", "--prompt-len", "8", "--new-tokens", "2", "--device", "cpu"]
    whole, dropped = answer(*asked)
    assert (whole["plan"], dropped["plan"]) == ("Baseline", "Attn-1")
    assert dropped["kv_bytes"] / whole["kv_bytes"] == 4 / 5 and whole["speedup"] == 1 < 1e3 * dropped["speedup"]
    assert whole["peak_bytes"] is None, "of no CUDA device"
    code, text, _ = run(*asked, "--rounds", "4")
    assert code == 0 and "times as fast" in text


class Replaced(Exception):
    """This process, by another program."""


@pytest.fixture
def started(monkeypatch):
    """The command lines of programs that took this process's place."""
    programs = []

    def execv(path, arguments):
        programs.append(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    return programs


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("engine", ["xllamacpp", "llama-server", "vllm"])
def test_serve_exports_for_the_engine_that_is_here(engine, here, run, started, monkeypatch):
    llmdrop.save_model(wide(), TOKENIZER, "known")
    Path("plan.json").write_text('{"attn": [2], "mlp": [3]}')
    monkeypatch.setattr(launch.llama_cpp, "installed", lambda: "1" if engine == "xllamacpp" else None)
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/bin/{name}" if name == engine else None)
    port = free_port()
    code, out, err = run("serve", "known", "--plan", "plan.json", "--port", port, "--device", "cpu", "--json")
    assert code == 1 and "Replaced" in err
    told = json.loads(out)
    (program,) = started
    assert told["command"] == program and program[program.index("--port") + 1] == str(port)
    assert told["url"] == f"http://127.0.0.1:{port}/v1/chat/completions"
    assert Path(told["file"]).parent == here / "build/serve" and told["file"] in program
    served, _ = llmdrop.load_model(told["file"], device="cpu")
    assert llmdrop.find_anatomy(served).plan == DropPlan([2], [3])
    assert (engine == "vllm") == ("--trust-remote-code" in program) and ("gguf" in told["file"]) == (engine != "vllm")
    if engine != "vllm":  # a file is served as it is
        run("serve", told["file"], "--port", port)
        assert started[1] == program


def test_what_cannot_be_served(here, run, started, monkeypatch):
    assert "no file none.gguf" in refused(run("serve", "none.gguf"), 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        Path("m.gguf").write_text("")
        assert "choose another" in refused(run("serve", "m.gguf", "--port", taken.getsockname()[1]), 1)
    monkeypatch.setattr(launch.llama_cpp, "installed", lambda: None)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert "no engine is installed" in refused(run("serve", "whole"), 1)
    assert "needs llama.cpp" in refused(run("serve", "m.gguf", "--port", free_port()), 1)
    assert not started


def test_study_hands_its_options_to_the_notebook(run, answer, monkeypatch):
    asked = []

    def study(model, out=None, **parameters):
        asked.append((model, out, parameters))
        if model == "bad":
            error = RuntimeError("a whole\ntraceback")
            error.ename, error.evalue = "ValueError", "no such\nmodel"
            raise error
        return Path("study/tiny.html")

    fake = ModuleType("llmdrop.repro.study")
    fake.study = study
    monkeypatch.setitem(sys.modules, "llmdrop.repro.study", fake)
    pytest.importorskip("papermill")
    options = ["--tasks", "piqa,boolq", "--tasks", "rte", "--max-loss", "0.05", "--samples", "4", "--out", "study"]
    assert answer("study", "tiny", *options) == {"page": str(Path("study/tiny.html"))}
    parameters = dict(CALIBRATION="xsum", TASKS=["piqa", "boolq", "rte"], MAX_LOSS=0.05, SAMPLES=4, DEVICE="auto")
    assert asked == [("tiny", "study", parameters)]
    assert refused(run("study", "bad"), 1) == "llmdrop: ValueError: no such model"


def test_the_notebook_has_the_parameters_that_study_gives():
    notebook = ROOT / "notebooks" / "my_model.ipynb"
    if not notebook.is_file():
        pytest.skip("no notebook to study a model by")
    known = set(pytest.importorskip("papermill").inspect_notebook(str(notebook)))
    options = {parameter.name.upper() for parameter in typer.main.get_command(llmdrop_cli.app).commands["study"].params}
    assert options - {"AS_JSON"} == known


# -- errors -----------------------------------------------------------------------------------------------------------

USAGE = {  # what is wrong with the arguments themselves: exit code 2
    "evaluat whole piqa": "No such command 'evaluat'",
    "score": "Missing argument",
    "score whole --nope": "No such option: --nope",
    "score whole --n-samples 0": "--n-samples",
    "score whole --seq-len many": "--seq-len",
    "drop whole": "Missing argument",
    "drop whole out": "nothing to drop; give --attn",
    "drop whole out --attn eight": "'eight' is neither a number of layers nor a share",
    "drop whole out --attn %": "'%' is neither a number",
    "drop whole out --attn 8 --keep first": "'first' is no list of layers",
    "drop whole out --attn 8 --plan plan.json": "--plan says all",
    "speed whole --keep 0": "--keep protects layers",
    "serve whole --port 99999": "--port",
    "plan whole --mlp 0": "nothing to drop",
    "speed whole --attn 1 --rounds 2": "--rounds",
    "drop whole out --attn 1 --format onnx": "'onnx' is not one of",
    "drop whole out.gguf --attn 1 --weights q3": "'q3' is not one of",
    "drop whole out --attn 1 --weights q8_0": "--weights q8_0 is of a GGUF",
    "drop whole out --plan plan.txt": "--plan plan.txt: give a .json file",
}


@pytest.mark.parametrize("line", USAGE)
def test_a_mistake_in_the_arguments_is_one_sentence_and_code_2(line, run):
    sentence = refused(run(*line.split()), 2)
    assert USAGE[line] in sentence and "--help)" in sentence


ERRORS = {  # what only shows when it is tried: exit code 1
    "score nobody/nothing": "cannot load 'nobody/nothing': there is no network to the hub",
    "score whole --calibration nothing": "unknown calibration 'nothing'",
    "score whole --calibration text.txt --n-samples 9999 --device cpu": "Use fewer or shorter samples",
    "score whole --dtype float8": "dtype 'float8' is not one of",
    "score whole --device tpu": "device 'tpu' is not available",
    "plan none.json --attn 1": "No such file or directory: none.json",
    "plan bad.json --attn 1": "not importance scores",
    "plan whole --attn 6 --calibration text.txt --n-samples 2 --seq-len 32 --device cpu": "cannot drop n=6 of 5 attn",
    "plan whole --attn -1 --calibration text.txt --n-samples 2 --seq-len 32 --device cpu": "n must be between 0 and 5",
    "plan whole --attn 1 --keep 9 --calibration text.txt --n-samples 2 --seq-len 32 --device cpu": "keep index 9",
    "drop whole out --plan none.json": "no plan in none.json",
    "drop whole out --plan bad.json": "not a drop plan",
    "drop whole out --plan deep.json --device cpu": "made for a model of 30 layers, this model has 5",
    "drop whole mine --attn 1": "mine is not empty",
    "drop whole mine/notes.txt --attn 1": "notes.txt is a file, and a checkpoint is a directory",
    "drop whole mine/notes.txt/deep --attn 1": "notes.txt is a file; choose another path",
    "drop whole out --attn 1 --push-to-hub a/b/c": "is no name on the hub",
    "drop whole out --plan odd.json --device cpu": "--plan odd.json: attn index 9",
    "score ./nowhere": "./nowhere does not exist; give a directory with config.json",
    "score bad.json": "bad.json is a file; give a directory with config.json",
    "serve none.gguf --attn 1": "none.gguf does not exist; give a .gguf that is there",
    "evaluate whole piqa --data-dir nowhere --device cpu": "nowhere",
}


@pytest.mark.parametrize("line", ERRORS)
def test_any_other_error_is_one_sentence_and_code_1(line, here, run):
    Path("bad.json").write_text('{"attention": 3}')
    Path("deep.json").write_text('{"attn": [2], "n_layers": 30}')
    Path("odd.json").write_text('{"attn": [9]}')
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert ERRORS[line] in refused(run(*line.split()), 1)
    assert not Path("out").exists() and [file.name for file in Path("mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("drop whole out --attn 6", "cannot drop n=6 of 5 attn layers"),
        ("drop whole out --attn 1%", "less than half a layer"),
        ("drop whole out --block 5", "keep at least one"),
        ("evaluate whole piqa --attn 1 --keep 9", "keep index 9"),
        ("drop whole out --attn 1 --calibration xsumm", "unknown calibration 'xsumm'"),
        ("drop whole out --attn 1 --calibration none.txt", "no file none.txt"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_scored(line, says, here, run, monkeypatch):
    monkeypatch.setattr(llmdrop.Store, "score", None)
    assert says in refused(run(*line.split(), "--device", "cpu"), 1)


@pytest.mark.parametrize("line", ["score whole", "plan whole --attn 1", "drop whole out --attn 1"])
def test_a_text_that_is_not_there_is_found_before_the_model_is_loaded(line, here, run, monkeypatch):
    monkeypatch.setattr(llmdrop, "load_model", None)
    assert "unknown calibration 'xsumm'" in refused(run(*line.split(), "--calibration", "xsumm"), 1)


def test_where_nothing_may_be_written_is_found_before_the_long_part(here, run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != here)  # root may write anywhere
    monkeypatch.setattr(llmdrop, "load_model", None)
    sentence = refused(run("drop", "whole", "out", "--attn", "1"), 1)
    assert f"out cannot be written: {here} is closed to you" in sentence


def test_faults_of_our_own_name_themselves(run, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("layer\n7")

    monkeypatch.setattr(llmdrop, "load_model", fail)
    assert refused(run("score", "whole"), 1) == "llmdrop: KeyError: 'layer\\n7'"
    monkeypatch.setenv("LLMDROP_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run("score", "whole")


def test_interrupted(run, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(llmdrop, "load_model", stop)
    assert "interrupted" in refused(run("score", "whole"), 130)


@pytest.mark.parametrize("reader", ["gone", "full", "closed"])
def test_an_answer_that_nobody_reads(reader, here):
    """As a program of its own, without a terminal: its reader has ended, the disk is full, there is none."""
    Path("scores.json").write_text(own_scores().to_json())
    command = [*PROGRAM, "plan", "scores.json", "--attn", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if reader == "closed":
        done = subprocess.run(
            ["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, env=environment
        )
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr
        return
    if reader == "gone":
        read, write = os.pipe()
        os.close(read)
    elif Path("/dev/full").exists():
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        pytest.skip("no /dev/full")
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr.startswith("llmdrop: the answer cannot be written: ") and done.stderr.count("\n") == 1
