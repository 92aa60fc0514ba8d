"""Checkpoints scored and dropped on disk equal models scored and dropped in memory, whatever goes wrong meanwhile."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tiny import FAMILIES, random_ids, tiny
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import llmdrop
from llmdrop import Calibration, DropPlan, apply_plan, drop_checkpoint, load_model, save_model, score, score_checkpoint
from llmdrop.streaming import shards
from llmdrop.streaming.processes import score_distributed
from llmdrop.streaming.shards import INDEX, Entry, open_checkpoint

PLANS = [
    DropPlan(attn=[1, 3]),
    DropPlan(mlp=[0, 4]),
    DropPlan([2, 3], [2, 3]),
    DropPlan([0, 1, 4], [1, 2]),
    DropPlan(attn=range(5)),
]


def text(n=7, length=12, padded=True):
    ids, mask = random_ids(n, length), torch.ones(n, length, dtype=torch.long)
    mask[1, :4] = mask[n - 1, :7] = 0
    return Calibration(ids, "random", mask if padded else None)


@pytest.fixture
def tokenizer():
    words = models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A tiny Llama in many shards."""

    def save(family="llama", **settings):
        model = tiny(family, **settings)
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
        tokenizer.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return save


def same(got, expected, atol=1e-6):
    for kind in ("attn", "mlp", "block"):
        np.testing.assert_allclose(getattr(got, kind), getattr(expected, kind), atol=atol)
        np.testing.assert_allclose(got.stderr[kind], expected.stderr[kind], atol=atol)
        np.testing.assert_allclose(got.magnitude[kind], expected.magnitude[kind], atol=atol)
    assert (got.n_samples, got.n_tokens) == (expected.n_samples, expected.n_tokens)


# -- scoring


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_streamed_scores_equal_those_in_memory(family, padded, saved, tmp_path):
    model, path = saved(family, attn_implementation="sdpa")
    attn, where, work = model.config._attn_implementation, "file" if padded else "host", tmp_path / "work"
    got = score_checkpoint(
        path, text(padded=padded), 3, progress=False, stream_on=where, work_dir=work, attn_implementation=attn
    )
    same(got, score(model, text(padded=padded), 3, progress=False))
    assert not any(work.iterdir()), "nothing stays behind"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_any_dtype(dtype, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    model, path = saved()
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    loaded, _ = load_model(path, dtype=dtype, device="cpu")
    for with_residual in (True, False):
        expected = score(loaded, text(), with_residual=with_residual, progress=False)
        same(score_checkpoint(path, text(), 8, with_residual, False, dtype=dtype, device="cpu"), expected)


@pytest.mark.parametrize("kind, matrix", [("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")])
def test_values_that_are_not_finite_are_refused_by_layer(kind, matrix, saved, tmp_path):
    for value, dtype in ((float("nan"), "float32"), (60000.0, torch.float16)):
        model, path = saved()
        model.model.layers[3].get_submodule(matrix).weight.data[:] = value
        model.save_pretrained(path, max_shard_size="20KB")
        with pytest.raises(ValueError, match=f"layer 3's {kind} gives values that are not finite.*float16 overflows"):
            score_checkpoint(path, text(), progress=False, dtype=dtype, device="cpu", work_dir=tmp_path / "work")


def test_what_a_calibration_can_be_made_of_is_streamed(saved, tmp_path):
    model, path = saved()
    ids = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    got = score_checkpoint(path, ids, progress=False, device=torch.device("cpu"), work_dir=tmp_path / "work")
    same(got, score(model, Calibration(ids), progress=False))


@pytest.mark.parametrize("plan", PLANS[1:4])
def test_a_dropped_checkpoint_is_scored_as_the_dropped_model(plan, saved, tmp_path, tokenizer):
    model, path = saved("qwen2")
    for theirs in (False, True):
        if theirs:  # LLM-Drop: the whole model, with lists in its config
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | plan.to_llm_drop()))
        else:
            dropped = save_model(apply_plan(tiny("qwen2"), plan), tokenizer, tmp_path / "dropped")
        source = path if theirs else dropped
        expected = score(load_model(source, device="cpu")[0], text(), progress=False)
        got = score_checkpoint(source, text(), progress=False, work_dir=tmp_path / "work")
        same(got, expected)
        assert np.isnan(got.attn[list(plan.attn)]).all()


def test_every_byte_of_the_layers_is_read_once(saved, tmp_path, monkeypatch):
    model, path = saved()
    read = []
    monkeypatch.setattr(Entry, "read", _recording(read, Entry.read))
    score_checkpoint(path, text(), progress=False, work_dir=tmp_path)
    assert len(read) == len(set(read))
    layers = sum(p.numel() * 4 for p in model.model.layers.parameters())
    assert layers <= sum(n for *_, n in read) <= layers + 4 * model.model.embed_tokens.weight.numel() + 4 * 32


def _recording(read, plain):
    def recorded(self, out, offset=0):
        read.append((str(self.file), self.start + offset, len(out)))
        plain(self, out, offset)

    return recorded


@pytest.mark.parametrize("versioned", ["llmdrop.streaming.score", "llmdrop.scoring"])
def test_a_new_version_does_not_go_on_with_an_old_run(versioned, saved, tmp_path, monkeypatch):
    model, path = saved()
    with monkeypatch.context() as patch:
        patch.setattr("llmdrop.streaming.score.sample_sums", _failing(3))
        with pytest.raises(KeyboardInterrupt):
            score_checkpoint(path, text(), progress=False, work_dir=tmp_path / "work")
    (old,) = (tmp_path / "work").iterdir()
    monkeypatch.setattr(f"{versioned}.VERSION", 99)
    read = []
    monkeypatch.setattr(Entry, "read", _recording(read, Entry.read))
    same(
        score_checkpoint(path, text(), progress=False, work_dir=tmp_path / "work"),
        score(model, text(), 8, progress=False),
    )
    assert sum(n for *_, n in read) >= sum(p.numel() * 4 for p in model.model.layers.parameters())
    assert list((tmp_path / "work").iterdir()) == [old]


# -- what is downloaded, and what must be installed

LISTING = {
    "sharded twice": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX],
    "single": ["model.safetensors", "adapter_model.safetensors"],
    "index of other names": ["pytorch_model-1.safetensors", "pytorch_model-2.safetensors", INDEX],
}


@pytest.mark.parametrize("kind", LISTING)
def test_only_the_weights_that_are_read_are_downloaded(kind, tmp_path, monkeypatch):
    """A repository like Mistral-7B-v0.3's holds its weights twice."""
    weights = [name for name in LISTING[kind] if name.endswith(".safetensors") and "adapter" not in name]
    others = ["consolidated.safetensors", "consolidated-00001.safetensors", "original/model.safetensors", "model.bin"]
    small = ["config.json", "tokenizer.model", "tokenizer.json", "merges.txt", "chat_template.jinja"]
    hub, cache = tmp_path / "hub", tmp_path / "snapshots" / "0123abcd"
    for name in [*LISTING[kind], *others, *small]:
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        (hub / name).touch()
    if INDEX in LISTING[kind]:
        listed = {f"layer.{k}": name for k, name in enumerate(weights)}
        (hub / INDEX).write_text(json.dumps({"weight_map": listed}))
    revisions = []

    def download(repo, revision, allow_patterns, ignore_patterns):
        assert repo == "org/model"
        revisions.append(revision)
        names = [str(file.relative_to(hub)) for file in hub.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr(shards, "snapshot_download", download)
    with pytest.raises(ValueError, match="config.json"):  # these files hold nothing
        open_checkpoint("org/model@main")
    got = {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()}
    assert got == {*weights, *small} | ({INDEX} & set(LISTING[kind]))
    assert revisions == ["main", "0123abcd"], "both from one commit, though main may move between"


def test_without_the_extra_one_error_says_what_to_install(saved, tmp_path, monkeypatch):
    model, path = saved()
    for package in ("accelerate", "psutil"):
        monkeypatch.setitem(sys.modules, package, None)
    assert score_distributed(model, text(), progress=False) == score(model, text(), progress=False)
    assert drop_checkpoint(path, PLANS[0], tmp_path / "out", progress=False).is_dir()
    with pytest.raises(ImportError, match=r"needs psutil.*pip install 'llmdrop\[streaming\]'"):
        score_checkpoint(path, text(), progress=False, work_dir=tmp_path / "work", device="cpu")


def test_importing_needs_no_extra():
    names = [f"llmdrop.streaming.{file.stem}" for file in Path(shards.__file__).parent.glob("[!_]*.py")]
    code = f"import sys; sys.modules.update(accelerate=None, psutil=None); import {', '.join(names)}"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- killed, and run by several: one python for all processes of a test, since imports take longer than the work

SETUP = """
import json, os, random, signal, socket, sys, threading, time
from pathlib import Path
import torch
from tqdm import tqdm
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from processes import FileOperations
from tiny import tiny, random_ids
import llmdrop
from llmdrop import Calibration, DropPlan, drop_checkpoint, score, score_checkpoint
from llmdrop.streaming.processes import score_distributed
folder = Path(sys.argv[2])
ids, mask = random_ids(7, 12), torch.ones(7, 12, dtype=torch.long)
mask[1, :4] = mask[6, :7] = 0
text = Calibration(ids, "random", mask)
"""

# tqdm's own lock is shared with forked processes: one killed while it holds it would stop all others for good.
KILL = """
tqdm.set_lock(threading.RLock())
def rate(place="host"):
    return score_checkpoint(folder / "model", text, 1, progress=False, stream_on=place, work_dir=folder / "work")

def drop():
    plan = DropPlan([1, 3], [1])
    drop_checkpoint(folder / "model", plan, folder / "out", progress=False, link=False, overwrite=True)

rate()
drop()
operations = FileOperations()
scoring = {}
for place in ("host", "file"):
    operations.count = 0
    rate(place)
    scoring[place] = operations.count
operations.count = 0
drop()
dropping = operations.count
kills, resumed = 0, 0
random.seed(0)
for k in range(20):
    place = ["host", "file"][k % 2]
    stretch = scoring[place] * (k + random.random()) / 12 if k < 12 else dropping * (k - 12 + random.random()) / 8
    child = os.fork()
    if child == 0:
        operations.count = 0
        operations.last = 1 + int(stretch)
        if k < 12:
            rate(place)
        drop()
        os._exit(0)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    resumed += any((folder / "work").glob("*/progress.npz"))
    assert not (folder / "out").exists() or (folder / "out" / "config.json").exists()
scores = rate()
drop()
print(json.dumps([kills, resumed, scores.to_json()]))
"""


def run(code, folder, *command):
    script = folder / "script.py"
    script.write_text(SETUP + code)
    env = os.environ | {"PYTHONPATH": str(Path(llmdrop.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, script, Path(__file__).parent.parent, folder],
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


def test_killed_at_random_it_goes_on_and_leaves_nothing(saved, tmp_path):
    model, _ = saved()
    kills, resumed, scores = json.loads(run(KILL, tmp_path)[-1])
    assert kills >= 15 and resumed >= 5, (kills, resumed)
    same(llmdrop.ImportanceScores.from_json(scores), score(model, text(), 1, progress=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "script.py", "work"]
    assert not any((tmp_path / "work").iterdir())


def test_a_run_goes_on_at_the_layer_it_was_in(saved, tmp_path, monkeypatch):
    model, path = saved()
    expected, read = score(model, text(), progress=False), []
    for place in ("host", "file"):
        with monkeypatch.context() as patch:
            patch.setattr(llmdrop.streaming.score, "sample_sums", _failing(3))
            with pytest.raises(KeyboardInterrupt):
                score_checkpoint(path, text(), progress=False, stream_on=place, work_dir=tmp_path / "work")
        assert len(list((tmp_path / "work").iterdir())) == 1
        with monkeypatch.context() as patch:
            read.clear()
            patch.setattr(Entry, "read", _recording(read, Entry.read))
            same(score_checkpoint(path, text(), progress=False, stream_on=place, work_dir=tmp_path / "work"), expected)
        two_layers = 2 * sum(p.numel() * 4 for p in model.model.layers[0].parameters())
        assert sum(n for *_, n in read) == two_layers + model.model.norm.weight.numel() * 4


def _failing(after):
    def failing(*args, **kwargs):
        nonlocal after
        after -= 1
        if after < 0:
            raise KeyboardInterrupt
        return llmdrop.scoring.sample_sums(*args, **kwargs)

    return failing


PARALLEL = """
for n in (7, 2):
    share = Calibration(ids[:n], "random", mask[:n])
    model = tiny("llama")
    results = [
        score_distributed(model, share, 2, gap=True, progress=False),
        score_checkpoint(folder / "model", share, 2, progress=False, distributed=True, work_dir=folder / "work"),
    ]
    name = f"{n}-{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.json"
    (folder / name).write_text(json.dumps([r.to_json() for r in results]))
"""

FORKED = """
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
rank, others = 0, []
for k in (1, 2):
    others.append(os.fork())
    if others[-1] == 0:
        rank, others = k, []
        break
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
"""


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_give_the_scores_of_one(world, saved, tmp_path):
    model, _ = saved()
    if world == 3:
        run(FORKED + PARALLEL + "assert not any(os.waitpid(other, 0)[1] for other in others)\n", tmp_path)
    else:
        run(PARALLEL, tmp_path, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}")
    for n in (7, 2):
        part = Calibration(text().input_ids[:n], "random", text().attention_mask[:n])
        expected = score(model, part, 2, gap=True, progress=False)
        for rank in range(world):
            for got in json.loads((tmp_path / f"{n}-{world}-{rank}.json").read_text()):
                got = llmdrop.ImportanceScores.from_json(got)
                same(got, expected)
                if got.gap is not None:
                    np.testing.assert_allclose(got.gap, expected.gap, atol=1e-6)
    assert not any((tmp_path / "work").iterdir())


# -- dropping


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_on_disk_equals_dropping_in_memory(family, saved, tmp_path, tokenizer):
    _, path = saved(family)
    for k, plan in enumerate(PLANS if family == "llama" else PLANS[2:4]):
        expected = save_model(apply_plan(load_model(path, device="cpu")[0], plan), tokenizer, tmp_path / f"memory-{k}")
        got = drop_checkpoint(path, plan, tmp_path / f"disk-{k}", progress=False)
        assert config(got) == config(expected)
        assert {p.name for p in got.iterdir() if "safetensors" not in p.name} == {
            p.name for p in expected.iterdir() if "safetensors" not in p.name
        }
        tensors, wanted = all_tensors(got), all_tensors(expected)
        assert set(tensors) == set(wanted)
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        ids = random_ids(2, 9)
        with torch.inference_mode():
            a, b = (load_model(p, device="cpu")[0](ids).logits for p in (got, expected))
        assert torch.equal(a, b)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def config(path):
    return {k: v for k, v in json.loads((path / "config.json").read_text()).items() if k != "_name_or_path"}


def all_tensors(path):
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def test_dropping_again_and_whole_shards_are_linked(saved, tmp_path, tokenizer):
    _, path = saved()
    first, second = DropPlan(attn=[3]), DropPlan([1], [1])
    once = drop_checkpoint(path, first, tmp_path / "once", progress=False)
    links = [file for file in once.glob("*.safetensors") if file.stat().st_nlink > 1]
    assert len(links) >= 3, "layers before the first dropped one stay as they are"
    assert all(f.stat().st_nlink == 1 for f in drop_checkpoint(
        path, first, tmp_path / "copy", link=False, progress=False).glob("*.safetensors"))  # fmt: skip
    twice = drop_checkpoint(once, second, tmp_path / "twice", progress=False)
    expected = apply_plan(tiny("llama"), first | second).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in all_tensors(twice).items())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        drop_checkpoint(path, second, once)
    assert drop_checkpoint(path, second, once, overwrite=True, progress=False) == once
    assert load_model(once, device="cpu")[0].config.num_hidden_layers == 4


def test_a_checkpoint_is_not_dropped_onto_itself(saved, tmp_path):
    _, path = saved()
    ours = drop_checkpoint(path, DropPlan([3]), tmp_path / "ours", progress=False)
    before = {file.name: file.read_bytes() for file in ours.iterdir()}
    (tmp_path / "link").symlink_to(ours)
    for source, destination in ((ours, ours), (tmp_path / "link", ours), (ours, tmp_path / "link")):
        with pytest.raises(FileExistsError, match="is the checkpoint to drop from"):
            drop_checkpoint(source, DropPlan([1]), destination, overwrite=True, progress=False)
    assert {file.name: file.read_bytes() for file in ours.iterdir()} == before
    assert drop_checkpoint(path, DropPlan([1]), tmp_path / "link", overwrite=True, progress=False) == ours
    assert (tmp_path / "link").is_symlink()


# -- damage


def damage_truncated(path):
    file = sorted(path.glob("*.safetensors"))[2]
    os.truncate(file, file.stat().st_size - 5)


def damage_header(path):
    file = sorted(path.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes().replace(b'"shape":[', b'"shape":{', 1))


def damage_empty(path):
    sorted(path.glob("*.safetensors"))[2].write_bytes(b"")


def damage_missing(path):
    sorted(path.glob("*.safetensors"))[2].unlink()


def damage_index(path):
    index = json.loads((path / INDEX).read_text())
    names = list(index["weight_map"])
    index["weight_map"][names[3]] = index["weight_map"][names[-1]]
    (path / INDEX).write_text(json.dumps(index))


def damage_index_text(path):
    (path / INDEX).write_text((path / INDEX).read_text()[:-50])


def damage_depth(path):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 7}))


def damage_width(path):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"intermediate_size": 40}))


def damage_quantized(path):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))


def damage_pickled(path):
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()
    (path / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (damage_truncated, ValueError, "00003-of.*is cut short"),
        (damage_header, ValueError, "damaged header"),
        (damage_empty, ValueError, "cut short or no safetensors"),
        (damage_missing, FileNotFoundError, "lacks 1 of .* shards"),
        (damage_index, ValueError, "where it is not"),
        (damage_index_text, ValueError, "index.json is damaged"),
        (damage_depth, ValueError, "do not fit its config.json: missing.*layers.5"),
        (damage_width, ValueError, "of another shape"),
        (damage_quantized, ValueError, "quantized weights .gptq"),
        (damage_pickled, FileNotFoundError, "pickled weights"),
    ],
)
def test_damage_is_found_before_anything_is_written(damage, error, message, saved, tmp_path):
    _, path = saved()
    damage(path)
    with pytest.raises(error, match=message):
        score_checkpoint(path, text(), progress=False, work_dir=tmp_path / "work")
    with pytest.raises(error, match=message):
        drop_checkpoint(path, PLANS[0], tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@contextlib.contextmanager
def full_disk(n_bytes):
    """No file can grow beyond n_bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("place", ["host", "file"])
def test_a_full_disk_is_a_clear_error(place, saved, tmp_path):
    _, path = saved()
    with full_disk(4096), pytest.raises(OSError, match="cannot keep the residual stream"):
        score_checkpoint(path, text(), progress=False, stream_on=place, work_dir=tmp_path / "work")
    with full_disk(4096), pytest.raises(OSError, match="cannot write .*Nothing of it is left"):
        drop_checkpoint(path, PLANS[0], tmp_path / "out", link=False, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "work"] and not any((tmp_path / "work").iterdir())


def test_arguments_that_cannot_be(saved, tmp_path):
    model, path = saved()
    with pytest.raises(ValueError, match="batch_size=0"):
        score_checkpoint(path, text(), batch_size=0)
    with pytest.raises(ValueError, match="stream_on='disk'"):
        score_checkpoint(path, text(), stream_on="disk")
    with pytest.raises(ValueError, match="name of a checkpoint"):
        score_checkpoint(model, text())
    with pytest.raises(ValueError, match="batch_size=0"):
        score_distributed(model, text(), batch_size=0)
    with pytest.raises(ValueError, match="beyond the model's vocabulary of 97"):
        score_checkpoint(path, Calibration(torch.full((2, 5), 97)), progress=False, work_dir=tmp_path / "work")
    with pytest.raises(ValueError, match="out of range"):
        drop_checkpoint(path, DropPlan(attn=[9]), tmp_path / "out")
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="cannot get"):
        score_checkpoint(path, text())


# -- models spread over devices


def test_an_offloaded_model_scores_as_it_is(saved, tmp_path):
    """device_map: what accelerate's hooks bring in and take out again, layer by layer, is scored like any model."""
    model, path = saved()
    from transformers import AutoModelForCausalLM

    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(5)}
    spread = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert spread.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    same(score(spread.eval(), text(), progress=False), score(model, text(), progress=False))
    plan = DropPlan([1], [3])
    got, expected = (llmdrop.perplexity_sweep(m, {"": plan}, text(padded=False)) for m in (spread, model))
    assert got["perplexity"].item() == pytest.approx(expected["perplexity"].item(), rel=1e-6)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("brings", [False, True])
def test_make_evaluate_starts_a_process_per_gpu(brings, tmp_path):
    if brings:
        (tmp_path / "modeling_llmdrop.py").touch()
    command = ["make", "-n", "evaluate", f"MODEL={tmp_path}", "TASKS=piqa,boolq", "LIMIT=5", "GPUS=4"]
    says = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent).stdout
    assert "--multi_gpu --num_processes 4 " in says
    assert f"lm_eval run --model hf --model_args pretrained={tmp_path}," in says
    assert "--tasks piqa,boolq" in says and "--limit 5" in says
    assert ("trust_remote_code=True" in says) == brings
